"""torch.save files are read and written without torch, and no code in a file is ever run."""

import argparse
import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from convert.torch_file import read_torch_file
from sit_jax.errors import UserError
from tests import checkpoints, goldens

CONTENT = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.int64),
    "half": np.array([1.5, -2.0], np.float16),
    "brain": np.array([1.5, -2.0], ml_dtypes.bfloat16),
}


def test_a_written_file_is_read_back(tmp_path):
    plain = {
        "args": {
            "lr": 1e-4,
            "betas": (0.9, 0.999),
            "name": "ü",
            "flag": True,
            "none": None,
            "big": 2**40,
        }
    }
    path = checkpoints.save(tmp_path / "x.pt", {"tensors": CONTENT, "list": [1, 2, {}], **plain})
    read = read_torch_file(path)
    assert read["list"] == [1, 2, {}] and read["args"] == plain["args"]
    for name, want in CONTENT.items():
        assert (read["tensors"][name].shape, read["tensors"][name].dtype) == (
            want.shape,
            want.dtype,
        )
        np.testing.assert_array_equal(read["tensors"][name], want)


@pytest.mark.torch
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_a_written_file(tmp_path, mmap):
    torch = pytest.importorskip("torch")
    path = checkpoints.save(
        tmp_path / "x.pt", {"tensors": CONTENT, "list": [1, (0.9, 0.999), None, True]}
    )
    read = torch.load(path, weights_only=True, mmap=mmap)
    assert read["list"] == [1, (0.9, 0.999), None, True]
    for name, want in CONTENT.items():
        assert read["tensors"][name].shape == want.shape
        np.testing.assert_array_equal(
            read["tensors"][name].float().numpy(), want.astype(np.float32)
        )


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
def test_a_file_written_by_torch_is_read(tmp_path, zipped):
    """Both formats: PyTorch before 1.6 wrote no zip, and published weights may be that old."""
    torch = pytest.importorskip("torch")
    base = torch.arange(12.0).reshape(3, 4)
    module = torch.nn.Linear(2, 2)
    content = {
        "transposed": base.T,
        "slice": base[1:, 2:],
        "half": base.half(),
        "module": module.state_dict(),
    }
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    read = read_torch_file(str(tmp_path / "x.pt"))
    for name in ("transposed", "slice", "half"):
        np.testing.assert_array_equal(read[name], content[name].numpy())
    np.testing.assert_array_equal(read["module"]["weight"], module.weight.detach().numpy())
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:-20])
    with pytest.raises(
        UserError, match="cut.pt is not a readable PyTorch checkpoint .*expected a complete file"
    ):
        read_torch_file(str(tmp_path / "cut.pt"))


def test_args_may_be_a_namespace():
    assert isinstance(
        read_torch_file(str(goldens.FOLDER / "sit_train_ckpt.pt"))["args"], argparse.Namespace
    )


@pytest.mark.parametrize("protocol", [2, 4])
def test_args_may_hold_paths_and_numpy_scalars(tmp_path, protocol):
    """Also those of Windows, and of other versions of NumPy: they become texts and numbers."""
    args = {
        "data_path": pathlib.PurePosixPath("/data/photos"),
        "relative": pathlib.Path("data"),
        "lr": np.float64(1e-4),
        "fid": np.float32(2.5),
        "epochs": np.int64(1400),
        "flag": np.bool_(True),
        "none": None,
    }
    data = pickle.dumps(argparse.Namespace(**args), protocol)
    for content in (data, data.replace(b"numpy.core", b"numpy._core")):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("archive/data.pkl", content if protocol == 2 else data)
        read = vars(read_torch_file(str(tmp_path / "x.pt")))
        assert read == {
            "data_path": "/data/photos",
            "relative": "data",
            "lr": 1e-4,
            "fid": 2.5,
            "epochs": 1400,
            "flag": True,
            "none": None,
        }
        assert {type(value) for value in read.values()} == {str, float, int, bool, type(None)}


@pytest.mark.torch
def test_other_values_of_torch_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    content = {
        "args": argparse.Namespace(device=torch.device("cuda", 1), dtype=torch.bfloat16),
        "size": torch.Size([2, 3]),
        "float8": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "int32": torch.arange(3, dtype=torch.int32),
    }
    torch.save(content, tmp_path / "x.pt")
    read = read_torch_file(str(tmp_path / "x.pt"))
    assert vars(read["args"]) == {"device": "cuda:1", "dtype": np.dtype(ml_dtypes.bfloat16)}
    assert read["size"] == (2, 3)
    for name, values in {
        "float8": [1.5, -2.0],
        "uint16": [1, 65535],
        "parameter": [1, 1],
        "int32": [0, 1, 2],
    }.items():
        np.testing.assert_array_equal(np.asarray(read[name]).astype(np.float32), values)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"torch.nn.*Linear, .* save model.state_dict\(\), not the"):
        read_torch_file(str(tmp_path / "model.pt"))


class Hostile:
    """Pickles as a call of a function, which a careless unpickler would make."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
@pytest.mark.parametrize(
    "place", [lambda evil: evil, lambda evil: {"ema": {}, "args": {"x": [evil]}}]
)
def test_a_hostile_file_runs_nothing(tmp_path, zipped, place):
    trace = tmp_path / "trace"
    for evil, function_name in (
        (Hostile(os.mkdir, str(trace)), "mkdir"),
        (Hostile(eval, f"__import__('os').mkdir({str(trace)!r})"), "builtins.eval"),
        (Hostile(getattr, argparse.Namespace, "__init__"), "builtins.getattr"),
    ):
        data = pickle.dumps(place(evil))
        if zipped:
            with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
                archive.writestr("archive/data.pkl", data)
        else:
            (tmp_path / "x.pt").write_bytes(data)
        with pytest.raises(
            UserError,
            match=f"it refers to .*{function_name.rpartition('.')[2]}, which no checkpoint needs",
        ):
            read_torch_file(str(tmp_path / "x.pt"))
        assert not trace.exists()


def test_a_hostile_shape_reads_nothing_outside_its_storage(tmp_path):
    path = checkpoints.save(tmp_path / "x.pt", {"w": np.arange(4, dtype=np.float32)})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    shape = pickle.dumps((4,), 2)[2:-1]
    for hostile_shape in ((5,), (-1,), (2**62,)):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data.replace(shape, pickle.dumps(hostile_shape, 2)[2:-1]))
        with pytest.raises(UserError, match="reaches past its storage of 4 elements"):
            read_torch_file(path)


@pytest.mark.parametrize("keep", [0, 1, 200, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, keep):
    data = (goldens.FOLDER / "sit_bare.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(
        data[: int(keep * len(data)) if isinstance(keep, float) else keep]
    )
    with pytest.raises(UserError, match="cut.pt is not a readable PyTorch checkpoint") as caught:
        read_torch_file(str(tmp_path / "cut.pt"))
    assert "\n" not in str(caught.value)


def test_flipped_bytes_are_detected_when_the_tensor_is_read(tmp_path):
    path = checkpoints.save(tmp_path / "x.pt", {"w": np.full(1000, 3.25, np.float32)})
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[data.index(np.float32(3.25).tobytes()) + 1000] ^= 0xFF
    (tmp_path / "x.pt").write_bytes(data)
    tensor = read_torch_file(path)["w"]
    with pytest.raises(UserError, match="x.pt is not a readable PyTorch checkpoint .*CRC"):
        tensor.read()


@pytest.mark.parametrize("content", [b"", b"hello, world\n" * 100, b"PK\x03\x04" + bytes(100)])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match="x.pt is not a readable PyTorch checkpoint"):
        read_torch_file(str(tmp_path / "x.pt"))
    with pytest.raises(UserError, match="No such file"):
        read_torch_file(str(tmp_path / "missing.pt"))
