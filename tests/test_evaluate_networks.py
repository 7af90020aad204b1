"""Evaluation through main with a network's features: files, scores, weights and devices.

Each test runs twice: with Inception and random weights (slow), and with a stub in its place.
"""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sit_jax import sharding
from sit_jax.jobs.evaluation.feature_sets import open_space
from sit_jax.metrics import weight_files
from sit_jax.metrics.features import EXTRACTORS
from sit_jax.metrics.frechet import frechet_distance
from sit_jax.metrics.inception_score import inception_score
from sit_jax.metrics.kernel_distance import kernel_distance
from sit_jax.metrics.moments import feature_statistics
from sit_jax.metrics.neighbours import precision_recall
from sit_jax.settings import Evaluate
from tests.commands import call, flags, refusal
from tests.inception_weights import tensors
from tests.processes import Processes, run_python

SCORES = ["fid", "sfid", "inception_score", "precision", "recall", "kid"]
KEPT = 20
WIDTHS = {"pool": 8, "spatial": 6, "logits": 5}
STUB_SHAPES = {"w": (2 * 2 * 3, sum(WIDTHS.values()))}


def images(count, seed, noise):
    """Return uint8 images of 4 x 4 squares."""
    draw = np.random.default_rng(seed)
    squares = np.kron(draw.uniform(0, 255, (count, 4, 4, 3)), np.ones((1, 8, 8, 1)))
    return np.clip(squares + draw.normal(0, noise, squares.shape), 0, 255).astype(np.uint8)


REAL, FAKE = images(24, 0, 2), images(24, 1, 80)
FAKE[::2] //= 8  # half of the samples are dark


def stub_features(params, x_bhwc):
    """Project the means of the quarters of an image."""
    b, h, w, _ = x_bhwc.shape
    x_bhwc = jnp.broadcast_to(x_bhwc, (b, h, w, 3)) / 64 - 2
    quarters = x_bhwc.reshape(b, 2, h // 2, 2, w // 2, 3).mean((2, 4)).reshape(b, -1)
    parts = jnp.split(jnp.tanh(quarters @ params["w"]), np.cumsum([*WIDTHS.values()])[:-1], -1)
    return dict(zip(WIDTHS, parts, strict=True))


def use_stub():
    """Put the stub in the place of Inception."""
    for name in ("inception", "inception-pytorch-fid"):
        EXTRACTORS[name] = dataclasses.replace(
            EXTRACTORS[name],
            widths=WIDTHS,
            load=lambda path: weight_files.read(weight_files.INCEPTION, path, STUB_SHAPES),
            apply=stub_features,
        )


@functools.cache
def stub_tensors():
    return {"w": np.random.default_rng(2).normal(size=STUB_SHAPES["w"]).astype(np.float32)}


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(tensors(), path)
    return path


@dataclasses.dataclass
class Place:
    """A network in use, its weights, and files of images and of their statistics."""

    name: str
    folder: pathlib.Path
    weights: pathlib.Path
    statistics: pathlib.Path
    settings: list[str]

    def evaluate(self, reference, *arguments):
        """Return the summary of the samples, or of a workdir's, and stderr."""
        samples = [] if "--workdir" in arguments else ["--samples", self.folder / "fake.npz"]
        run = ["--mode", "evaluate", *self.settings, *samples, "--reference", reference]
        status, out, err = call(*run, "--out", self.folder / "out", *arguments)
        assert status == 0, err
        folder = re.search("report: (.*)/report.html", out)[1]
        return json.loads(pathlib.Path(folder, "summary.json").read_text()), err

    @functools.cached_property
    def against_images(self):
        return self.evaluate(self.folder / "real.npz")

    @functools.cached_property
    def features(self):
        """Features of the real images and of the samples, computed without the jobs."""
        extractor = EXTRACTORS["inception"]
        apply = jax.jit(functools.partial(extractor.apply, extractor.load(str(self.weights))))
        with jax.default_matmul_precision("highest"):
            parts = [jax.device_get(apply(x)) for x in np.split(np.concatenate([REAL, FAKE]), 4)]
        every = {name: np.concatenate([part[name] for part in parts]) for name in WIDTHS}
        return tuple(
            {name: x[rows] for name, x in every.items()} for rows in (slice(24), slice(24, 48))
        )

    @functools.cached_property
    def kept(self):
        """Numbers of the real images in the file of statistics."""
        with np.load(self.statistics) as file:
            return [int(np.flatnonzero((x == REAL).all((1, 2, 3)))[0]) for x in file["arr_0"]]

    def without(self, *names):
        """Write the file of statistics without some of its arrays, and return its path."""
        path = self.folder / f"without_{'_'.join(names)}.npz"
        with np.load(self.statistics) as file:
            np.savez(path, **{name: file[name] for name in file.files if name not in names})
        return path


@pytest.fixture(scope="module", params=["stub", pytest.param("real", marks=pytest.mark.slow)])
def place(request, quiet_machine, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    np.savez(folder / "real.npz", REAL)
    np.savez(folder / "fake.npz", FAKE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        if request.param == "stub":
            for name in ("inception", "inception-pytorch-fid"):
                patch.setitem(EXTRACTORS, name, EXTRACTORS[name])  # to be put back
            use_stub()
            weights = folder / "stub.safetensors"
            save_file(stub_tensors(), weights)
        else:
            weights = request.getfixturevalue("inception_file")
        settings = flags(evaluate__inception=weights, evaluate__batch=12, evaluate__kept=KEPT)
        run = ["--mode", "stats", "--reference", folder / "real.npz", "--out", folder / "out"]
        status, out, err = call(*run, *settings)
        assert status == 0, err
        assert err.count("\n") == 1 and "were not made from the published file" in err
        statistics = pathlib.Path(re.search("24 images: (.*npz)", out)[1])
        yield Place(request.param, folder, weights, statistics, settings)


def test_statistics_have_the_form_of_adms_files(place):
    real, _ = place.features
    with np.load(place.statistics, allow_pickle=False) as file:
        assert sorted(file.files) == sorted(
            ["mu", "sigma", "mu_s", "sigma_s", "arr_0", "count", "space"]
        )
        assert file["count"] == 24 and str(file["space"]).startswith("inception ")
        for mean, covariance, feature in (("mu", "sigma", "pool"), ("mu_s", "sigma_s", "spatial")):
            for name, want in (
                (mean, real[feature].astype(np.float64).mean(0)),
                (covariance, np.cov(real[feature].astype(np.float64), rowvar=False)),
            ):
                assert file[name].dtype == np.float64
                np.testing.assert_allclose(file[name], want, atol=1e-4 * np.abs(want).max())
    # The kept images are a draw, in the order of the data.
    assert len(place.kept) == KEPT and place.kept == sorted(place.kept)
    assert place.kept != list(range(KEPT))


def directly(real, kept, fake):
    """Return the scores of features by the functions of sit_jax.metrics."""
    rows = {name: x[kept] for name, x in real.items()}
    precision, recall = precision_recall(rows["pool"], fake["pool"], 3)
    size = min(len(kept), len(fake["pool"])) // 2
    distance = {
        name: frechet_distance(feature_statistics(fake[name]), feature_statistics(real[name]))
        for name in ("pool", "spatial")
    }
    return {
        "fid": distance["pool"],
        "sfid": distance["spatial"],
        "inception_score": inception_score(fake["logits"], 10)[0],
        "precision": precision,
        "recall": recall,
        "kid": kernel_distance(fake["pool"], rows["pool"], size=size)[0],
    }


def values(summary, key="value"):
    return {name: score[key] for name, score in summary["scores"]["inception"].items()}


@pytest.mark.parametrize("place", ["stub"], indirect=True)
def test_images_of_another_size_have_statistics_of_their_own(place, tmp_path):
    arguments = ["--mode", "stats", "--reference", tmp_path / "real.npz", "--out", tmp_path]
    files = set()
    for size in (32, 16):
        np.savez(tmp_path / "real.npz", REAL[:, :size, :size])
        status, out, _ = call(*arguments, *place.settings)
        assert status == 0
        files.add(re.search("24 images: (.*npz)", out)[1])
    assert len(files) == 2


def test_scores_are_those_of_the_metrics(place):
    summary, err = place.against_images
    real, fake = place.features
    want = directly(real, place.kept, fake)
    assert list(values(summary)) == SCORES
    assert values(summary) == pytest.approx(want, rel=1e-4)
    assert "samples are few" in err
    (space,) = summary["recipe"]["features"]
    assert space["weights"] == "others, not the published file"
    assert "were not made from the published file" in err


def test_real_halves_are_the_floor_of_every_score(place):
    summary, _ = place.against_images
    real, _ = place.features
    kept = {name: x[place.kept] for name, x in real.items()}
    order = np.random.default_rng(0).permutation(KEPT)
    first, second = ({name: x[order[i::2]] for name, x in kept.items()} for i in (0, 1))
    # The two halves in the places of samples and reference.
    want = directly(second, np.arange(KEPT // 2), first)
    found = values(summary, "real_halves")
    for name in SCORES:
        # The parts of the Inception Score may be drawn at random.
        precision = 0.05 if name == "inception_score" else 1e-4
        assert found[name] == pytest.approx(want[name], rel=precision), name
    # The samples are further from the reference than its halves are from each other.
    for name in ("fid", "sfid", "kid"):
        assert values(summary)[name] > found[name], name


def test_statistics_give_the_scores_of_their_images(place):
    want, _ = place.against_images
    found, _ = place.evaluate(place.statistics)
    for key in ("value", "standard_error", "real_halves", "bias"):
        got = values(found, key)
        for name, value in values(want, key).items():
            assert got[name] == (value if value is None else pytest.approx(value, rel=1e-6)), name
    assert found["recipe"]["reference"]["count"] == 24
    assert found["recipe"]["samples"] == want["recipe"]["samples"]


def test_files_of_adm_itself_and_of_pytorch_fid_work(place):
    want, _ = place.against_images
    bare, _ = place.evaluate(place.without("count", "space", "arr_0"))
    assert list(values(bare)) == ["fid", "sfid", "inception_score"]
    for name, value in values(bare).items():
        assert value == pytest.approx(values(want)[name], rel=1e-6), name
    assert bare["recipe"]["reference"]["count"] == "not known"
    assert set(values(bare, "real_halves").values()) == {None}
    if place.name == "stub":
        only_pool, _ = place.evaluate(place.without("count", "space", "arr_0", "mu_s", "sigma_s"))
        assert list(values(only_pool)) == ["fid", "inception_score"]


def test_statistics_of_other_features_or_weights_are_refused(place, tmp_path):
    base = ["--mode", "evaluate", *place.settings, "--out", tmp_path]
    base += ["--samples", place.folder / "fake.npz"]
    run = [*base, "--reference", place.statistics]
    message = refusal_after_warning(*run, *flags(evaluate__features="inception-pytorch-fid"))
    assert "statistics of the features 'inception " in message
    assert "samples' are 'inception-pytorch-fid " in message
    arrays = dict(stub_tensors() if place.name == "stub" else tensors())
    name = "w" if place.name == "stub" else "Mixed_7c.branch1x1.bn.bias"
    save_file(arrays | {name: arrays[name] + 1}, tmp_path / "other.safetensors")
    other = flags(evaluate__inception=tmp_path / "other.safetensors")
    assert "make them again with --mode stats" in refusal_after_warning(*run, *other)
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(1024), sigma=np.eye(1024))
    message = refusal_after_warning(*base, "--reference", tmp_path / "narrow.npz")
    assert "mu is [1024]" in message and "of another space" in message
    stats = ["--mode", "stats", *place.settings, "--out", tmp_path]
    message = refusal(*stats, "--reference", place.statistics)
    assert "already holds statistics" in message
    assert not list(tmp_path.rglob("summary.json"))


def refusal_after_warning(*arguments):
    """Return the last line of stderr, after the warning of weights that are not published."""
    status, _, err = call(*arguments)
    warning, line, *rest = err.splitlines()
    assert status == 2 and "not made from the published" in warning and not rest, err
    return line


def test_weights_that_cannot_be_read_are_refused_in_one_line(place, tmp_path):
    run = ["--mode", "evaluate", *place.settings, "--out", tmp_path]
    run += ["--samples", place.folder / "fake.npz", "--reference", place.statistics]
    remedy = "run `python -m convert.inception`, or download https://github.com/mseitzer"
    message = refusal(*run, *flags(evaluate__inception="none"))
    assert f"cache/sit_jax/inception.safetensors' do not exist; to get them, {remedy}" in message
    path = tmp_path / "x.safetensors"
    given = flags(evaluate__inception=path)
    message = refusal(*run, *given)
    assert f"the weights '{path}' do not exist" in message and remedy in message
    save_file({"head.weight": np.zeros((3, 3), np.float32)}, path)
    message = refusal(*run, *given)
    assert "is missing" in message and remedy in message
    path.write_bytes(place.weights.read_bytes()[:-8])
    message = refusal(*run, *given)
    assert f"{path} is not a readable .safetensors file" in message and remedy in message


def test_the_published_weights_are_known_by_the_checksum_in_their_file(place, tmp_path, capsys):
    path = tmp_path / "published.safetensors"
    arrays = stub_tensors() if place.name == "stub" else tensors()
    save_file(arrays, path, metadata={weight_files.SOURCE: weight_files.INCEPTION.sha256})
    mesh = sharding.make_mesh(1, 1, 1)
    space = open_space("inception", Evaluate(inception=str(path)), mesh)
    assert space.weights == "published" and capsys.readouterr().err == ""
    space = open_space("inception", Evaluate(inception=str(place.weights)), mesh)
    assert space.weights != "published" and capsys.readouterr().err


ON_DEVICES = """
import sys
import numpy as np
from sit_jax import main
from sit_jax.jobs.evaluation import job as evaluate
from tests import test_evaluate_networks

name, saved, *arguments = sys.argv[1:]
if name == "stub":
    test_evaluate_networks.use_stub()
extract = evaluate.extract_features


def extract_and_save(*args):
    features = extract(*args)
    np.savez(saved, **features.rows)
    return features


evaluate.extract_features = extract_and_save
sys.exit(main.main(arguments))
"""


def test_four_devices_give_the_same_scores(place, tmp_path):
    want, _ = place.against_images
    run = ["--mode", "evaluate", *place.settings, *flags(evaluate__batch=3), "--out", tmp_path]
    run += ["--samples", place.folder / "fake.npz", "--reference", place.folder / "real.npz"]
    saved = tmp_path / "rows.npz"
    run_python("-c", ON_DEVICES, place.name, str(saved), *map(str, run), devices=4)
    (path,) = tmp_path.rglob("summary.json")
    summary = json.loads(path.read_text())
    assert "4" in summary["recipe"]["devices"]
    _, fake = place.features
    with np.load(saved) as rows:
        for name, x in fake.items():
            np.testing.assert_allclose(rows[name], x, atol=1e-5 * np.abs(x).max(), err_msg=name)
    assert values(summary) == pytest.approx(values(want), rel=1e-4)


@pytest.mark.slow
def test_sweep_and_evaluate_agree(place, trained):
    workdir, _ = trained
    reference = place.without("count", "space", "arr_0")
    sampler = flags(sample__solver="heun", sample__steps=2, sample__cfg_scale=1.5, sample__count=12)
    arguments = ["--workdir", workdir, *sampler]
    want, _ = place.evaluate(reference, *arguments)
    grid = flags(
        sweep__features="inception", sweep__count=12, sweep__solvers="heun", sweep__steps="2",
        sweep__cfg_scales="1.5",
    )  # fmt: skip
    out = ["--reference", reference, "--out", place.folder / "out"]
    status, _, err = call("--mode", "sweep", *place.settings, *arguments, *grid, *out)
    assert status == 0, err
    (path,) = (place.folder / "out" / "sweeps").glob("*/results.jsonl")
    (row,) = map(json.loads, path.read_text().splitlines())
    for name, value in values(want).items():
        assert row[name] == pytest.approx(value, rel=1e-6), name


KILLED = """
import os, signal, sys
import numpy as np
from sit_jax import main
from tests import test_evaluate_networks

test_evaluate_networks.use_stub()
write, written = np.lib.format.write_array, []


def write_and_die(file, array, **options):
    write(file, array, **options)
    file.flush()
    written.append(array)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)


np.lib.format.write_array = write_and_die
main.main(sys.argv[1:])
"""


@pytest.mark.parametrize("place", ["stub"], indirect=True)
def test_statistics_are_complete_or_not_there(place, tmp_path):
    run = ["--mode", "stats", "--reference", place.folder / "real.npz", "--out", tmp_path]
    run += place.settings
    program = ("-c", KILLED)
    job = Processes(tmp_path / "job", run, count=1, devices=1, program=program, joined=False)
    assert job.wait() == [-9], job.printed(stream="err")
    (left,) = (tmp_path / "stats").rglob("*inception*")
    assert left.name.startswith(".") and left.stat().st_size > 0
    status, *_ = call(*run)
    assert status == 0
    (path,) = (tmp_path / "stats").rglob("*inception*")
    assert path.name == "inception.npz" and path.read_bytes() == place.statistics.read_bytes()
