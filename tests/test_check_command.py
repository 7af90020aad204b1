"""sit_jax.check_command: what cannot start on the devices of another machine is refused here."""

import subprocess
import sys

import jax
import pytest

from sit_jax import check_command
from sit_jax import config as config_lib
from sit_jax.errors import UserError
from tests.caches import make_plan, write
from tests.commands import DIGITS, ROOT, flags

LATENTS = ["--config", "configs/latents.py", "--workdir", "gs://bucket/run"]
IMAGES = ["--config", "configs/imagenet.py", "--workdir", "gs://bucket/run"]
COPY = "--config.data.path=~/sit_data/bucket/latents"
# Settings for the cache of `make_plan`.
SMALL = flags(
    data__image_size=4, data__channels=3, data__classes=2, model__patch=2, latents__codec="stored",
    latents__scale=1.0, sample__cfg_scale=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Run where configs/ is."""
    monkeypatch.chdir(ROOT)


def checked(arguments, count=16, **options):
    """Return the line of a command on so many devices: one of the CPU, as often."""
    devices = jax.devices("cpu")[:1] * count
    return check_command.check_command([str(word) for word in arguments], devices, **options)


def remote(arguments, count=16, **options):
    return checked(arguments, count, elsewhere=True, brings_data=COPY in arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "count", "line"),
    [
        ([*LATENTS, COPY], 16, "data 1 x fsdp 16 x tensor 1, input 32x32x4"),
        ([*LATENTS, COPY, *flags(mesh__tensor=2)], 16, "data 1 x fsdp 8 x tensor 2, input 32x32x4"),
        ([*IMAGES, COPY], 64, "data 64 x fsdp 1 x tensor 1, input 32x32x4"),
        ([*IMAGES[:1], "configs/imagenet.py:SiT-S/8,512", *IMAGES[2:], COPY], 8, "input 64x64x4"),
    ],
)
def test_a_command_that_can_start_is_described(arguments, count, line):
    answer = remote(arguments, count)
    assert answer.startswith(f"train on {count} devices, ") and line in answer


def test_data_in_the_config_or_the_bucket_need_no_copy():
    digits = ["--config", DIGITS, "--workdir", "gs://bucket/run"]
    sizes = flags(train__batch=16, sample__batch=16)
    assert "input 8x8x1" in remote([*digits, *sizes])
    assert "train on 4 devices" in remote([*LATENTS, "--config.data.path=gs://bucket/x"], 4)


def test_encoding_has_a_mesh_of_its_own():
    encode = [*IMAGES, COPY, "--mode", "encode", *flags(mesh__data=1, mesh__fsdp=7)]
    assert remote(encode).startswith("encode on 16 devices, data 16 x fsdp 1 x tensor 1, ")


@pytest.mark.parametrize(
    ("arguments", "count", "expected"),
    [
        (LATENTS, 16, "data.path is empty, but data.source='latents' needs a folder"),
        (IMAGES, 16, "data.path is empty, but data.source='folder' needs a folder"),
        (
            [*IMAGES, "--config.data.path=/data/train"],
            16,
            "data.path '/data/train' is a folder of this machine, and the command runs on others; "
            "copy it to a bucket and give --data gs://BUCKET/FOLDER --mount before --",
        ),
        (
            [*LATENTS, "--config.data.path=/data/latents"],
            16,
            "copy it to a bucket and give --data gs://BUCKET/FOLDER before --",
        ),
        (
            [*IMAGES, "--config.data.path=gs://bucket/train"],
            16,
            "mount the bucket: --data gs://bucket/train --mount before --",
        ),
        (
            [*IMAGES, COPY, "--config.latents.path=/vae"],
            16,
            "latents.path '/vae' is a folder of this machine",
        ),
        ([*LATENTS, COPY, "--fork", "runs/b"], 16, "--fork 'runs/b' is a folder of this machine"),
        ([*LATENTS, COPY], 12, "train.batch / train.accumulation = 256 is not divisible by the 12"),
        (
            [*LATENTS, COPY, *flags(mesh__data=-1, mesh__fsdp=5)],
            16,
            "mesh data x fsdp x tensor = -1 x 5 x 1 does not use 16 devices",
        ),
        ([*LATENTS, COPY], 256, "mesh.fsdp = 256 does not divide the model's 1152 channels"),
        (
            [*LATENTS, COPY, *flags(mesh__tensor=5)],
            20,
            "mesh.tensor = 5 does not divide the model's 16 heads",
        ),
        ([*LATENTS, COPY, "--config.data.channels=3"], 16, "the latents of this VAE have 4"),
        ([*IMAGES, COPY, "--config.data.image_size=250"], 16, "one cell of this VAE is 8 pixels"),
        ([*LATENTS, COPY, "--config.model.patch=3"], 16, "patch"),
        ([*LATENTS, COPY, "--config.train.label_dropout=0"], 16, "no null label is trained"),
        ([*LATENTS, COPY, "--config.train.stps=1"], 16, "unknown config key 'train.stps'"),
        ([*LATENTS, COPY, "--config.train.batch=0"], 16, "train.batch is 0"),
        ([*LATENTS, COPY, "--stps=1"], 16, "unknown flag '--stps'"),
        ([*LATENTS, COPY, "--help"], 16, "--help and --help-config only print"),
        (
            ["--config", DIGITS, "--mode", "preflight", "--topology", "v5e:4x4"],
            16,
            "--mode preflight needs no accelerator",
        ),
        (
            ["--config", DIGITS, "--mode", "sample", *LATENTS[2:]],
            16,
            "sample.batch = 100 is not divisible by the 16 devices",
        ),
        (
            ["--config", DIGITS, "--mode", "likelihood", *LATENTS[2:], "--out", "here"],
            16,
            "--out 'here' is a folder of this machine",
        ),
        (
            ["--config", DIGITS, "--mode", "likelihood", *LATENTS[2:]],
            7,
            "likelihood.batch = 128 is not divisible by the 7 devices",
        ),
        (["--config", "configs/none.py", *LATENTS[2:]], 16, "'configs/none.py' does not exist"),
        (["--workdir", "gs://bucket/run"], 16, "or give --config as well, so that it can be"),
    ],
)
def test_a_command_that_cannot_start_is_refused(arguments, count, expected, capsys):
    with pytest.raises(UserError) as error:
        remote(arguments, count)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def test_stored_latents_must_be_those_of_the_config(tmp_path):
    cache = tmp_path / "cache"
    write(cache, make_plan(mirrored=False))
    arguments = [*LATENTS, COPY, *SMALL, "--config.data.flip=false"]
    assert remote(arguments, manifest=str(cache)).endswith("input 4x4x3, 23 latents")
    for change, expected in [
        ("data.image_size=8", "data.image_size=8, but the latents in '.*' are 4x4"),
        ("data.channels=4", "data.channels=4, but the latents in '.*' have 3"),
        ("data.classes=3", "data.classes is 3, but the latents source has 2 classes"),
        ("data.flip=true", "stored without those of the mirror images"),
        ("data.source=digits", "data.source is 'digits'; give a config such as configs/latents.py"),
    ]:
        with pytest.raises(UserError, match=expected):
            remote([*arguments, f"--config.{change}"], manifest=str(cache))
        remote(arguments, manifest=str(cache))


def test_on_shared_storage_the_data_itself_is_looked_at(tmp_path):
    write(tmp_path / "cache", make_plan())
    run = ["--config", "configs/latents.py", "--workdir", tmp_path / "run", *SMALL]
    assert "23 latents" in checked([*run, f"--config.data.path={tmp_path}/cache"])
    with pytest.raises(UserError, match="data.path '/none' does not exist"):
        checked([*run, "--config.data.path=/none"])
    with pytest.raises(UserError, match="needs a folder"):
        checked(run)
    with pytest.raises(UserError, match="holds no run yet; give --config as well"):
        checked(["--workdir", tmp_path / "run"])


def test_a_recorded_config_is_checked_too(tmp_path):
    (tmp_path / "run").mkdir()
    config = config_lib.load(DIGITS, [("train.batch", "8"), ("sample.batch", "8")])
    (tmp_path / "run" / "config.json").write_text(config_lib.to_json(config))
    run = ["--workdir", tmp_path / "run"]
    assert "train on 4 devices" in checked(run, 4)
    with pytest.raises(UserError, match="= 8 is not divisible by the 5"):
        checked(run, 5)
    with pytest.raises(UserError, match="= 6 is not divisible by the 4"):
        checked([*run, "--mode", "sample", "--config.sample.batch=6"], 4)


def test_the_command_line_prints_one_line_and_its_status():
    """In processes of their own, since jax makes its devices once."""

    def run(count, *arguments):
        command = [sys.executable, "-m", "sit_jax.check_command", "--elsewhere", "--brings_data"]
        return subprocess.run(
            [*command, "--devices", str(count), "--", *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    done = run(96, *LATENTS, COPY, *flags(train__batch=192, sample__batch=192))
    line = "train on 96 devices, data 1 x fsdp 96 x tensor 1, input 32x32x4\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, line, "")
    done = run(0, *LATENTS, COPY)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: 0 devices; expected 1 to 16,384\n"
