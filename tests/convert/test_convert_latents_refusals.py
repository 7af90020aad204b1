"""convert.latents refuses bad caches in one line that names the file."""

import io
import json
import os
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import cli, latents
from convert.caches import files
from convert.latents import Options, convert
from sit_jax import lock
from sit_jax.data import latent_cache
from sit_jax.errors import UserError
from tests import caches
from tests.commands import snapshot
from tests.other_caches import (
    lightning_latent,
    mean_and_std,
    noise,
    refused,
    save,
    stats_of,
    write_json,
    write_lightning,
    write_moments,
    write_repa,
    write_stats,
)

FIRST = "vae-sd/00000/img-mean-std-00000000.npy"
FIFTH = "vae-sd/00001/img-mean-std-00000004.npy"


def npy(shape, dtype="<f4", data=b"", version=1):
    """Return the bytes of a .npy file whose header claims this shape and type."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def pickled():
    """Return a .npy file of Python objects, whose pickle would end this process."""

    class Exit:
        def __reduce__(self):
            return os._exit, (1,)

    array = np.empty(1, object)
    array[0] = Exit()
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def changed_moments(change):
    file = io.BytesIO()
    moments = mean_and_std(0)
    change(moments)
    np.save(file, moments)
    return file.getvalue()


def put(index, value):
    return changed_moments(lambda moments: moments.__setitem__(index, value))


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


BAD_FILES = {
    "empty": (b"", r"cannot be read \(it is empty\)"),
    "truncated": (saved(mean_and_std(0))[:-10], "holds 502 bytes of numbers instead of 512"),
    "longer": (saved(mean_and_std(0)) + b"x", "holds 513 bytes of numbers instead of 512"),
    "cut in the header": (saved(mean_and_std(0))[:40], "its header is truncated"),
    "of another kind": (b"\x89PNG" + bytes(500), "does not start like a .npy file"),
    "of objects": (pickled(), "holds pickled Python objects, which are never loaded"),
    "of a huge shape": (npy((8, 2**30, 2**30)), "bytes of numbers instead of 36,893,488,147"),
    "of a negative shape": (npy((-8, -4, 4), data=bytes(512)), r"has the shape \[-8, -4, 4\]"),
    "of no size": (npy((8, 4, 4), "|S0"), "type"),
    "with a long header": (npy((8,) + (1,) * 5000, version=2), "its header is truncated or too l"),
    "with a nested header": (npy("(" * 3000), "cannot be read"),
    "of whole numbers": (saved(np.zeros((8, 4, 4), np.int64)), "holds int64 numbers of shape"),
    "with NaN": (put((0, 1, 1), np.nan), "holds NaN or infinite values"),
    "with an infinite deviation": (put((7, 1, 1), np.inf), "holds NaN or infinite values"),
    "with -inf": (put((0, 0, 0), -np.inf), "holds NaN or infinite values"),
    "with a negative deviation": (
        put((5, 0, 0), -0.25),
        "has the standard deviation -0.25; .* --spread logvar",
    ),
    "too large for float16": (put((1, 0, 0), 7e4), "has the value 70000, which float16 cannot .*"),
    "of another shape": (saved(np.abs(noise(0, 8, 5, 5))), r"\[8, 5, 5\]"),
    "of another rank": (saved(noise(0, 128)), r"\[128\]"),
}


@pytest.mark.parametrize("name", [FIRST, FIFTH])
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_arrays_are_named(tmp_path, name, case):
    data, message = BAD_FILES[case]
    src = write_repa(tmp_path / "src")
    (src / name).write_bytes(data)
    # The first file decides on the shape, so that the second one then differs.
    is_other_shape = case == "of another shape" and name == FIRST
    named = "00000001.npy" if is_other_shape else os.path.basename(name)
    refused(src, f"{named}.*{message}")
    assert not (tmp_path / "dst").exists()


def test_special_and_missing_files_are_named(tmp_path):
    src = write_repa(tmp_path / "src")
    (src / FIFTH).unlink()
    refused(src, "dataset.json lists 1 files that do not exist, such as '00001/img-mean-std-000000")
    os.mkfifo(src / FIFTH)
    refused(src, "00000004.npy cannot be read .it is not a regular file")
    (src / FIFTH).unlink()
    save(src / FIFTH, mean_and_std(4))
    save(src / "vae-sd" / "00009" / "img-mean-std-00000027.npy", mean_and_std(27))
    refused(src, "dataset.json has no label for 1 files, such as '00009/img-mean-std-00000027.npy'")


def test_what_was_complete_stays_when_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "_SHARD_RECORDS", 2)
    src = write_repa(tmp_path / "src")
    good = (src / FIFTH).read_bytes()
    (src / FIFTH).write_bytes(good[:-1])
    refused(src, "00000004.npy cannot be read")
    assert len(list((tmp_path / "dst").glob("*.array_record.json"))) == 2
    (src / FIFTH).write_bytes(good)
    convert(str(src), str(tmp_path / "dst"), Options())
    convert(str(src), str(tmp_path / "alone"), Options())
    assert snapshot(tmp_path / "dst") == snapshot(tmp_path / "alone")


def test_a_first_file_that_is_refused_leaves_nothing(tmp_path):
    src = write_repa(tmp_path / "src")
    (src / FIRST).write_bytes(put((5, 0, 0), -1.0))
    refused(src, "00000000.npy has the standard deviation -1")
    assert not (tmp_path / "dst").exists()


def test_a_folder_that_is_reached_twice(tmp_path):
    src = write_repa(tmp_path / "src")
    (src / "vae-sd" / "00000" / "loop").symlink_to(src / "vae-sd")
    refused(src, "loop is a link to .*vae-sd, whose files would be read twice")


def npz(compression=zipfile.ZIP_STORED, **entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name + ".npy", data)
    return file.getvalue()


GOOD = saved(noise(0, 4, 3, 3))
BAD_NPZ = {
    "truncated": (npz(moments=GOOD)[:-30], "cannot be read"),
    "of two arrays": (npz(a=GOOD, b=GOOD), "holds the arrays a, b; expected one, or moments and"),
    "empty": (npz(), "holds the arrays .none.; expected one"),
    "of other arrays": (npz(moments=GOOD, std=GOOD), "holds the arrays std; expected one"),
    "of objects": (npz(moments=pickled()), "pickled Python objects"),
    "a bomb": (npz(zipfile.ZIP_DEFLATED, moments=npy((2**27,)) + bytes(2**29)), "holds 67,1"),
    "of many": (npz(**{f"a{number}": GOOD for number in range(20)}), "it holds 20 arrays"),
    "with another mirror": (
        npz(moments=GOOD, moments_flip=saved(noise(0, 4, 2, 2))),
        r"has arrays of shape \[\[4, 3, 3\], \[4, 2, 2\]\]",
    ),
    "with a mirror": (npz(moments=GOOD, moments_flip=GOOD), "has arrays of shape"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz_files_are_named(tmp_path, case):
    data, message = BAD_NPZ[case]
    arrays = {f"{number}.npz": {"moments": noise(0, 4, 3, 3)} for number in range(3)}
    src = write_moments(tmp_path / "src", arrays)
    (src / "1.npz").write_bytes(data)
    refused(src, f"1.npz.*{message}", spread="logvar", scale="1")


def lightning_file(src, index=1):
    return sorted(src.glob("*.safetensors"))[index]


def rewrite(path, **tensors):
    """Write a file of two latents with these tensors, or without those that are None."""
    pair = np.stack([lightning_latent(number, 0) for number in range(2)])
    content = {"latents": pair, "latents_flip": pair, "labels": np.array([0, 1])} | tensors
    save_file({name: array for name, array in content.items() if array is not None}, path)


WRONG = noise(0, 2, 8, 4, 4)
BAD_LIGHTNING = {
    "without labels": ({"labels": None}, "holds latents, latents_flip; expected latents, labels"),
    "with others": ({"extra": WRONG}, "holds extra, .*; expected latents, labels and"),
    "without a mirror": (
        {"latents_flip": None},
        "has latents of shape .* in latents, where .* and",
    ),
    "of another shape": (
        {"latents": WRONG[:, :4], "latents_flip": WRONG[:, :4]},
        r"has latents of shape \[4, 4, 4\]",
    ),
    "of another mirror": ({"latents_flip": WRONG[:1]}, "has the shapes"),
    "of another rank": ({"latents": WRONG[0], "latents_flip": WRONG[0]}, "has the shapes"),
    "of other labels": ({"labels": np.arange(3)}, "has the shapes"),
    "of one-hot labels": ({"labels": np.eye(2, dtype=np.int64)}, "has the shapes"),
    "of float labels": ({"labels": np.array([0.0, 1.0])}, "labels holds F64 numbers; expected who"),
    "of whole latents": ({"latents": WRONG.astype(np.int8)}, "latents holds I8 numbers"),
    "with NaN": ({"latents": WRONG * np.nan}, "NaN or infinite values"),
    "with an infinite mirror": ({"latents_flip": WRONG * np.inf}, "NaN or infinite values"),
    "too large": ({"latents": WRONG * 1e6}, "which float16 cannot hold"),
}


@pytest.mark.parametrize("case", BAD_LIGHTNING)
def test_bad_safetensors_are_named(tmp_path, case):
    tensors, message = BAD_LIGHTNING[case]
    src = write_lightning(tmp_path / "src")
    rewrite(lightning_file(src), **tensors)
    refused(src, f"latents_rank00_shard001.safetensors.*{message}")


def test_damaged_safetensors_are_named(tmp_path):
    src = write_lightning(tmp_path / "src")
    path = lightning_file(src)
    data = path.read_bytes()
    header = {"latents": {"dtype": "F32", "shape": [2**40, 8, 4, 4], "data_offsets": [0, 2**49]}}
    text = json.dumps(header).encode()
    for damaged in (
        data[:-1],
        data[:100],
        data[:4],
        b"",
        data + b"x",
        struct.pack("<Q", 2**62) + data[8:],
        struct.pack("<Q", len(text)) + text + bytes(100),
    ):
        path.write_bytes(damaged)
        refused(src, "shard001.safetensors is not a readable safetensors file .*get the complete")


def test_missing_files_of_lightningdit_are_named(tmp_path):
    src = write_lightning(tmp_path / "src", counts=(1, 2, 3, 2, 2))
    lightning_file(src, 2).unlink()  # shard 0 of rank 1
    refused(src, "latents_rank01_shard000.safetensors is missing")
    src = write_lightning(tmp_path / "other", counts=(1, 2, 3, 2, 2))
    lightning_file(src, 0).unlink()
    refused(src, "latents_rank00_shard000.safetensors is missing")
    (src / "latents_stats.pt").unlink()
    src = write_lightning(tmp_path / "third", stats=False)
    refused(src, "latents_stats.pt does not exist, so the scale .*give --scale and --shift")


def test_bad_stats_are_refused(tmp_path):
    src = write_lightning(tmp_path / "src")
    mean, std = stats_of()
    for wrong, message in (
        ((mean[:, :4], std), r"no mean of shape \[1, 8, 1, 1\]"),
        ((mean, std.reshape(8, 1, 1)), r"no std of shape \[1, 8, 1, 1\]"),
        ((mean, std * 0), "a std that is not positive"),
        ((mean, -std), "a std that is not positive"),
        ((mean * np.nan, std), "not finite"),
    ):
        write_stats(src, *wrong)
        refused(src, f"latents_stats.pt has .*{message}")
    path = src / "latents_stats.pt"
    path.write_bytes(pickle.dumps({"mean": 0, "std": print}))
    refused(src, "latents_stats.pt is not a readable PyTorch checkpoint")
    path.write_bytes(bytes(2**24 + 1))
    refused(src, "latents_stats.pt is not a file of two small tensors")


BAD_FLAGS = {
    "a shift by itself": ({"shift": "1"}, "--shift is 1 without --scale; give both"),
    "a scale of words": ({"scale": "big"}, "--scale is 'big'; expected a number, or 4 with commas"),
    "two scales": ({"scale": "1,2"}, "--scale is '1,2'; expected a number, or 4 with commas"),
    "an infinite scale": ({"scale": "inf"}, "--scale is 'inf'"),
    "a scale of 0": ({"scale": "0"}, "--scale is 0; expected numbers above 0"),
    "a NaN shift": ({"scale": "1", "shift": "nan"}, "--shift is 'nan'"),
    "an image size": ({"image_size": 30}, "--image_size is 30; expected a multiple of 4 pixels"),
    "a negative image size": ({"image_size": -4}, "--image_size is -4"),
    "a spread": ({"spread": "std"}, "--spread is std, but the layout repa has its own"),
    "axes": ({"axes": "hwc"}, "--axes is hwc, but the layout repa has its own"),
    "a multiplier": ({"multiplier": 1.0}, "--multiplier is 1.0, but only lightningdit has one"),
    "another autoencoder": ({"autoencoder": "other"}, "scale .* 'other' is unknown; give --scale"),
    "another layout": ({"layout": "lightningdit"}, "holds no .safetensors files"),
    "no spread": ({"layout": "moments"}, "give --spread std, logvar, or none"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_flags_that_do_not_fit(tmp_path, case):
    options, message = BAD_FLAGS[case]
    refused(write_repa(tmp_path / "src"), message, **options)
    assert not (tmp_path / "dst").exists()


def test_flags_that_do_not_fit_lightningdit(tmp_path):
    src = write_lightning(tmp_path / "src")
    refused(src, "--labels is x.json, but lightningdit's files hold", labels="x.json")
    refused(src, "--multiplier is 2.0 beside --scale", multiplier=2.0, scale="1")
    refused(src, "--multiplier is 0.0; expected a number above 0", multiplier=0.0)
    refused(src, "--multiplier is nan; expected a number above 0", multiplier=float("nan"))
    refused(src, "latents of 8 channels, but those of sd-vae have 4", autoencoder="sd-vae")


def test_latents_that_are_not_square_or_have_an_odd_half(tmp_path):
    src = write_moments(tmp_path / "src", {"a.npy": noise(0, 4, 3, 5)})
    refused(src, r"a.npy has the shape \[4, 3, 5\]; expected square latents", spread="logvar")
    src = write_moments(tmp_path / "odd", {"a.npy": noise(0, 5, 3, 3)})
    refused(src, "a.npy has 5 channels; expected an even number, .* log var", spread="logvar")
    refused(src, r"--axes is hwc, but .*a.npy has the shape \[5, 3, 3\]", spread="none", axes="hwc")


def test_folders_that_are_not_a_cache(tmp_path):
    src = tmp_path / "src"
    refused(src, "src' does not exist; expected a folder")
    src.write_text("")
    refused(src, "src' is not a folder; .* unpack an archive first")
    src.unlink()
    src.mkdir()
    refused(src, "holds neither dataset.json .repa., nor .safetensors files .light")
    refused(src, "holds no .safetensors files", layout="lightningdit")
    write_json(src / "dataset.json", {"labels": [["00000/img00000000.png", 1]]})
    refused(src, "dataset.json lists 1 files that do not exist|holds no .npy or .npz files")
    write_json(src / "labels.json", {})
    refused(src, "may be repa or moments; give --layout, which decides")
    save(src / "other.npy", noise(0, 8, 4, 4))
    refused(src, "other.npy is not one of REPA's img-mean-std-.*.npy; remove", layout="repa")
    caches.write(tmp_path / "ours", caches.make_plan())
    refused(tmp_path / "ours", "already holds latents of this project; train from it")
    refused(tmp_path / "gs:" / "x", "does not exist")
    with pytest.raises(UserError, match="'gs://bucket/x' is not on a local disk"):
        convert("gs://bucket/x", str(tmp_path / "dst"), Options())


def test_where_not_to_write(tmp_path, monkeypatch):
    src = write_repa(tmp_path / "src")

    def refused_dst(dst, message):
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match=message):
            convert(str(src), str(dst), Options())
        assert snapshot(tmp_path) == before

    refused_dst(src, "is inside of .*src', which is only read")
    refused_dst(src / "vae-sd" / "ours", "is inside of .*src', which is only read")
    (tmp_path / "file").write_text("")
    refused_dst(tmp_path / "file", "file' is a file; give the name of a new folder")
    refused_dst(tmp_path, "holds other files, such as 'file'")
    (tmp_path / "dst").mkdir()
    with lock.hold(latents.epath.Path(tmp_path / "dst")), pytest.raises(UserError, match="in use"):
        convert(str(src), str(tmp_path / "dst"), Options())
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 100})
        patch.setattr(latent_cache.shutil, "disk_usage", lambda path: usage)
        refused_dst(tmp_path / "new", "GB are needed in .*new', which has 0.0 GB free")


def test_the_command_reports_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latents", str(tmp_path), str(tmp_path / "dst")])
    assert cli.run(latents.main) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    for arguments in ([], ["a"], ["a", "b", "--dtype", "int8"], ["a", "b", "--overwrite"]):
        with pytest.raises(UserError, match="see python -m convert.latents --help"):
            latents.main(arguments)


def test_reading_stops_with_the_reader(tmp_path):
    src = write_repa(tmp_path / "src", count=100)
    cache = files.open_repa(str(src), None)
    reading = cache.read(range(100))
    next(reading)
    reading.close()
