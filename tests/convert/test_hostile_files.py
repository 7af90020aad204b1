"""Files that claim more than they hold are refused in a line, within bounds of time and memory."""

import json
import struct
import time
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import checkpoint_file, inception
from convert.torch_file import read_torch_file
from sit_jax.errors import UserError
from tests import checkpoints
from tests.processes import run_python


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def args_of(value):
    """Return the pickle of {"args": value}, for opcodes that push the value."""
    return b"\x80\x02}" + text("args") + value + b"s."


DOUBLED = b"K\x012\x86" + b"2\x86" * 60  # a tuple of two equal tuples of two equal ..., 61 levels
DOUBLED_LIST = b"]K\x01a" + b"q\x000]h\x00ah\x00a" * 40
GLOBAL = b"ccollections\nOrderedDict\n"
PICKLES = {
    "a tuple of tuples as key": (b"\x80\x02}" + DOUBLED + b"K\x01s.", "a tuple is not a key"),
    "in args": (args_of(DOUBLED), "more than 1000000 values"),
    "as a key in args": (args_of(b"}" + DOUBLED + b"K\x01s"), "a tuple is not a key"),
    "in pairs of an OrderedDict": (
        b"\x80\x02" + GLOBAL + b"]" + DOUBLED + b"K\x01\x86a\x85R.",
        "a tuple is not a key",
    ),
    "doubled lists": (args_of(DOUBLED_LIST), "more than 1000000 values"),
    "in a Namespace": (
        b"\x80\x02cargparse\nNamespace\n)\x81}" + text("x") + DOUBLED + b"sb.",
        "more than 1000000 values",
    ),
    "as a name of code": (b"\x80\x04" + DOUBLED + b"\x8c\x01x\x93.", "a tuple in place of a str"),
    "as a device": (
        b"\x80\x02ctorch\ndevice\n" + DOUBLED + b"\x85R.",
        "a tuple in place of a str",
    ),
    "as a shape": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00" + DOUBLED + DOUBLED + b"tR.",
        "a NoneType in place of a _Storage",
    ),
    "an array by a type": (
        b"\x80\x02ctorch\nFloatStorage\n" + DOUBLED + b"\x85R.",
        "not callable",
    ),
    "a cycle": (args_of(b"]q\x00h\x00a"), "more than 50 levels"),
    "levels of lists": (args_of(b"]" * 100_000 + b"a" * 99_999), "more than 50 levels"),
    "levels of tuples": (args_of(b")" + b"\x85" * 500_000), "more than 50 levels"),
    "a memo of 4 G": (b"\x80\x02K\x01r\xff\xff\xff\xff.", None),
    "operations": (args_of(b"K\x010" * 600_000 + b"N"), "more than 1000000 operations"),
    "a text of 1 TB": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40), "more than 17 MB"),
    "bytes of 2 GB": (b"\x80\x04B" + struct.pack("<I", 2**31), "more than 17 MB"),
    "a frame of 1 EB": (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.", None),
    "a number of 2 GB": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1), "more than 17 MB"),
    "a number of 8 Mbit": (
        args_of(b"\x8b" + struct.pack("<i", 2**20) + b"\x7f" * 2**20),
        "a number of 8388607 bits",
    ),
    "a decimal number": (args_of(b"L" + b"9" * 100_000 + b"L\n"), "4300 digits"),
    "a long text": (args_of(text("x" * 2_000_000)), "a text of 2000000 characters"),
    "a long name": (b"\x80\x02}" + text("x" * 1000) + b"K\x01s.", "is not a name"),
    "a name of two lines": (b"\x80\x02}" + text("a\nb") + b"K\x01s.", r"is not a name"),
    "a bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**40), "more than 17 MB"),
    "a set": (b"\x80\x04\x8f.", "it uses EMPTY_SET, which no checkpoint needs"),
    "an extension": (b"\x80\x02\x82\x01.", "it uses EXT1"),
    "out of order": (b"\x80\x02\x86.", "its operations do not fit together"),
}


def write_zip(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(f"x/{name}", data)
    return str(path)


def refused(path, message):
    """Assert that a file is refused in one short line and a moment, or holds no state dict."""
    began = time.process_time()
    with pytest.raises(UserError, match=message or "not a state dict") as caught:
        checkpoint_file.read(str(path))
    assert time.process_time() - began < 5
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_bomb_is_refused(tmp_path, case, zipped):
    data, message = PICKLES[case]
    if zipped:
        refused(write_zip(tmp_path / "x.pt", {"data.pkl": data}), message)
    else:
        (tmp_path / "x.pt").write_bytes(data)
        # A number or None is not the magic number with which the old format starts.
        refused(tmp_path / "x.pt", message or "does not start with PyTorch's magic number")


def entries_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize(
    ("entry", "compression", "message"),
    [
        ("data.pkl", zipfile.ZIP_DEFLATED, "its data.pkl is compressed, which torch.save never"),
        ("byteorder", zipfile.ZIP_DEFLATED, "its byteorder is compressed"),
        ("data/0", zipfile.ZIP_BZIP2, "its data/0 is compressed"),
        ("data.pkl", zipfile.ZIP_STORED, "its data.pkl claims 20000000 bytes"),
        ("byteorder", zipfile.ZIP_STORED, "its byteorder claims 20000000 bytes"),
    ],
)
def test_a_zip_bomb_is_refused(tmp_path, entry, compression, message):
    entries = entries_of(checkpoints.save(tmp_path / "x.pt", checkpoints.state_dict(0)))
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, data in entries.items():
            if name != entry:
                archive.writestr(f"x/{name}", data)
        archive.writestr(f"x/{entry}", bytes(20_000_000), compression)
    refused(tmp_path / "x.pt", message)


def tensor_file(tmp_path, storage, views):
    """Write tensors that are views (shape, strides) of one storage of float32 zeros."""
    data = b"\x80\x02}("
    for number, (shape, strides) in enumerate(views):
        data += text(f"t{number}") + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        data += text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
        data += b"J" + struct.pack("<i", storage) + b"tQK\x00"
        for numbers in (shape, strides):
            data += b"(" + b"".join(b"J" + struct.pack("<i", n) for n in numbers) + b"t"
        data += b"\x89NtR"
    return write_zip(tmp_path / "x.pt", {"data.pkl": data + b"u.", "data/0": bytes(4 * storage)})


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([((1152, 4608), (0, 0))], r"\(1152, 4608\) repeats the 100 elements of its storage"),
        ([((1152, 100), (0, 1))], "repeats the 100 elements"),
        ([((60, 40), (1, 1))], "repeats the 100 elements"),  # overlapping rows
        ([((2**31 - 1,) * 2, (0, 0))], "repeats the 100 elements"),
        ([((101,), (1,))], "reaches past its storage of 100 elements"),
        ([((1,) * 9, (1,) * 9)], "a tensor has no plain shape"),
    ],
)
def test_a_tensor_that_claims_more_than_its_storage_is_refused(tmp_path, views, message):
    refused(tensor_file(tmp_path, 100, views), message)


def test_tensors_that_together_claim_far_more_than_the_file_are_refused(tmp_path):
    path = tensor_file(tmp_path, 10_000, [((100, 100), (100, 1))] * 10)
    refused(path, "its tensors claim 400000 bytes, more than 8 times the file's size")


def test_views_that_share_a_storage_are_read(tmp_path):
    path = tensor_file(tmp_path, 100, [((10, 10), (1, 10)), ((10, 10), (10, 1)), ((5,), (20,))])
    assert [tensor.shape for tensor in read_torch_file(path).values()] == [
        (10, 10),
        (10, 10),
        (5,),
    ]


SAFETENSORS = {
    "a header of 1 TB": (struct.pack("<Q", 2**40) + b"{}", "its header claims 1099511627776"),
    "a header of 20 MB": (struct.pack("<Q", 20_000_000) + b" " * 20_000_000, "its header claims"),
    "deep JSON": (b"[" * 100_000, "not a readable safetensors file"),
    "past the end": (
        json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode(),
        "not a readable safetensors file",
    ),
    "another size": (
        json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}).encode(),
        "not a readable safetensors file",
    ),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_a_safetensors_bomb_is_refused(tmp_path, case):
    data, message = SAFETENSORS[case]
    if not message.startswith("its header"):
        data = struct.pack("<Q", len(data)) + data
    (tmp_path / "x.safetensors").write_bytes(data)
    refused(tmp_path / "x.safetensors", message)


@pytest.mark.parametrize(
    ("record", "name", "message"),
    [
        ("[" * 100_000, "w", "not a readable safetensors file .*recursion"),
        ('{"a":' * 500 + "1" + "}" * 500, "w", "the record of convert.to_torch .* is damaged"),
        ("{}", "a\nb", "is not a name"),
        ("{", "w", "not a readable safetensors file"),
    ],
)
def test_hostile_metadata_is_refused(tmp_path, record, name, message):
    path = tmp_path / "x.safetensors"
    save_file({name: np.zeros(1, np.float32)}, path, {"sit_jax": record})
    refused(path, message)


def test_the_inception_converter_reads_the_same_way(tmp_path):
    path = write_zip(tmp_path / "x.pth", {"data.pkl": b"\x80\x02}" + DOUBLED + b"K\x01s."})
    with pytest.raises(UserError, match="a tuple is not a key"):
        inception.convert(path, str(tmp_path / "y.safetensors"), any_weights=True)
    path = write_zip(tmp_path / "x.pth", {"data.pkl": b"\x80\x02}K\x01K\x02s."})
    with pytest.raises(UserError, match="does not fit"):
        inception.convert(path, str(tmp_path / "y.safetensors"), any_weights=True)


def test_all_of_them_together_take_little_memory(tmp_path):
    """Measure the peak of a process of its own, beyond what it had before."""
    for number, (data, _) in enumerate(PICKLES.values()):
        write_zip(tmp_path / f"{number}.pt", {"data.pkl": data})
    for number, (data, _) in enumerate(SAFETENSORS.values()):
        (tmp_path / f"{number}.safetensors").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(300_000_000))
    script = """
import pathlib, resource, sys
from convert import checkpoint_file
from sit_jax.errors import UserError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
paths = [p for p in pathlib.Path(sys.argv[1]).iterdir() if p.suffix in (".pt", ".safetensors")]
for path in paths:
    try:
        checkpoint_file.read(str(path))
    except UserError as error:
        print(error)
print(len(paths), peak() - before)
"""
    printed = run_python("-c", script, str(tmp_path), devices=1)
    *lines, last = printed.splitlines()
    count, kilobytes = map(int, last.split())
    assert len(lines) == count == len(PICKLES) + len(SAFETENSORS) + 1
    assert kilobytes < 300_000
