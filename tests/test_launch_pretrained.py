"""launch/sample_pretrained.sh: its download, from a local server; its decisions; a complete run.

The complete run converts and samples a small model in the published format.
"""

import dataclasses
import hashlib
import http.server
import json
import shutil
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from sit_jax import command_line, main
from sit_jax.settings import Sample
from tests.benchmarks import convert, vae
from tests.machine import BASH, ROOT, Machine, refusal

SCRIPT = "sample_pretrained.sh"
NAME = "SiT-XL-2-256.pt"
WORKDIR = "runs/pretrained/SiT-XL-2-256"
HOST = "https://huggingface.co/nyu-visionx/SiT-collections"
CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
DROPBOX = (
    "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/$file"
    "?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"
)
PUBLISHED = "e645b5cd82d1d645cfd9b7c96041b56b2a0aa61faed90c0869e79be02ab55aca"
LABELS = [207, 360, 387, 974, 88, 979, 417, 279]
needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, from the requested byte on, but breaks off after `cut` bytes.

    `requests` lists the (path, Range header) of each request.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.cut = None
        self.requests = []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        requested = self.headers["Range"]
        content = self.server.content
        self.server.requests.append((self.path, requested))
        first = int(requested.removeprefix("bytes=").removesuffix("-")) if requested else 0
        self.send_response(416 if first >= len(content) else 206 if requested else 200)
        if requested and first < len(content):
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content[first:])))
        self.end_headers()
        self.wfile.write(content[first : self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Pretrained(Machine):
    """A machine whose script downloads the local server's file in place of the published one."""

    def __init__(self, folder, address):
        super().__init__(folder)
        if curl := shutil.which("curl"):
            (self.bin / "curl").symlink_to(curl)
        script = self.root / "launch" / SCRIPT
        text = script.read_text()
        replacements = {
            "$home/resolve/main/$file": f"{address}/new",
            DROPBOX: f"{address}/old",
            PUBLISHED: SHA256,
        }
        for published, local in replacements.items():
            assert text.count(published) == 1
            text = text.replace(published, local)
        script.write_text(text)
        self.folder = self.root / "runs" / "pretrained"
        self.workdir = self.root / WORKDIR
        self.workdir.mkdir(parents=True)  # since the stand-in for the conversion does not make it

    def sample(self, *arguments, **options):
        """Run the script and return the Python commands that it ran, without the installation."""
        result = self.run(SCRIPT, *arguments, **options)
        assert result.returncode == 0, result.stderr
        return [call for call in self.calls() if " -m pip " not in call]

    def refuse(self, *arguments, **options):
        """Run the script and return its error, the last line: curl's messages precede it."""
        result = self.run(SCRIPT, *arguments, **options)
        assert result.returncode == 2 and result.stderr.count("error: ") == 1
        return result.stderr[result.stderr.index("error: ") :]


@pytest.fixture
def machine(tmp_path, server):
    return Pretrained(tmp_path, server.address)


def sampling(*solver, workdir=WORKDIR, decoder="repo=stabilityai/sd-vae-ft-mse"):
    """Return the command that the script samples with."""
    settings = [
        "labels=" + ",".join(map(str, LABELS)),
        "cfg_scale=4",
        "cfg_channels=3",
        "count=8",
        "batch=8",
        "columns=4",
        *solver,
    ]
    flags = [
        f"--config.latents.{decoder}",
        *(f"--config.sample.{setting}" for setting in settings),
    ]
    return " ".join([f"unset: -m sit_jax.main --mode sample --workdir {workdir}", *flags])


ODE = ("solver=dopri5", "steps=none", "atol=1e-6", "rtol=1e-3")
SDE = (
    "solver=euler-maruyama",
    "steps=249",
    "diffusion_form=sigma",
    "diffusion_norm=1",
    "last_step=mean",
    "last_step_size=0.04",
)
CONVERSION = f"unset: -m convert.from_torch runs/pretrained/{NAME} {WORKDIR}"


@needs_curl
def test_it_downloads_converts_and_samples_and_reuses_existing_files(machine, server):
    assert machine.sample() == [CONVERSION, sampling(*ODE)]
    assert (machine.folder / NAME).read_bytes() == CONTENT
    assert server.requests == [("/new", None)]
    # The stand-in for the conversion leaves no model, so the file is converted again.
    assert machine.sample("ode") == [CONVERSION, sampling(*ODE)]
    (machine.workdir / "config.json").touch()
    assert machine.sample("sde") == [sampling(*SDE)]
    (machine.folder / NAME).unlink()
    assert machine.sample("sde", "--config.sample.seed=1") == [sampling(*SDE, "seed=1")]
    assert len(server.requests) == 1


@needs_curl
def test_an_interrupted_download_is_resumed(machine, server):
    target = machine.folder / NAME
    part = machine.folder / f"{NAME}.part"
    server.cut = 4000
    line = machine.refuse()
    assert "could not be downloaded" in line and "run this again" in line
    assert not machine.calls()[1:]
    assert server.requests == [("/new", None), ("/old", "bytes=4000-")]
    assert part.read_bytes() == CONTENT[:4000] and not target.exists()
    server.cut = None
    assert machine.sample() == [CONVERSION, sampling(*ODE)]
    assert server.requests[2:] == [("/new", "bytes=4000-")]
    assert target.read_bytes() == CONTENT and not part.exists()


@needs_curl
def test_a_download_that_was_complete_when_killed_is_used(machine):
    (machine.folder / f"{NAME}.part").write_bytes(CONTENT)
    assert machine.sample() == [CONVERSION, sampling(*ODE)]
    assert (machine.folder / NAME).read_bytes() == CONTENT


@needs_curl
@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"\0", b"<html>sign in</html>"])
def test_another_file_is_refused_and_kept_aside(machine, server, content):
    server.content = content
    line = machine.refuse()
    assert f"is not the published file (its sha256 is not {SHA256})" in line
    assert f"{NAME}.refused" in line
    assert (machine.folder / f"{NAME}.refused").read_bytes() == content
    assert not (machine.folder / NAME).exists()
    server.content = CONTENT
    assert machine.sample() == [CONVERSION, sampling(*ODE)]


def test_a_copied_file_is_used_without_a_network_if_it_is_the_published_one(machine, server):
    server.shutdown()
    (machine.folder / NAME).write_bytes(CONTENT[:-1])
    assert f"{NAME} is not the published file" in machine.refuse()
    (machine.folder / NAME).write_bytes(CONTENT)
    machine.calls()
    assert machine.sample() == [CONVERSION, sampling(*ODE)] and not server.requests


@needs_curl
def test_without_a_network_it_says_which_files_to_copy_and_where(machine, server):
    server.shutdown()
    server.server_close()
    line = machine.refuse()
    assert line.count("\n") == 1
    for words in (
        f"{NAME} could not be downloaded",
        SHA256,
        HOST,
        str(machine.folder / NAME),
        "--vae",
        "config.json and diffusion_pytorch_model.safetensors",
        "https://huggingface.co/stabilityai/sd-vae-ft-mse",
    ):
        assert words in line
    assert not machine.calls()[1:]


def test_paths_are_relative_to_the_folder_of_the_caller(machine, tmp_path):
    here = tmp_path / "here"
    (here / "my vae").mkdir(parents=True)
    (here / "0400000.pt").write_bytes(b"mine")
    workdir = machine.folder / "0400000"
    workdir.mkdir()
    arguments = ["sde", "--checkpoint", "0400000.pt", "--vae=my vae"]
    conversion = f"unset: -m convert.from_torch {here}/0400000.pt runs/pretrained/0400000"
    sample = sampling(*SDE, workdir="runs/pretrained/0400000", decoder=f"path={here}/my vae")
    assert machine.sample(*arguments, cwd=here) == [conversion, sample]
    (workdir / "config.json").touch()
    assert machine.sample(*arguments, cwd=here) == [sample]
    # Another file of that name is not mistaken for the converted one.
    (here / "0400000.pt").write_bytes(b"other")
    line = refusal(machine.run(SCRIPT, *arguments, cwd=here))
    assert "runs/pretrained/0400000 was not converted from" in line and "--workdir" in line
    (here / "run").mkdir()
    machine.calls()
    assert machine.sample("--workdir=run", *arguments, cwd=here) == [
        conversion.replace("runs/pretrained/0400000", f"{here}/run"),
        sample.replace("runs/pretrained/0400000", f"{here}/run"),
    ]


def test_the_flags_of_the_conversion_are_passed_on(machine, tmp_path):
    """They are those that the conversion's own errors name."""
    (tmp_path / "mine.pt").write_bytes(b"mine")
    workdir = machine.folder / "mine"
    workdir.mkdir()
    arguments = [f"--checkpoint={tmp_path}/mine.pt", "--weights", "raw", "--num_heads=6"]
    conversion = f"unset: -m convert.from_torch {tmp_path}/mine.pt runs/pretrained/mine"
    sample = sampling(*ODE, workdir="runs/pretrained/mine")
    more = ["--num_classes=10", "--image_size", "512"]
    assert machine.sample(*arguments, *more) == [
        f"{conversion} --weights=raw --num_heads=6 --num_classes=10 --image_size=512",
        sample,
    ]
    assert machine.sample(*arguments) == [
        f"{conversion} --weights=raw --num_heads=6",
        sample,
    ]
    (workdir / "config.json").touch()
    assert machine.sample(*arguments) == [sample]
    # A workdir of other flags is another conversion.
    for others in (arguments[:3], [*arguments, *more], [arguments[0], "--weights=ema"]):
        line = refusal(machine.run(SCRIPT, *others))
        assert "runs/pretrained/mine was not converted from" in line and "--workdir" in line
    (machine.workdir / "config.json").touch()
    line = refusal(machine.run(SCRIPT, "--weights=raw"))
    assert f"{WORKDIR} was not converted from {NAME} --weights=raw" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ddim"], "unknown argument ddim"),
        (["--steps=3"], "unknown argument --steps=3"),
        (["--checkpoint"], "--checkpoint has no value"),
        (["--weights"], "--weights has no value"),
        (["--num_heads="], "--num_heads has no value"),
        (["--checkpoint=no.pt"], "--checkpoint no.pt is not a file"),
        (["--vae", "no"], "--vae no is not a folder"),
    ],
)
def test_a_mistake_is_reported_in_one_line_before_anything_runs(machine, arguments, words):
    assert words in refusal(machine.run(SCRIPT, *arguments)) and not machine.calls()


def test_a_failed_conversion_stops_the_script(machine):
    (machine.folder / NAME).write_bytes(CONTENT)
    assert machine.run(SCRIPT, FAILS="convert.from_torch").returncode != 0
    assert machine.calls()[-1] == CONVERSION and not (machine.workdir / "converted-from").exists()


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (ODE, Sample(solver="dopri5", steps=None, atol=1e-6, rtol=1e-3)),
        (
            SDE,
            Sample(solver="euler-maruyama", steps=249, diffusion_form="sigma", last_step_size=0.04),
        ),
    ],
)
def test_main_accepts_every_flag_of_a_sampler(solver, expected):
    recipe = ["--config", str(ROOT / "configs" / "imagenet.py"), *sampling(*solver).split()[3:]]
    config = main.load_config(*command_line.parse(recipe))
    shared = {"cfg_scale": 4.0, "count": 8, "batch": 8, "columns": 4, "labels": tuple(LABELS)}
    assert config.sample == dataclasses.replace(expected, **shared)
    assert config.latents.repo == "stabilityai/sd-vae-ft-mse"


@pytest.mark.slow
def test_a_complete_run_on_a_small_model_in_the_published_format(tmp_path):
    machine = Machine(tmp_path)
    autoencoder = tmp_path / "vae"
    python = machine.root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!{BASH}\n[ "$2" = pip ] || exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    checkpoint = tmp_path / NAME
    convert.make_file(str(checkpoint), model="SiT-S/8", side=8)
    autoencoder.mkdir()
    vae.write_folder(autoencoder, (32, 32, 32, 32))

    def sample(*arguments):
        """Run the script and return (its output, the folder of the sheet)."""
        shrink = ["--config.sample.steps=2", f"--checkpoint={checkpoint}", f"--vae={autoencoder}"]
        environment = {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/xla",
        }
        result = machine.run(SCRIPT, *shrink, *arguments, **environment)
        assert result.returncode == 0, result.stderr
        last = result.stdout.splitlines()[-1]
        assert last.startswith("sheet: runs/pretrained/SiT-XL-2-256/samples/")
        return result.stdout, (machine.root / last.removeprefix("sheet: ")).parent

    output, folder = sample("sde")
    assert "depth 12, width 384, 6 heads, patch 8" in output
    assert "input 8x8x4, 1000 classes" in output
    images = np.stack(
        [np.asarray(Image.open(path)) for path in sorted(folder.glob("images/0*.png"))]
    )
    assert images.shape == (8, 64, 64, 3) and (images.std(axis=(1, 2, 3)) > 1).all()
    assert np.asarray(Image.open(folder / "sheet.png")).shape == (2 * 66 + 2, 4 * 66 + 2, 3)
    settings = json.loads((folder / "settings.json").read_text())
    options = settings["sample"]
    assert options["solver"] == "euler-maruyama" and options["labels"] == LABELS
    assert options["cfg_scale"] == 4
    assert settings["latents"]["path"] == str(autoencoder) and settings["latents"]["repo"] is None

    # A second run converts nothing and samples nothing.
    times = {path: path.stat().st_mtime_ns for path in machine.root.rglob("*") if path.is_file()}
    output, second_folder = sample("sde")
    assert second_folder == folder
    assert "sampling 0 of 8 images" in output and "parameters; sees" not in output
    images = list(folder.glob("images/0*.png"))
    checkpoints = list((folder.parents[1] / "checkpoints").rglob("*"))
    kept = [path for path in [*images, *checkpoints] if path.is_file()]
    assert len(kept) > 8 and all(path.stat().st_mtime_ns == times[path] for path in kept)
