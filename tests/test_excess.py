"""--mode excess: the model against the best possible prediction, and samples against copies."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sit_jax import config as config_lib
from sit_jax.data import sources
from sit_jax.data.latents import open_latents
from sit_jax.data.source import ArraySource, SourceOptions, image_spec
from sit_jax.jobs.excess import measure as measuring
from sit_jax.jobs.excess import points as points_lib
from sit_jax.jobs.excess import sets
from sit_jax.jobs.setup import Setup, set_up
from sit_jax.latents import posterior
from sit_jax.transport import optimal, paths, prediction
from tests import caches
from tests.commands import (
    DIGITS,
    FOLDER,
    ROOT,
    TINY,
    call,
    flags,
    refusal,
    snapshot,
    succeed,
    write_images,
)

pytestmark = pytest.mark.usefixtures("quiet_machine")

FAST = {
    "excess__strata": 3,
    "excess__draws": 20,
    "excess__batch": 16,
    "excess__samples": 10,
}
NETWORK = {"model.depth": 1, "model.width": 16, "model.heads": 2}


def arguments(workdir, **settings):
    return ["--workdir", workdir, "--mode", "excess", *flags(**(FAST | settings))]


def folder_of(workdir):
    (folder,) = (workdir / "excess").iterdir()
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def summary_of(workdir):
    return json.loads((folder_of(workdir) / "summary.json").read_text())


def load(**settings):
    values = {key.replace("__", "."): str(value) for key, value in settings.items()}
    return config_lib.load(DIGITS, list(({k: str(v) for k, v in NETWORK.items()} | values).items()))


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """Return a copy of the run with its excess, and the stdout of the job."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained[0], workdir)
    return workdir, succeed(*arguments(workdir))


# The job


def test_rows_summary_and_files(evaluated):
    workdir, out = evaluated
    folder = folder_of(workdir)
    assert folder.name.startswith("step4-ema-train-data-seed0-")
    names = {path.name for path in folder.iterdir()}
    results = {"results.jsonl", "settings.json", "summary.json", "table.md"}
    assert names == results | {"plot.png", "closest.png"}
    rows = rows_of(folder)
    assert [(row["set"], row["stratum"]) for row in rows] == [
        (name, stratum) for name in ("train", "test") for stratum in range(3)
    ]
    assert rows[1]["t"] == pytest.approx([1 / 3, 2 / 3])
    for row in rows:
        assert row["difference"] == pytest.approx(row["model"] - row["memoriser"], rel=1e-5)
    summary = summary_of(workdir)
    for name in ("model", "memoriser", "difference"):
        mean = np.mean([row[name] for row in rows[:3]])
        error = np.sqrt(sum(row[f"{name}_error"] ** 2 for row in rows[:3])) / 3
        assert summary["train"][name]["mean"] == pytest.approx(mean)
        assert summary["train"][name]["standard_error"] == pytest.approx(error)
    assert summary["train"]["draws"] == 60
    assert (summary["train"]["images"], summary["test"]["images"]) == (899, 898)
    # A test image is far from every training image, which the memoriser names near t=1.
    assert "memoriser" not in summary["test"] and "affine" not in summary["test"]
    assert rows[5]["memoriser"] > 10 * rows[2]["memoriser"]
    assert f"train images: model {summary['train']['model']['mean']:.4f} +- " in out
    table = (folder / "table.md").read_text()
    assert f"| 0.333 to 0.667 | {rows[1]['model']:.4f} +- {rows[1]['model_error']:.4f} |" in table
    assert "\n| all | " in table and "test images, split 'test':" in table


def test_a_hardly_trained_model_has_an_excess_in_every_part(evaluated):
    for row in rows_of(folder_of(evaluated[0]))[:3]:
        assert row["difference"] > 10 * row["difference_error"] > 0
    assert summary_of(evaluated[0])["train"]["model"]["mean"] < 2  # and its loss is a loss


def test_distances_of_samples_and_of_test_images(evaluated):
    workdir, out = evaluated
    nearest = summary_of(workdir)["nearest"]
    assert (nearest["samples"]["count"], nearest["test images"]["count"]) == (10, 10)
    assert nearest["test images"]["copies"] == 0
    # The samples of a network that has hardly been trained are noise.
    assert nearest["samples"]["quantiles"]["0"] > nearest["test images"]["quantiles"]["1"]
    assert nearest["closer"] == 0
    assert "samples closer to one than all but 1 % of test images: 0.0%" in out
    # 8 pairs (log.sheet_count) of two 8x8 images, in 5 columns (sample.columns), 3 times as large.
    width, height = Image.open(folder_of(workdir) / "closest.png").size
    pair = np.array([2 * 8 + 3 * 2, 8 + 2 * 2]) * 3 + 2
    assert (width, height) == (5 * pair[0] + 2, 2 * pair[1] + 2)


def test_a_killed_job_continues_where_it_was(evaluated, tmp_path):
    workdir = pathlib.Path(shutil.copytree(evaluated[0], tmp_path / "run"))
    before = snapshot(workdir)
    results = folder_of(workdir) / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    (results.parent / "summary.json").unlink()
    assert ": 2 parts of the times, into" in succeed(*arguments(workdir))
    assert snapshot(workdir) == before


def test_the_batch_size_changes_no_row(evaluated, run_copy):
    succeed(*arguments(run_copy, excess__batch=7, excess__samples=0))
    rows = zip(rows_of(folder_of(run_copy)), rows_of(folder_of(evaluated[0])), strict=True)
    for row, other in rows:
        assert row["model"] == pytest.approx(other["model"], rel=1e-5)
        assert row["memoriser"] == pytest.approx(other["memoriser"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"excess__labels": "null"}, {"excess__seed": 1}, {"excess__test_split": "all"}],
    ids=str,
)
def test_other_settings_have_a_folder_and_numbers_of_their_own(evaluated, run_copy, change):
    succeed(*arguments(run_copy, excess__samples=0, **change))
    summary = summary_of(run_copy)
    assert folder_of(run_copy).name != folder_of(evaluated[0]).name
    assert not (folder_of(run_copy) / "closest.png").exists() and "nearest" not in summary
    of_test = "excess__test_split" in change
    assert of_test == (
        summary["train"]["memoriser"] == summary_of(evaluated[0])["train"]["memoriser"]
    )
    # The best affine map of each class needs the label.
    assert ("class_affine" in summary["train"]) == (change.get("excess__labels") != "null")


def test_test_images_among_the_training_images_are_counted(run_copy):
    succeed(*arguments(run_copy, excess__test_split="all", excess__samples=64, excess__strata=1))
    copies = summary_of(run_copy)["nearest"]["test images"]["copies"]
    assert 16 < copies < 48  # about half


# What the losses are worth


@pytest.fixture(scope="module")
def digits():
    """Return setup and training set of the digits, with labels dropped as in training."""
    config = load(excess__labels="dropout", excess__strata=20, excess__draws=150)
    setup, source = sets.open_split(config, "train")
    return setup, sets.read_set(setup, source, sets.TRAIN)


def test_the_known_losses_of_the_digits(digits):
    """Those of issue 17: 1.717, 0.587, 0.396 and 0.141, with a tenth of the labels dropped."""
    setup, train = digits
    known = measuring.baselines(setup, train.points, is_train=True)
    assert known["zero"].mean() == pytest.approx(1.717, abs=5e-4)
    assert known["affine"].mean() == pytest.approx(0.587, abs=5e-4)
    assert known["class_affine"].mean() == pytest.approx(0.396, abs=5e-4)
    measure = measuring.make_measure(setup, setup.init_params(), train.points)
    rows = [
        measuring.stratum_row(setup, measure, train.points, train.order, stratum)
        for stratum in range(20)
    ]
    error = np.sqrt(sum(row["memoriser_error"] ** 2 for row in rows)) / 20
    # 0.1400 +- 0.0003 from 160,000 draws.
    assert np.mean([row["memoriser"] for row in rows]) == pytest.approx(0.140, abs=3 * error)
    assert 0.001 < error < 0.004
    # A fresh network gives 0, and so the loss of the output zero.
    model_error = np.sqrt(sum(row["model_error"] ** 2 for row in rows)) / 20
    assert np.mean([row["model"] for row in rows]) == pytest.approx(1.717, abs=3 * model_error)


def test_the_affine_losses_without_and_with_labels(digits):
    setup, train = digits

    def with_labels(kind):
        config = dataclasses.replace(
            setup.config, excess=dataclasses.replace(setup.config.excess, labels=kind)
        )
        return measuring.baselines(set_up(config), train.points, is_train=True)

    dropped = measuring.baselines(setup, train.points, is_train=True)
    given = with_labels("data")
    assert given["class_affine"].mean() == pytest.approx(0.375, abs=1e-3)
    mixed = 0.9 * given["class_affine"] + 0.1 * given["affine"]
    np.testing.assert_allclose(dropped["class_affine"], mixed, rtol=1e-6)
    assert set(with_labels("null")) == {"zero", "affine"}
    assert set(measuring.baselines(setup, train.points, is_train=False)) == {"zero"}


class Perfect(Setup):
    """A setup whose network is the best possible one for the training set in `params`."""

    def network(self, params, x_bhwc, t_b, condition, layers=()):
        predict = optimal.optimal_predict(
            self.path, self.config.transport.prediction, params, condition, self.config.data.classes
        )
        return predict(x_bhwc, t_b)


@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("kind", prediction.PREDICTIONS)
def test_the_best_possible_network_has_no_excess(path, kind):
    config = load(
        transport__path=path, transport__prediction=kind, transport__train_eps=0.02,
        excess__labels="dropout", excess__strata=2, excess__draws=100,
    )  # fmt: skip
    setup, source = sets.open_split(config, "train")
    train = sets.read_set(setup, source, sets.TRAIN)
    perfect = Perfect(config, setup.mesh)
    measure = measuring.make_measure(perfect, train.points.blocks()[0], train.points)
    for stratum in (0, 1):
        row = measuring.stratum_row(perfect, measure, train.points, train.order, stratum)
        assert row["model"] == pytest.approx(row["memoriser"], rel=1e-3, abs=1e-5)
        assert row["memoriser"] > 1e-3 or stratum == 1


def test_labels_of_draws(digits):
    setup, train = digits

    def labels(kind):
        options = dataclasses.replace(setup.config.excess, labels=kind)
        changed = dataclasses.replace(setup.config, excess=options)
        return np.asarray(
            measuring._labels(set_up(changed), jnp.arange(899), train.points.labels_n)
        )

    np.testing.assert_array_equal(labels("data"), train.points.labels_n)
    assert (labels("null") == 10).all()
    dropped = labels("dropout")
    assert 0.05 < (dropped == 10).mean() < 0.15
    np.testing.assert_array_equal(dropped[dropped < 10], train.points.labels_n[dropped < 10])


# The points


def test_blocks_hold_every_point_once_sorted_by_label(digits, monkeypatch):
    _, train = digits
    monkeypatch.setattr(points_lib, "_BLOCK_ELEMENTS", 64 * 100)
    blocks = train.points.blocks()
    assert [len(block.label_n) for block in blocks] == [100] * 9
    labels = np.concatenate([block.label_n for block in blocks])
    means = np.concatenate([block.mean_nd for block in blocks])
    assert labels[899] == optimal.PADDING and (np.diff(labels[:899]) >= 0).all()
    order = np.argsort(train.points.labels_n, kind="stable")
    np.testing.assert_array_equal(means[:899], train.points.mean_nd[order])


def test_small_blocks_change_no_loss(digits, monkeypatch):
    setup, train = digits
    rows = np.arange(40)

    def losses():
        measure = measuring.make_measure(setup, setup.init_params(), train.points)
        return measure(train.points, rows, rows.astype(np.int32), 8)[1]

    one_block = losses()
    monkeypatch.setattr(points_lib, "_BLOCK_ELEMENTS", 64 * 50)
    np.testing.assert_allclose(losses(), one_block, rtol=1e-4, atol=1e-6)


def test_mirror_images_belong_to_the_set():
    setup, source = sets.open_split(load(data__flip=True), "train")
    train = sets.read_set(setup, source, sets.TRAIN)
    assert len(train.points) == 2 * 899 == len(train.order)
    images = train.points.mean_nd.reshape(2, 899, 8, 8)
    np.testing.assert_array_equal(images[0], images[1][..., ::-1])
    assert train.order[:4].tolist() == [0, 899, 1, 900]
    labels = train.points.labels_n
    np.testing.assert_array_equal(labels[:899], labels[899:])


def test_eigenvalues_from_the_gram_matrix_and_with_a_variance(digits):
    _, train = digits
    points = train.points
    few = dataclasses.replace(points, mean_nd=points.mean_nd[:30], labels_n=points.labels_n[:30])
    values = points_lib.covariance_eigenvalues(few)
    expected = np.linalg.eigvalsh(np.cov(few.mean_nd.astype(np.float64).T, bias=True))
    np.testing.assert_allclose(values, expected, atol=1e-10)
    std = np.linspace(0.1, 0.5, few.mean_nd.size, dtype=np.float32).reshape(30, 64)
    spread = dataclasses.replace(few, std_nd=std)
    covariance = np.cov(few.mean_nd.astype(np.float64).T, bias=True) + np.diag((std**2).mean(0))
    values = points_lib.covariance_eigenvalues(spread)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(covariance), rtol=1e-6)
    square = np.mean(few.mean_nd**2) + np.mean(std**2)
    assert spread.mean_square == pytest.approx(square, rel=1e-5)
    assert spread.digest != few.digest


def test_affine_maps_of_too_many_dimensions_are_left_out(digits, monkeypatch):
    setup, train = digits
    monkeypatch.setattr(points_lib, "_LARGEST_MATRIX", 63)
    assert set(measuring.baselines(setup, train.points, is_train=True)) == {"zero"}


# Stored latents


@pytest.fixture(scope="module")
def latents(quiet_machine, tmp_path_factory):
    """Return the folder of stored latents with a variance, and a run that was trained on them."""
    folder = tmp_path_factory.mktemp("latents")
    caches.write(folder / "data", caches.make_plan())
    config = ["--config", ROOT / "configs" / "latents.py"]
    settings = flags(
        model__depth=1, model__width=16, model__heads=2, model__patch=1,
        data__path=folder / "data", data__classes=2, data__image_size=4, data__channels=3,
        data__flip=True, latents__codec="stored", train__steps=2, train__batch=8,
        checkpoint__every=2, log__sheet_every=0, sample__solver="heun", sample__steps=2,
        sample__batch=4, mesh__data=-1, mesh__fsdp=1,
    )  # fmt: skip
    succeed(*config, *settings, "--workdir", folder / "run")
    return folder


def test_latents_are_gaussians_and_their_excess_is_known(latents):
    out = succeed(*arguments(latents / "run"))
    summary = summary_of(latents / "run")
    assert summary["train"]["images"] == 23 and summary["train"]["read"] == 46
    assert summary["train"]["difference"]["mean"] > 0
    # 23 posteriors with standard deviations near 1 overlap: no one can tell them apart.
    assert summary["train"]["memoriser"]["mean"] > 0.2
    affine = summary["train"]["affine"]
    assert summary["train"]["memoriser"]["mean"] < affine < summary["train"]["zero"]
    assert "median distance to the nearest training image" in out


def test_the_points_are_the_distribution_of_the_networks_input(latents):
    options = SourceOptions(str(latents / "data"), None, "all", 4, 3, None)
    source = open_latents(options)
    records = [source.read(i, mirrored) for mirrored in (False, True) for i in range(23)]
    batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
    config = config_lib.load(str(latents / "run" / "config.json"))
    setup = set_up(config)
    points = points_lib.read_points(setup, source, range(23))
    keys = jax.random.split(jax.random.key(0), 46)
    x = posterior.draw_stored(keys, batch).reshape(46, -1)
    noise = jax.vmap(lambda key: jax.random.normal(key, (4, 4, 3)))(keys).reshape(46, -1)
    np.testing.assert_allclose(points.mean_nd + points.std_nd * noise, x, rtol=1e-4, atol=1e-5)


def test_latents_without_a_variance_are_points(tmp_path, latents):
    caches.write(tmp_path / "data", caches.make_plan(variance=False, mirrored=False))
    config = config_lib.load(
        str(latents / "run" / "config.json"),
        [("data.path", str(tmp_path / "data")), ("data.flip", "False")],
    )
    setup, source = sets.open_split(config, "all")
    points = sets.read_set(setup, source, sets.TRAIN).points
    assert points.std_nd is None and np.isfinite(points.mean_nd).all()
    mirrored = dataclasses.replace(config, data=dataclasses.replace(config.data, flip=True))
    with pytest.raises(ValueError, match="stored without those of the mirror images"):
        points_lib.read_points(set_up(mirrored), source, range(23))


# Mistakes


def warning(*arguments):
    """Assert that main succeeds with one line on stderr; return it."""
    status, _, err = call(*arguments)
    assert status == 0, err
    assert err.startswith("warning: ") and err.count("\n") == 1, err
    return err


def test_a_test_split_that_is_the_training_split_is_a_warning(run_copy):
    err = warning(*arguments(run_copy, excess__test_split="train", excess__samples=0))
    assert "excess.test_split is 'train', which is the training split as well" in err


def test_another_split_than_the_trained_one_is_a_warning(run_copy):
    err = warning(*arguments(run_copy, excess__split="all", excess__samples=0))
    assert "the run was trained on split 'train', not 'all'" in err
    assert "set excess.split=train" in err


def image_set(name, *labels):
    """Return a set of black images of these labels."""
    points = points_lib.DataPoints(np.zeros((len(labels), 64)), None, np.array(labels), 0)
    return sets.PointSet(name, name, points, np.arange(len(labels)), len(labels))


@pytest.mark.parametrize("flip", [False, True])
def test_a_class_of_one_image_is_a_warning(capsys, flip):
    setup = set_up(load(data__flip=flip))
    sets.check_labels(setup, "abc", [image_set("train", *[0, 0, 1, 1, 2] * (1 + flip))])
    err = capsys.readouterr().err
    assert err.startswith("warning: 1 of 3 classes have only one image, such as 'c'")
    assert err.endswith("set excess.labels=null to compare without labels\n")
    without_labels = set_up(load(excess__labels="null"))
    sets.check_labels(without_labels, "abc", [image_set("train", 0, 1), image_set("test", 2)])
    sets.check_labels(setup, "abc", [image_set("train", *[0, 1] * 3)])
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_images_of_a_folder(tmp_path):
    data = tmp_path / "data"
    write_images(data, "a/0.png", "a/1.png", "b/0.png")
    train = flags(data__path=data, train__steps=1, log__sheet_every=0)
    succeed(*TINY, *FOLDER, *train, "--workdir", tmp_path / "run")
    excess = arguments(tmp_path / "run", excess__test_split="none", excess__samples=0)
    assert "1 of 2 classes have only one image, such as 'b'" in warning(*excess)
    assert set(summary_of(tmp_path / "run")) == {"train", "meaning"}
    (data / "a" / "1.png").write_bytes(b"not an image")
    assert "a/1.png' cannot be read" in refusal(*excess)
    settings = [("data.skip_unreadable", "True"), ("data.flip", "True")]
    config = config_lib.load(str(tmp_path / "run" / "config.json"), settings)
    readable = sets.read_set(*sets.open_split(config, "all"), sets.TRAIN)
    assert (readable.images, readable.points.unreadable, len(readable.points)) == (3, 1, 4)
    assert sorted(readable.points.labels_n.tolist()) == [0, 0, 1, 1]
    assert readable.order.tolist() == [0, 2, 1, 3]


@pytest.fixture
def split_without_a_class(monkeypatch):
    """Make the training split of the digits lose its 7s, and the test split its 3s."""
    original = sources.SOURCES["digits"].open

    def open_part(options):
        source = original(options)
        kept = source.labels != {"train": 7, "test": 3}[options.split]
        return ArraySource(source.images[kept], source.labels[kept], source.class_names)

    kind = sources.SourceKind(open_part, image_spec, needs_path=False, decodes=False)
    monkeypatch.setitem(sources.SOURCES, "digits", kind)


def test_a_class_that_the_training_split_lacks(split_without_a_class, run_copy):
    message = refusal(*arguments(run_copy))
    assert "split 'test' has images of class '7', of which split 'train' has none" in message
    assert "set excess.labels=null, or another excess.test_split" in message
    assert not (run_copy / "excess").exists()
    # A class that only the test split lacks is not missed.
    setup = set_up(load())
    sets.check_labels(setup, "abc", [image_set("train", *[0, 1] * 3), image_set("test", 0)])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"excess__split": "validation"}, "unknown data.split 'validation'"),
        ({"excess__labels": "none"}, "excess.labels"),
        ({"excess__draws": 1}, "excess.draws is 1; expected"),
        ({"excess__strata": 0}, "excess.strata is 0; expected"),
        ({"excess__draw": 5}, "unknown config key 'excess.draw'"),
    ],
)
def test_bad_settings(run_copy, settings, words):
    assert words in refusal(*arguments(run_copy, **settings))
    assert not (run_copy / "excess").exists()


def test_a_workdir_without_a_checkpoint(tmp_path):
    message = refusal("--config", DIGITS, *arguments(tmp_path / "new"))
    assert "has no checkpoints; train first" in message
    assert snapshot(tmp_path) == {}


def test_a_model_that_diverged(run_copy, monkeypatch):
    monkeypatch.setattr(
        measuring, "_model_losses", lambda setup, params, _, query: query.t_b * jnp.nan
    )
    message = refusal(*arguments(run_copy))
    assert "the model's loss is not finite in 20 of 20 draws of part 0 of the times" in message


def test_more_images_than_memory(digits, monkeypatch):
    setup, train = digits
    monkeypatch.setattr(points_lib.hosts, "memory", lambda: 1000)
    with pytest.raises(ValueError, match="the 899 images of 64 numbers take") as error:
        sets.read_set(setup, sets.open_split(setup.config, "train")[1], sets.TRAIN)
    assert "\n" not in str(error.value)
