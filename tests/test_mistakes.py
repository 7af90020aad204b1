"""Every user mistake ends main with one line and changes no file."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from sit_jax import sharding
from tests.commands import (
    DIGITS,
    FOLDER,
    ROOT,
    TINY,
    flags,
    refusal,
    rows,
    snapshot,
    succeed,
    write_images,
)

pytestmark = pytest.mark.usefixtures("quiet_machine")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode", "trian"], "unknown mode 'trian'; did you mean 'train'?"),
        (["--modes", "train"], "unknown flag '--modes'; see python -m sit_jax.main --help"),
        (["train"], "unknown flag 'train'; see python -m sit_jax.main --help"),
        (["--configs.seed=1"], "unknown flag '--configs.seed'"),
        (["--mode"], "argument --mode: expected one argument; see python -m sit_jax.main --help"),
        (["--config.seed"], "--config.seed has no value; expected --config.seed=VALUE"),
        (["--config.data.path=", "--config.seed=1"], "--config.data.path has no value; expected"),
        (["--config.data.path", "--config.seed=1"], "--config.data.path has no value; expected"),
        (flags(train__stpes=3), "unknown config key 'train.stpes'; did you mean 'train.steps'"),
        (flags(train__steps="many"), "train.steps is 'many'; expected a whole number"),
        (
            ["--config", "configs/no_such.py"],
            "--config 'configs/no_such.py' does not exist; expected a file such as",
        ),
        (flags(model__name="SiT-S/3"), "unknown model.name 'SiT-S/3'; did you mean 'SiT-S/"),
        (
            flags(transport__path="Lineal"),
            "unknown transport.path 'Lineal'; did you mean 'Linear'?",
        ),
        (
            flags(transport__prediction="x0"),
            "unknown transport.prediction 'x0'; known: 'velocity', 'score', 'noise'",
        ),
        (
            flags(transport__loss_weight="likely"),
            "unknown transport.loss_weight 'likely'; did you mean 'likelihood'?",
        ),
        (flags(sample__solver="rk4"), "unknown sample.solver 'rk4'"),
        (flags(data__source="digit"), "unknown data.source 'digit'; did you mean 'digits'?"),
        (flags(train__accumulation=3), "train.batch 8 is not divisible by train.accumulation 3"),
        (flags(data__image_size=10), "input size 10 is not divisible by the patch size 4"),
        (flags(data__image_size=16), "data.image_size=16, but the digits are 8x8; set it to 8"),
        (
            flags(data__classes=11),
            "data.classes is 11, but the digits source has 10 classes ('0', '1', '2', '3', '4', "
            "...); set data.classes=10",
        ),
        (flags(sample__labels="3,10"), "sample.labels holds 10; expected 0 to 9"),
        (flags(sample__cfg_scale=0.5), "sample.cfg_scale is 0.5; expected 1 to 1000"),
        (flags(train__steps=0), "train.steps is 0; expected 1 to 2,147,483,647"),
        (flags(sample__steps=-1), "sample.steps is -1; expected 1 to 1,000,000"),
        (
            flags(transport__train_eps=0.5),
            "transport.train_eps is 0.5; expected 1e-06 to 0.499",
        ),
        (
            flags(transport__sample_eps=0),
            "transport.sample_eps is 0.0; expected 1e-06 to 0.499",
        ),
        (flags(mesh__data=3), "mesh data x fsdp x tensor = 3 x 1 x 1 does not use"),
        (["--mode", "sample"], "has no checkpoints; train first, with --mode train"),
        (["--fork", "runs/fork"], "--workdir 'runs/new' has no checkpoints to fork from"),
        (["--profile", "3"], "--profile is '3'; expected two steps FIRST:LAST such as 100:110"),
        (["--profile", "3:2"], "--profile is '3:2'; expected two steps"),
        (["--profile", "0:2"], "--profile is '0:2'; expected two steps"),
        (["--profile", "a:b"], "--profile is 'a:b'; expected two steps"),
        (["--profile=-1:2"], "--profile is '-1:2'; expected two steps"),
        (["--profile=\u00b2:\u00b3"], "--profile is '\u00b2:\u00b3'; expected two steps"),
        (["--fork="], "--fork is empty; expected a new folder such as runs/fork"),
        (["--fork=", "--mode", "sample"], "--fork is for --mode train, not sample"),
        (["--minimum="], "--minimum is for --mode quality, not train"),
        (["--json="], "--json is for --mode preflight, not train"),
        (["--config="], "--config is empty; expected a file such as configs/digits.py"),
        (["--profile="], "--profile is ''; expected two steps"),
        (["--profile", "2:3", "--mode", "sample"], "--profile is for --mode train, not sample"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_flag_is_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(*TINY, "--workdir", "runs/new", *arguments)
    assert snapshot(tmp_path) == {}


def test_a_missing_workdir_flag_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "arguments are required: --workdir; see python -m sit_jax.main --help" in refusal(*TINY)
    assert "--workdir is empty; expected a folder such as runs/digits" in refusal(
        *TINY, "--workdir="
    )
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_a_workdir_without_a_run_needs_a_config(tmp_path, mode):
    words = "new' holds no run yet; give --config as well, such as --config configs/digits.py"
    assert words in refusal("--workdir", tmp_path / "new", "--mode", mode)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("below", ["file", "file/run", "file/runs/new"])
def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    message = refusal(*TINY, "--workdir", tmp_path / below)
    assert re.search(rf"'.*{below}' cannot be (written|used) \(.+\); give a folder", message)
    assert snapshot(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (
            None,
            "data.path='{data}' is not a folder; give a folder with a sub-folder for each class",
        ),
        (
            [],
            "data.path='{data}' has no sub-folders; put the images of each class into a sub-folder",
        ),
        (
            ["a.png", "b.png"],
            "data.path='{data}' holds 2 images but no class folders; put the images of each class",
        ),
        (
            ["a/0.png", "b/0.gif"],
            "data.path='{data}' has 1 class folders without images (.jpg, .jpeg, .png, .ppm, .bmp, "
            ".pgm, .tif, .tiff, .webp): 'b' (passed over: .gif (1)); fill or remove them",
        ),
        (
            ["a/0.png", "b/0.png", "c/0.png"],
            "data.classes is 2, but the folder source has 3 classes ('a', 'b', 'c'); set "
            "data.classes=3",
        ),
    ],
)
def test_a_bad_data_folder_is_one_line_and_writes_nothing(tmp_path, images, words):
    data = tmp_path / "data"
    if images is not None:
        data.mkdir()
        write_images(data, *images)
    before = snapshot(tmp_path)
    message = refusal(*TINY, *FOLDER, *flags(data__path=data), "--workdir", tmp_path / "new")
    assert words.format(data=data) in message
    assert snapshot(tmp_path) == before


def test_an_empty_data_path_is_one_line(tmp_path):
    message = refusal(*TINY, *FOLDER, "--workdir", tmp_path / "new")
    assert "data.path is empty, but data.source='folder' needs a folder" in message
    assert snapshot(tmp_path) == {}


def test_an_unreadable_image_is_named_and_may_be_skipped(tmp_path):
    data = tmp_path / "data"
    workdir = tmp_path / "run"
    write_images(data, "a/0.png", "a/1.png", "b/0.png")
    (data / "a" / "1.png").write_bytes((data / "a" / "0.png").read_bytes()[:40])
    before = snapshot(data)
    settings = flags(data__path=data, train__steps=1, log__sheet_every=0)
    arguments = [*TINY, *FOLDER, *settings, "--workdir", workdir]
    message = refusal(*arguments)
    assert f"image '{data}/a/1.png' cannot be read (" in message
    assert "remove it, or set data.skip_unreadable=True to skip such images" in message
    assert snapshot(data) == before
    assert not [path for path in workdir.rglob("*") if path.is_file()]

    # The remedy works in the same workdir.
    succeed(*arguments, "--config.data.skip_unreadable=True")
    # Each epoch has each of the 3 images once, so 2 or 3 of the batch's 8 rows are the broken one.
    assert [row["skipped_images"] for row in rows(workdir)] in ([2], [3])


def test_a_batch_not_divisible_by_the_devices_is_one_line(tmp_path):
    """Run in a separate process with three devices, which also shows its exit status and stderr."""
    process = subprocess.run(
        [sys.executable, "-m", "sit_jax.main", *TINY, "--workdir", str(tmp_path / "new")],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    words = (
        "train.batch / train.accumulation = 8 is not divisible by the 3 devices it is split over; "
        "make"
    )
    assert process.returncode == 2
    assert re.fullmatch(rf"error: {words}.*\n", process.stderr)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train__batch": 9}, "sample.batch = 8 is not divisible by the 3 devices"),
        (
            {"train__batch": 18, "train__accumulation": 9},
            "train.batch / train.accumulation = 2 is not divisible by",
        ),
    ],
)
def test_every_batch_must_be_divisible_by_the_devices(tmp_path, monkeypatch, settings, words):
    monkeypatch.setattr(sharding, "batch_shards", lambda mesh: 3)
    assert words in refusal(*TINY, *flags(**settings), "--workdir", tmp_path / "new")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("mode", ["train", "sample"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (flags(train__stpes=6), "unknown config key 'train.stpes'"),
        (flags(sample__labels="10"), "sample.labels holds 10; expected 0 to 9"),
        (flags(sample__cfg_scale=0), "sample.cfg_scale is 0.0; expected 1 to 1000"),
        (flags(train__steps=-6), "train.steps is -6; expected 1 to 2,147,483,647"),
        (
            flags(model__depth=2),
            "run in '{workdir}' is another one: model.depth is 2 but was 1 in "
            "checkpoint 4; keep its values, use",
        ),
        (
            flags(transport__path="GVP"),
            "run in '{workdir}' is another one: transport.path is 'GVP' but was 'Linear' in",
        ),
        (
            flags(seed=1, model__depth=2, transport__prediction="noise", data__flip=True),
            "is another one: {all} in checkpoint 4; keep its values, use another --workdir, or "
            "--fork NEWDIR for a new run from these",
        ),
        (
            ["--config", DIGITS],
            "is another one: model.depth is 4 but was 1, model.width is 128 but was 16, "
            "model.heads",
        ),
        (flags(mesh__data=3, train__steps=6), "mesh data x fsdp x tensor = 3 x 1 x 1 does not use"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_leaves_a_run_as_it_was(trained, mode, arguments, words):
    workdir, _ = trained
    before = snapshot(workdir)
    changed = ["model.depth is 2 but was 1", "transport.prediction is 'noise' but was 'velocity'"]
    if mode == "train":  # samples depend on neither of these
        changed = ["seed is 1 but was 0", *changed, "data.flip is True but was False"]
    words = words.format(workdir=workdir, all=", ".join(changed))
    assert words in refusal("--workdir", workdir, "--mode", mode, *arguments)
    assert snapshot(workdir) == before


def test_a_profile_of_finished_steps_is_one_line(trained):
    before = snapshot(trained[0])
    for steps in ("2:3", "7:8"):
        message = refusal("--workdir", trained[0], "--profile", steps, "--config.train.steps=6")
        assert (
            f"--profile starts at step {steps[0]}; expected one of 5 to 6, which are to be trained"
            in message
        )
    assert snapshot(trained[0]) == before


def test_missing_data_leaves_a_run_as_it_was(trained):
    before = snapshot(trained[0])
    settings = flags(data__path="/no/such", train__steps=6)
    assert "data.path='/no/such'" in refusal("--workdir", trained[0], *settings)
    assert snapshot(trained[0]) == before


@pytest.mark.parametrize("mode", [["--config.train.steps=6"], ["--mode", "sample"]])
@pytest.mark.parametrize(
    ("section", "name", "value", "was"),
    [
        ("model", "depth", 2, 1),
        ("transport", "path", "GVP", "Linear"),
        ("transport", "prediction", "noise", "velocity"),
        ("model", "qk_norm", True, False),
    ],
)
def test_an_edited_config_is_not_believed(run_copy, mode, section, name, value, was):
    values = json.loads((run_copy / "config.json").read_text())
    values[section][name] = value
    (run_copy / "config.json").write_text(json.dumps(values))
    before = snapshot(run_copy)
    words = f"{section}.{name} is {value!r} but was {was!r} in checkpoint 4; keep its values"
    assert words in refusal("--workdir", run_copy, *mode)
    assert snapshot(run_copy) == before


def test_a_run_without_checkpoints_cannot_be_sampled(run_copy):
    shutil.rmtree(run_copy / "checkpoints")
    before = snapshot(run_copy)
    assert "has no checkpoints; train first, with --mode train" in refusal(
        "--workdir", run_copy, "--mode", "sample"
    )
    assert snapshot(run_copy) == before

    (run_copy / "checkpoints").mkdir()
    before = snapshot(run_copy)
    assert "holds no complete checkpoint; train first" in refusal(
        "--workdir", run_copy, "--mode", "sample"
    )
    assert snapshot(run_copy) == before


def test_a_damaged_recorded_config_is_one_line(run_copy):
    (run_copy / "config.json").write_text('{"seed": 0')
    before = snapshot(run_copy)
    assert "config.json cannot be read as a recorded config" in refusal("--workdir", run_copy)
    assert snapshot(run_copy) == before


def test_an_empty_fork_leaves_the_source_run_alone(trained):
    before = snapshot(trained[0])
    message = refusal("--workdir", trained[0], "--fork", "", "--config.train.steps=5")
    assert "--fork is empty; expected a new folder" in message
    assert snapshot(trained[0]) == before
