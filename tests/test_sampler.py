"""The sampler through main: devices, frames, grids, autoguidance, inversion and sweeps."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from sit_jax import checkpoint
from sit_jax import config as config_lib
from sit_jax.jobs.sampler import sampler_settings
from sit_jax.jobs.setup import Setup, set_up
from sit_jax.jobs.workdir import Weights
from sit_jax.laws import declared
from sit_jax.settings import Config
from tests.commands import TINY, flags, pictures, refusal, snapshot, succeed
from tests.processes import run_python

pytestmark = pytest.mark.usefixtures("quiet_machine")


def sample_on(devices):
    """Run sample_on_devices.py on as many CPU devices; return its samples by mesh and solver."""
    return json.loads(run_python("tests/sample_on_devices.py", devices=devices).splitlines()[-1])


def pixels_of(images):
    return np.stack([np.frombuffer(bytes.fromhex(image), np.float32) for image in images])


@pytest.mark.slow
def test_samples_of_eight_devices_are_those_of_one():
    one = sample_on(1)["data"]
    eight = sample_on(8)
    assert set(eight) == {"data", "fsdp"}
    # Bitwise equal, given an equal number of samples on each device.
    assert eight["data"] == one
    for solver, samples in eight["fsdp"].items():
        np.testing.assert_allclose(pixels_of(samples), pixels_of(one[solver]), atol=2e-6)


def only_folder(parent):
    (folder,) = parent.iterdir()
    return folder


def sample(workdir, **settings):
    """Draw samples from scratch; return their folder."""
    settings = {"sample__count": 3, "sample__batch": 3} | settings
    shutil.rmtree(workdir / "samples", ignore_errors=True)
    succeed("--workdir", workdir, "--mode", "sample", *flags(**settings))
    return only_folder(workdir / "samples")


@pytest.mark.parametrize("solver", ["heun", "euler-maruyama"])
def test_frames_are_strips_that_end_in_the_sample(run_copy, solver):
    folder = sample(run_copy, sample__frames=4, sample__solver=solver, sample__steps=6)
    samples = pictures(folder)
    strips = {path.name: np.asarray(Image.open(path)) for path in (folder / "frames").iterdir()}
    assert samples.keys() == strips.keys() and len(samples) == 3
    for name, strip in strips.items():  # frames of 3 x 8 pixels, with gaps of 2
        cells = [strip[2:26:3, 2 + 26 * frame : 26 + 26 * frame : 3] for frame in range(4)]
        np.testing.assert_array_equal(cells[-1], samples[name])
        assert cells[0].std() > 40  # noise


@pytest.mark.parametrize(
    ("frames", "key", "differ"),
    [(4, "scale", True), (None, "scale", False), (4, "columns", False), (4, "count", False)],
)
def test_settings_that_change_no_file_are_not_recorded(frames, key, differ):
    weights = Weights(4, None, "digest", {})

    def settings(value):
        values = config_lib.default().to_dict()
        values["sample"] |= {"frames": frames, key: value}
        return sampler_settings(set_up(config_lib.from_values(values)), weights, None)

    assert (settings(1) != settings(3)) == differ


def test_a_custom_grid_changes_samples_unless_it_equals_the_uniform_one(run_copy):
    plain = pictures(sample(run_copy, sample__steps=2))
    same = pictures(sample(run_copy, sample__steps="none", sample__times="0,0.5,1"))
    other = pictures(sample(run_copy, sample__steps="none", sample__times="0,0.9,1"))
    for name, image in plain.items():
        assert np.abs(image.astype(int) - same[name]).max() <= 1
    assert any((image != other[name]).any() for name, image in plain.items())


def change(config, key):
    """Return the config with another value of this setting, which need not be a valid one."""
    section, _, name = key.partition(".")
    changed = dataclasses.replace(getattr(config, section), **{name: "another"})
    return dataclasses.replace(config, **{section: changed})


IMAGE_KEYS = [
    *(entry.key for entry in declared(Config) if entry.key.startswith(("sample.", "transport."))),
    "precision.compute",
    "precision.matmul",
]
IMAGE_KEYS.remove("sample.labels_file")  # whose contents count; see test_sample_files.py


@pytest.mark.parametrize("key", IMAGE_KEYS)
def test_every_setting_that_changes_an_image_is_in_the_settings_of_its_folder(key):
    config = Config()
    weights = Weights(4, {}, "0123", {})
    settings = sampler_settings(Setup(config, None), weights, None)
    changed = sampler_settings(Setup(change(config, key), None), weights, None)
    no_image = {
        "sample.checkpoint",  # the digest says which
        "sample.count",
        "sample.batch",
        "sample.microbatch",
        "sample.format",
        "sample.columns",
        "sample.scale",
    }
    assert (changed == settings) == (key in no_image)


@pytest.fixture(scope="module")
def weak(trained, tmp_path_factory):
    """Return the workdir of a run on the same data with a smaller network."""
    workdir = tmp_path_factory.mktemp("weak") / "run"
    succeed(*TINY, *flags(model__width=8, train__steps=2, log__sheet_every=0), "--workdir", workdir)
    return workdir


def test_autoguidance_leads_away_from_another_run(run_copy, weak):
    settings = {
        "sample__cfg_scale": 3,
        "sample__cfg_channels": "none",
        "sample__steps": 1,
        "sample__solver": "euler",
    }
    unguided = settings | {"sample__cfg_scale": 1}
    ours = pictures(sample(run_copy, **unguided))
    plain = pictures(sample(run_copy, **settings))
    folder = sample(run_copy, **settings, sample__guide=weak)
    assert json.loads((folder / "settings.json").read_text())["guide"]["step"] == 2
    guided = pictures(folder)
    assert any((guided[name] != plain[name]).any() for name in ours)
    # One Euler step is linear in the velocity, so the guided image is 3 times this run's unguided
    # image minus 2 times the weak run's.
    theirs = pictures(sample(weak, **unguided))
    for name, image in guided.items():
        expected = np.clip(3.0 * ours[name] - 2.0 * theirs[name], 0, 255)
        inside = (ours[name] > 0) & (ours[name] < 255) & (theirs[name] > 0) & (theirs[name] < 255)
        assert inside.mean() > 0.3
        # Pixels are truncated to integers, and the sum multiplies that error by 3 and by 2.
        assert np.abs(expected - image)[inside].max() <= 5


def test_images_go_to_noise_and_back(run_copy):
    settings = flags(
        sample__solver="dopri5",
        sample__steps="none",
        sample__rtol=1e-4,
        sample__count=5,
        sample__batch=4,
    )
    out = succeed("--workdir", run_copy, "--mode", "invert", *settings)
    folder = only_folder(run_copy / "inversions")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["images"] == 5 and summary["round_trip_rms"]["largest"] < 1e-3
    assert "round trip: RMS error" in out and (folder / "sheet.png").exists()
    entry = np.load(folder / "000004.npz")
    assert entry["noise"].shape == (8, 8, 1) and np.isfinite(entry["noise"]).all()
    for pair in pictures(folder).values():
        image = pair[2:10, 2:10].astype(int)
        round_trip = pair[2:10, 12:20]
        assert image.std() > 40 and np.abs(image - round_trip).max() <= 1
    before = snapshot(folder)
    (folder / "images" / "000002.png").unlink()
    out = succeed("--workdir", run_copy, "--mode", "invert", *settings)
    assert "inverting 1 of 5 images" in out
    assert snapshot(folder) == before


def test_a_sweep_writes_a_table_and_a_plot_and_resumes(run_copy):
    settings = {
        "sweep__solvers": "heun,dopri5,sra1",
        "sweep__steps": "2",
        "sweep__rtols": 0.5,
        "sweep__forms": "sigma,SBDM",
        "sweep__cfg_scales": "1,2",
        "sweep__count": 8,
        "sweep__components": 4,
    }
    arguments = ["--workdir", run_copy, "--mode", "sweep"]
    assert "2 of 2 samplers" in succeed(*arguments, *flags(**settings | {"sweep__solvers": "heun"}))
    folder = only_folder(run_copy / "sweeps")
    first = (folder / "results.jsonl").read_bytes()
    # A killed job leaves an incomplete last line.
    (folder / "results.jsonl").write_bytes(first + b'{"solver": "he')
    out = succeed(*arguments, *flags(**settings))
    assert "6 of 8 samplers" in out and (folder / "results.jsonl").read_bytes().startswith(first)
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    by_name = {
        (row["solver"], row["steps"], row["diffusion_form"], row["cfg_scale"]): row for row in rows
    }
    assert by_name["heun", 2, None, 2.0]["evaluations"] == 4
    assert by_name["heun", 2, None, 2.0]["networks"] == 8
    assert by_name["sra1", 2, "SBDM", 1.0]["evaluations"] == 5
    assert by_name["dopri5", None, None, 1.0]["rtol"] == 0.5
    for row in rows:
        assert 0 <= row["agreement"] <= 1 and row["frechet"] > 0 and row["seconds"] > 0
    lines = (folder / "table.csv").read_text().splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("step,weights,solver,steps,rtol,diffusion_form,cfg_scale,cfg_first")
    markdown = (folder / "table.md").read_text()
    assert "best Frechet distance" in out and "best label agreement" in out
    assert len(markdown.splitlines()) == 10 and markdown in out
    assert Image.open(folder / "plot.png").size[0] > 1000
    # A sweep over finished samplers computes nothing, and its table has only their rows.
    assert "0 of 2 samplers" in succeed(*arguments, *flags(**settings | {"sweep__solvers": "heun"}))
    assert len((folder / "table.csv").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_sweep_compares_checkpoints_weights_and_guidance_intervals(run_copy):
    settings = {
        "sweep__solvers": "heun",
        "sweep__steps": "2",
        "sweep__cfg_scales": "1,2",
        "sweep__cfg_intervals": "0,1,0.2,0.8",
        "sweep__checkpoints": "2,4",
        "sweep__weights": "ema,raw",
        "sweep__count": 8,
        "sweep__components": 4,
    }
    arguments = ["--workdir", run_copy, "--mode", "sweep", *flags(**settings)]
    out = succeed(*arguments)
    # Without guidance an interval changes nothing.
    assert "12 of 12 samplers, 8 images each, from ema and raw weights of step 2, 4" in out
    folder = only_folder(run_copy / "sweeps")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    names = ("step", "weights", "cfg_scale", "cfg_first", "cfg_last")
    assert {tuple(row[name] for name in names) for row in rows} == {
        (step, weights, *guidance)
        for step in (2, 4)
        for weights in ("ema", "raw")
        for guidance in ((1, None, None), (2, 0, 1), (2, 0.2, 0.8))
    }
    assert len({row["frechet"] for row in rows}) == 12
    assert "0 of 12 samplers" in succeed(*arguments)
    # Each row is that of a sweep over its own weights.
    one = {"sweep__checkpoints": "()", "sweep__weights": "()", "sweep__cfg_scales": "2"}
    one |= {"sample__checkpoint": 2, "sample__weights": "raw", "sweep__cfg_intervals": "0,1"}
    succeed(*arguments, *flags(**one), "--out", run_copy / "one")
    folder = only_folder(run_copy / "one" / "sweeps")
    (row,) = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    (same,) = (r for r in rows if all(r[name] == row[name] for name in names))
    assert same | {"seconds": 0} == row | {"seconds": 0}


def test_a_sweep_measures_a_value_that_is_given_twice_once(run_copy):
    settings = {
        "sweep__solvers": "euler,euler", "sweep__steps": "2,2", "sweep__cfg_scales": "1,1",
        "sweep__checkpoints": "4,4", "sweep__count": 8, "sweep__components": 4,
    }  # fmt: skip
    assert "1 of 1 samplers" in succeed(
        "--workdir", run_copy, "--mode", "sweep", *flags(**settings)
    )


def test_a_sweep_in_the_features_of_its_config_takes_a_reference(run_copy, tmp_path):
    arguments = ["--workdir", run_copy, "--mode", "sweep"]
    reference = ["--reference", tmp_path / "real.npz"]
    assert "sweep.features=pixels compares with" in refusal(*arguments, *reference)
    config = json.loads((run_copy / "config.json").read_text())
    config["sweep"]["features"] = "inception"
    config["evaluate"]["inception"] = "none.safetensors"
    (run_copy / "config.json").write_text(json.dumps(config))
    assert "real.npz' does not exist" in refusal(*arguments, *reference)
    message = refusal(*arguments, *reference, *flags(sweep__count=3))
    assert "sweep.count is 3; expected 4 or more" in message


def test_rows_of_an_earlier_sweep_are_kept(run_copy):
    settings = {
        "sweep__solvers": "heun", "sweep__steps": "2", "sweep__cfg_scales": "1,2",
        "sweep__count": 8, "sweep__components": 4,
    }  # fmt: skip
    arguments = ["--workdir", run_copy, "--mode", "sweep", *flags(**settings)]
    succeed(*arguments)
    results = only_folder(run_copy / "sweeps") / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    new = ("step", "weights", "cfg_first", "cfg_last")
    old = [{name: value for name, value in row.items() if name not in new} for row in rows]
    results.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert "0 of 2 samplers" in succeed(*arguments)
    assert "1,ema" not in results.with_name("table.csv").read_text()
    assert results.with_name("table.csv").read_text().count("4,ema,heun") == 2


@pytest.mark.parametrize(
    ("mode", "settings", "words"),
    [
        (
            "sample",
            {"sample__times": "0,0.5,1"},
            "sample.times and sample.steps are both given; set sample.steps=none",
        ),
        (
            "sample",
            {"sample__steps": "none", "sample__times": "0,0.5"},
            "sample.times is (0.0, 0.5); expected fractions of the way from noise to data that "
            "rise from 0 to 1",
        ),
        ("sample", {"sample__frames": 1}, "sample.frames is 1; expected 2 to 10,000"),
        (
            "sample",
            {"sample__cfg_interval": "0.5,0.5"},
            "sample.cfg_interval is (0.5, 0.5); expected two times with 0",
        ),
        (
            "sample",
            {"sample__last_step_size": 1},
            "sample.last_step_size is 1.0; expected 1e-06 to 0.999",
        ),
        ("sample", {"sample__steps": 0}, "sample.steps is 0; expected 1 to 1,000,000"),
        (
            "sample",
            {"sample__solver": "shark", "sample__steps": "none"},
            "'shark' needs sample.steps, such as 250",
        ),
        (
            "sample",
            {"sample__guide": "runs/none", "sample__cfg_scale": 2},
            "'runs/none' is not a run; give a trained",
        ),
        (
            "sample",
            {"sample__guide": "runs/none", "sample__cfg_scale": 1},
            "cfg_scale is 1, which turns guidance off",
        ),
        (
            "invert",
            {"sample__solver": "sra1"},
            "'sra1' solves an SDE, which cannot be run backwards; give one of an",
        ),
        ("sweep", {"sweep__solvers": "heun,rk4"}, "unknown sweep.solvers 'rk4'"),
        ("sweep", {"sweep__forms": "sigmas"}, "unknown sweep.forms 'sigmas'; did you mean 'sigma'"),
        ("sweep", {"sweep__steps": "5,0"}, "sweep.steps holds 0; expected 1 to 1,000,000"),
        (
            "sweep",
            {"sweep__cfg_scales": "0.5"},
            "sweep.cfg_scales holds 0.5; expected 1 to 1000",
        ),
        (
            "sweep",
            {"sweep__cfg_intervals": "0,0.5,0.7"},
            "sweep.cfg_intervals is (0.0, 0.5, 0.7); expected pairs of times",
        ),
        ("sweep", {"sweep__checkpoints": "3"}, "it is not among those saved (2, 4)"),
        ("sample", {"sample__checkpoint": "3"}, "it is not among those saved (2, 4)"),
        (
            "sweep",
            {"sweep__count": 1},
            "sweep.count is 1; expected 2 to 10,000,000",
        ),
    ],
)
def test_a_mistake_is_one_line_and_changes_no_file(trained, mode, settings, words):
    before = snapshot(trained[0])
    assert words in refusal("--workdir", trained[0], "--mode", mode, *flags(**settings))
    assert snapshot(trained[0]) == before


def test_a_run_of_other_data_cannot_guide(run_copy, weak, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(weak, other)
    config = json.loads((other / "config.json").read_text())
    config["transport"]["path"] = "GVP"
    (other / "config.json").write_text(json.dumps(config))
    flag = flags(sample__guide=other, sample__cfg_scale=2)
    words = "cannot guide this run: transport.path is 'GVP' there and 'Linear' here"
    assert words in refusal("--workdir", run_copy, "--mode", "sample", *flag)


def test_asking_for_the_ema_of_a_checkpoint_without_one_is_one_line(tmp_path, run_copy):
    shutil.rmtree(run_copy / "checkpoints")
    setup = set_up(config_lib.load(str(run_copy / "config.json")))
    with checkpoint.Checkpoints(run_copy / "checkpoints", ["params"]) as checkpoints:
        checkpoints.save(4, {"params": jax.jit(setup.init_params)()}, {})
    words = "checkpoint 4 holds no EMA, only params; set sample.weights=raw"
    assert words in refusal("--workdir", run_copy, "--mode", "sample")
    assert sample(run_copy, sample__weights="raw").name.startswith("step4-raw")
