"""Whatever fails outside the program ends main with one line: paths, files, devices and memory."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from convert import cli
from sit_jax import api, config, main, report, runtime, storage
from sit_jax.errors import UserError
from sit_jax.jobs.job import Job
from tests.commands import DIGITS, FOLDER, ROOT, TINY, call, flags, refusal, snapshot, succeed

pytestmark = pytest.mark.usefixtures("quiet_machine")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder; the current folder is another one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_leading_tilde_is_the_home_folder_wherever_a_path_is_given(home, trained):
    small = flags(train__steps=1, log__sheet_every=0, checkpoint__every=1)
    (home / "c.py").write_text(pathlib.Path(DIGITS).read_text())
    succeed(*TINY, *small, "--config", "~/c.py", "--workdir", "~/runs/a")
    succeed("--workdir", "~/runs/a", "--fork", "~/runs/b", *small)
    assert sorted(path.name for path in (home / "runs").iterdir()) == ["a", "b"]
    assert api.load("~/runs/b").step == 1
    assert snapshot(pathlib.Path.cwd()) == {}
    sample = ("--mode", "sample", *flags(sample__guide="~/none", sample__cfg_scale=2))
    assert f"sample.guide '{home}/none' is not a run" in refusal("--workdir", "~/runs/a", *sample)
    assert f"data.path='{home}/x' is not a folder" in refusal(
        *TINY, *FOLDER, *flags(data__path="~/x"), "--workdir", "w"
    )
    recorded = config.load(DIGITS, [("latents.path", "~/vae")])
    assert recorded.latents.path == f"{home}/vae"
    assert f'"path": "{home}/vae"' in config.to_json(recorded)


def test_a_converter_expands_its_paths_and_refuses_empty_ones(home):
    parser = cli.parser("x", "")
    parser.add_argument("checkpoint")
    parser.add_argument("--out")
    parser.add_argument("--count", type=int)
    parsed = parser.parse_args(["~/a.pt", "--out=~/b", "--count=3"])
    assert (parsed.checkpoint, parsed.out, parsed.count) == (f"{home}/a.pt", f"{home}/b", 3)
    for arguments, words in (
        (["a.pt", "--out="], "out is empty; expected a path"),
        ([""], "checkpoint is empty; expected a path"),
        (["$HOME/a.pt"], "checkpoint is '\\$HOME/a.pt', which does not exist: a \\$VARIABLE"),
    ):
        with pytest.raises(UserError, match=words):
            parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir", "$HOME/x"], "--workdir is '$HOME/x', which does not exist: a $VARIABLE is"),
        (["--workdir", "w", "--fork=$NEW"], "--fork is '$NEW', which does not exist"),
        (["--workdir", "w", "--config=$X/c.py"], "--config is '$X/c.py', which does not exist"),
        (["--workdir", "w", "--config.data.path=/data/$SET"], "data.path is '/data/$SET', which"),
        (["--workdir", "w", "--config.sweep.solvers=euler,,heun"], "unknown sweep.solvers ''"),
        (["--workdir", "~nobody-here/x"], "'~nobody-here' is not a user of this machine"),
        (["--workdir", "gs://b/x"], "--workdir 'gs://b/x' cannot be read (ImportError: Please ins"),
        (["--workdir", "w", "--fork", "s3://b/x"], "--fork 's3://b/x' cannot be read (ImportErro"),
        (["--workdir", "foo://b/x"], "unknown kind of path in --workdir 'foo://'; "),
        (["--workdir", "w", "--config", "s3://b/c.json"], "--config 's3://b/c.json' cannot be re"),
        (["--workdir", "w", "--config=none.json"], "--config 'none.json' does not exist"),
        (["--profile", "9" * 5000 + ":3", "--workdir", "w"], "expected two steps FIRST:LAST"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line_and_makes_no_folder(home, arguments, words):
    assert words in refusal(*TINY, *arguments)
    assert snapshot(home.parent) == {"home": None, "here": None}


def test_a_folder_may_be_named_with_a_dollar(home):
    pathlib.Path("$a").mkdir()
    assert storage.expand("x", "$a/new") == "$a/new"
    assert storage.expand("x", "gs://b/$a") == "gs://b/$a"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import sys; sys.exit(0)", "c.py cannot be used as a config: SystemExit: 0"),
        ("exit()", "c.py cannot be used as a config: SystemExit"),
        ("raise GeneratorExit", "c.py cannot be used as a config: GeneratorExit"),
        ("return None", "c.py cannot be used as a config: AttributeError"),
        ("def f(): f()\n f()", "c.py cannot be used as a config: RecursionError"),
    ],
)
def test_a_config_file_that_does_not_return_a_config_is_one_line(home, body, words):
    pathlib.Path("c.py").write_text(f"def get_config():\n {body}\n")
    assert words in refusal("--config", "c.py", "--workdir", "w")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("latents.py:1024", "latents.py with the variant '1024' cannot be used as a config: Value"),
        ("latents.py:1024", "the variant is '1024'; expected one of 256, 512, 3B"),
        ("imagenet.py:SiT-XL/2", "the argument is 'SiT-XL/2'; expected a size and 256 or 512"),
        ("latents.py:", "latents.py:' has an empty variant; leave out the colon, or name one"),
        ("digits.py:big", "digits.py has no variants; give --config"),
    ],
)
def test_a_wrong_variant_is_named_with_what_is_expected(tmp_path, spec, words):
    message = refusal("--config", f"{ROOT}/configs/{spec}", "--workdir", tmp_path / "w")
    assert words in message


@pytest.mark.parametrize(
    "text",
    [
        '{"seed": ' * 100_000,
        "[" * 100_000,
        '{"seed": 1',
        '{"seed": Infinity}',
        '{"zz": 1}',
        '{"train": 5}',
        '{"train": {"steps": ' + "9" * 5000 + "}}",
    ],
    ids=["deep", "deep list", "cut", "inf", "key", "section", "digits"],
)
def test_a_broken_recorded_config_is_named_and_not_needed_beside_a_config(run_copy, text):
    """The checkpoint has recorded the config as well, and decides."""
    (run_copy / "config.json").write_text(text)
    before = snapshot(run_copy)
    message = refusal("--workdir", run_copy)
    assert f"{run_copy}/config.json" in message
    assert "give the --config with which the run was started" in message
    assert "is already at step 4 of 4" in succeed(*TINY, "--workdir", run_copy)
    other = refusal(*TINY, "--config.transport.path=GVP", "--workdir", run_copy)
    assert "transport.path is 'GVP' but was 'Linear' in checkpoint 4" in other
    assert snapshot(run_copy) == before


def test_a_recorded_value_that_is_refused_today_can_be_replaced(run_copy):
    recorded = run_copy / "config.json"
    recorded.write_text(recorded.read_text().replace('"time_shift": 1.0', '"time_shift": 1e9'))
    sample = ("--workdir", run_copy, "--mode", "sample")
    assert "sample.time_shift is 1000000000.0; expected 0.001 to 1000" in refusal(*sample)
    succeed(*sample, "--config.sample.time_shift=1")


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_a_file_in_place_of_a_folder_is_one_line(tmp_path, mode):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("mine")
    before = snapshot(tmp_path)
    command = (*TINY, "--mode", mode, "--workdir")
    assert "file' cannot be used (it is a file); give a folder" in refusal(
        *command, tmp_path / "file"
    )
    assert "run/checkpoints': Not a directory; repair this" in refusal(*command, tmp_path / "run")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("value", ["a\nb", "a\r\nb", "\n", "a\u2028b", "a\nerror: b\n"])
def test_a_value_with_line_breaks_is_refused_in_one_line(tmp_path, value):
    for arguments in (("--mode", value), ("--config", value), ("--workdir", tmp_path, value)):
        message = refusal(*TINY, *arguments)
        assert len(message.splitlines()) == 1
    assert report.failure_line(UserError(value)) == r"\n".join(value.splitlines())


def run_job_that_raises(monkeypatch, tmp_path, error):
    """Return main's status and stderr for a job that raises this error."""

    def run(config, workdir, flags):
        raise error

    monkeypatch.setitem(main.JOBS, "train", Job(run, "a job", memory="train.batch"))
    status, _, err = call(*TINY, "--workdir", tmp_path)
    return status, err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "x/y"), "'x/y': No space left on device; repair"),
        (PermissionError(13, "Permission denied", b"/x"), "'/x': Permission denied; repair this"),
        (ConnectionError("two\nlines"), "ConnectionError: two lines; repair this"),
        (MemoryError(), "out of memory (MemoryError); lower train.batch; mesh.fsdp splits the"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\n allocating 9 bytes"),
            "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes); lower train.ba",
        ),
        (
            jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
            "and --mode preflight says what fits",
        ),
    ],
)
def test_what_the_machine_causes_is_one_line(monkeypatch, tmp_path, error, words):
    status, err = run_job_that_raises(monkeypatch, tmp_path, error)
    assert status == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("a\nbug"), KeyError("1024"), jax.errors.JaxRuntimeError("INTERNAL: x")]
)
def test_a_bug_keeps_its_traceback_and_is_called_one(monkeypatch, tmp_path, error):
    status, err = run_job_that_raises(monkeypatch, tmp_path, error)
    assert status == 1 and err.startswith("Traceback") and "in run\n" in err
    assert "this is a bug in sit_jax: please report it" in err.splitlines()[-1]


def test_ctrl_c_outside_training_is_one_line(monkeypatch, tmp_path):
    status, err = run_job_that_raises(monkeypatch, tmp_path, KeyboardInterrupt())
    assert status == 130 and err.startswith("error: interrupted") and err.count("\n") == 1


def test_memory_that_xla_does_not_get_is_one_line(tmp_path):
    huge = flags(model__width=65536, model__depth=1000)  # 103 TB in one array
    message = refusal(*TINY, *huge, "--workdir", tmp_path / "w")
    assert "error: out of memory (" in message
    assert "Out of memory allocating 103079215104000 bytes" in message
    assert "train.accumulation, or set model.remat=full" in message


def test_lack_of_memory_is_told_from_other_errors():
    assert report.lack_of_memory(np.exceptions.AxisError("out of memory")) is None
    assert report.lack_of_memory(jax.errors.JaxRuntimeError("INTERNAL: lost")) is None
    assert len(report.lack_of_memory(MemoryError("x" * 999))) < 200


@pytest.mark.parametrize(
    ("platforms", "words"),
    [
        ("cuda", "JAX_PLATFORMS=cuda names devices that jax does not find here"),
        ("tpu", "JAX_PLATFORMS=tpu names devices that jax does not find here"),
        ("cudaa", "unknown name in JAX_PLATFORMS 'cudaa'; did you mean 'cuda' or 'cpu'?"),
        ("CPU", "unknown name in JAX_PLATFORMS 'CPU'; known: 'cpu', 'gpu', 'cuda'"),
        ("", "jax cannot start the devices of this machine: no such device"),
    ],
)
def test_devices_that_are_not_there_are_one_line(monkeypatch, tmp_path, platforms, words):
    def fail():
        raise AssertionError

    class Settings:
        jax_platforms = platforms
        update = staticmethod(jax.config.update)

    monkeypatch.setattr(jax, "default_backend", fail)
    monkeypatch.setattr(runtime.jax, "config", Settings)
    with pytest.raises(UserError) as caught:
        runtime._start_backend()
    assert words in str(caught.value)


def test_a_process_without_its_devices_ends_in_one_line(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "sit_jax.main", *TINY, "--workdir", str(tmp_path / "new")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "rocm"},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: JAX_PLATFORMS=rocm names devices that jax does not")
    assert snapshot(tmp_path) == {}
