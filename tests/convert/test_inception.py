"""pytorch-fid's Inception weights keep every name and shape in a safetensors file."""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import json
import threading
import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import inception, published
from sit_jax.errors import UserError
from sit_jax.metrics import features, weight_files
from sit_jax.metrics import inception as network
from tests import checkpoints, goldens


@pytest.fixture(scope="module")
def weights():
    return {
        name: np.full(shape, zlib.crc32(name.encode()) / 2**32, np.float32)
        for name, shape in network.file_shapes().items()
    }


def test_the_names_and_shapes_are_the_networks():
    manifest = json.loads((goldens.FOLDER / "inception.golden.json").read_text())
    want = {name: tuple(shape) for name, shape in manifest["tensors"].items()}
    assert network.file_shapes() == want and len(want) == 472


def test_every_tensor_arrives(tmp_path, weights):
    # torchvision's counter, which inference does not use.
    counters = {"Mixed_7c.branch_pool.bn.num_batches_tracked": np.array(0)}
    path = checkpoints.save(tmp_path / "in.pth", weights | counters)
    out = tmp_path / "out.safetensors"
    inception.convert(path, str(out), any_weights=True)
    tensors = load_file(out)
    assert tensors.keys() == weights.keys()
    for name, want in weights.items():
        np.testing.assert_array_equal(tensors[name], want, err_msg=name)
    with pytest.raises(UserError, match="already exists; give another name, or --overwrite"):
        inception.convert(path, str(out), any_weights=True)


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, weights):
    cases = [
        (
            {**weights, "fc.bias": np.zeros(1000, np.float32)},
            r"fc.bias has shape \[1000\], expected \[1008\]",
        ),
        (
            {n: w for n, w in weights.items() if n != "fc.bias"},
            r"fc.bias is missing, expected shape \[1008\]",
        ),
        (
            {**weights, "AuxLogits.fc.bias": np.zeros(3)},
            r"AuxLogits.fc.bias of shape \[3\] is unexpected",
        ),
        (
            {**weights, "fc.bias": np.full(1008, np.nan, np.float32)},
            "fc.bias holds NaN or infinite values",
        ),
        ([1], "holds list, not a state dict"),
    ]
    for content, message in cases:
        path = checkpoints.save(tmp_path / "in.pth", content)
        with pytest.raises(UserError, match=message):
            inception.convert(path, str(tmp_path / "out.safetensors"), any_weights=True)
        assert [entry.name for entry in tmp_path.iterdir()] == ["in.pth"]
    with pytest.raises(UserError, match="expected NAME.safetensors"):
        inception.convert(path, str(tmp_path / "out.pt"), any_weights=True)


# The command line, with a small file in the place of the published one.

CONTENT = {"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), np.float32)}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's cache folder of a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sit_jax"


@pytest.fixture
def source(tmp_path):
    """The path of a published file."""
    (tmp_path / "site").mkdir()
    return checkpoints.save(tmp_path / "site" / "net.pth", CONTENT)


def stand_in(path, url=None):
    """Return the description of a published file at `url`, or at file://PATH."""
    with open(path, "rb") as file:
        content = file.read()
    return published.File(
        weight_files.Published(
            url or f"file://{path}",
            len(content),
            hashlib.sha256(content).hexdigest(),
            "convert.inception",
            "net.safetensors",
        ),
        lambda: {name: array.shape for name, array in CONTENT.items()},
    )


@contextlib.contextmanager
def served(folder, cut=None):
    """Serve the files in a folder and yield the address; break off after `cut` bytes."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, file, out):
            out.write(file.read()[:cut])

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_the_command_downloads_into_the_cache_from_where_the_weights_are_read(home, source, capsys):
    with served(home.parent.parent / "site") as address:
        file = stand_in(source, f"{address}/net.pth")
        published.main(file, [])
    assert "2 tensors -> " in capsys.readouterr().out
    assert [entry.name for entry in home.iterdir()] == ["net.safetensors"]
    tensors = weight_files.read(file.published, None, file.shapes())
    for name, want in CONTENT.items():
        np.testing.assert_array_equal(tensors[name], want)
    assert weight_files.is_published(file.published, None)
    with pytest.raises(UserError, match="net.safetensors' already exists"):
        published.main(file, [])  # before it downloads: the server is gone
    with pytest.raises(UserError, match="could not be downloaded"):
        published.main(file, ["--overwrite"])
    assert weight_files.is_published(file.published, None)


def test_a_download_that_breaks_off_or_is_another_file_is_refused(home, source):
    for cut in (None, 100):
        with served(home.parent.parent / "site", cut) as address:
            file = stand_in(source, f"{address}/net.pth")
            other = dataclasses.replace(file.published, sha256="0" * 64)
            with pytest.raises(UserError) as error:
                published.main(dataclasses.replace(file, published=other), [])
        assert "\n" not in str(error.value)
        assert f"{address}/net.pth" in str(error.value)
        assert "run `python -m convert.inception FILE`" in str(error.value)
        assert not list(home.iterdir())


def test_a_file_of_another_checksum_is_refused_unless_any_weights_are_asked_for(
    home, source, tmp_path
):
    file = stand_in(source)
    other = checkpoints.save(tmp_path / "other.pth", CONTENT | {"b": np.zeros((2, 2), np.float32)})
    out = str(tmp_path / "other.safetensors")
    with pytest.raises(
        UserError, match=r"other.pth has [\d,]+ bytes and sha256 \w{8}..., expected"
    ):
        published.main(file, [other, out])
    with pytest.raises(UserError, match="--any_weights needs WEIGHTS and OUT"):
        published.main(file, [other, "--any_weights"])
    assert not home.exists()
    published.main(file, [source])  # downloaded elsewhere; into the cache folder
    assert weight_files.is_published(file.published, None)
    published.main(file, [other, out, "--any_weights"])
    assert not weight_files.is_published(file.published, out)
    assert not weight_files.read(file.published, out, file.shapes())["b"].any()


def test_weights_that_are_missing_or_of_another_network_are_refused_in_one_line(home, tmp_path):
    load = features.EXTRACTORS["inception"].load
    with pytest.raises(UserError) as error:
        load(None)
    known = weight_files.INCEPTION
    assert str(error.value) == (
        f"the weights {str(home / 'inception.safetensors')!r} do not exist; to get them, run "
        f"`python -m convert.inception`, or download {known.url} (sha256 {known.sha256}) and run "
        "`python -m convert.inception FILE`"
    )
    path = tmp_path / "x.safetensors"
    cases = [
        ({"fc.bias": np.zeros(5, np.float32)}, "Conv2d_1a_3x3.conv.weight is missing"),
        (b"nothing", "not a readable .safetensors file"),
    ]
    for content, message in cases:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content, path)
        with pytest.raises(UserError, match=message) as error:
            load(str(path))
        assert "\n" not in str(error.value)


def test_a_converted_file_is_what_the_extractor_loads(tmp_path, weights):
    path = checkpoints.save(tmp_path / "in.pth", weights)
    out = str(tmp_path / "out.safetensors")
    inception.convert(path, out, any_weights=True)
    params = features.EXTRACTORS["inception"].load(out)
    want = network.fold(weights)
    assert features.weights_digest(params) == features.weights_digest(want)


def test_the_help_names_the_published_file_and_the_cache(home, capsys):
    with pytest.raises(SystemExit):
        inception.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "pt_inception-2015-12-05-6726825d.pth" in text and "--any_weights" in text
