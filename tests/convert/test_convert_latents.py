"""Caches of other projects become stored latents with the same moments, views, labels and scale."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import latents
from convert.latents import Options, convert
from sit_jax import config as config_lib
from sit_jax.errors import UserError
from sit_jax.latents import posterior
from tests.commands import ROOT, snapshot
from tests.other_caches import (
    converted,
    lightning_latent,
    mean_and_std,
    noise,
    opened,
    stats_of,
    write_lightning,
    write_moments,
    write_repa,
)


def hwm(array):
    return np.moveaxis(array, 0, -1)


def log_moments(number, dtype=np.float16, **shape):
    """Return [h, w, 2c] of REPA's example: mean and log variance."""
    mean, std = np.split(hwm(mean_and_std(number, **shape)).astype(np.float64), 2, axis=-1)
    return np.concatenate([mean, np.log(std**2)], axis=-1).astype(np.float32).astype(dtype)


def network_input(source, index, key, mirrored=False):
    """Return what the network sees of a record [h, w, c], drawn with this key."""
    record = {name: np.asarray(part)[None] for name, part in source.read(index, mirrored).items()}
    return np.asarray(posterior.draw_stored(key[None], record))[0]


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_repa(tmp_path, inner, dtype):
    src = write_repa(tmp_path / "src")
    (src / "images" / "00000").mkdir(parents=True)
    source = converted(tmp_path, src / "vae-sd" if inner else src, dtype=dtype)
    numpy_dtype = {"bfloat16": ml_dtypes.bfloat16}.get(dtype) or np.dtype(dtype)
    assert len(source) == 7 and not source.can_mirror
    assert source.class_names == ("0", "1", "2")
    for index in range(7):
        record = source.read(index)
        want = log_moments(index, numpy_dtype)
        assert record["moments"].dtype == numpy_dtype
        spacing = np.spacing(np.abs(want).astype(np.float32)) * 2.0 ** {
            "float16": 13, "bfloat16": 16, "float32": 1
        }[dtype]  # fmt: skip
        error = np.abs(record["moments"].astype(np.float64) - want.astype(np.float64))
        assert (error <= spacing).all()  # at most one unit in the last place
        assert record["label"] == index % 3
    plan = source.manifest.plan
    assert plan.scale == (0.18215,) * 4 and plan.shift == (0.0,) * 4
    assert plan.autoencoder == {"name": "sd-vae"} and plan.image_size == 32


def test_the_network_sees_repas_formula(tmp_path):
    source = converted(tmp_path, write_repa(tmp_path / "src"), dtype="float32")
    for index in (0, 6):
        key = jax.random.key(index)
        mean, std = np.split(hwm(mean_and_std(index)), 2, axis=-1)
        z = mean + std * np.asarray(jax.random.normal(key, mean.shape))
        got = network_input(source, index, key)
        np.testing.assert_allclose(got, z * 0.18215 + 0.0, rtol=1e-5, atol=1e-6)


def test_repas_arrays_may_have_the_axis_of_a_batch(tmp_path):
    src = write_repa(tmp_path / "src")
    for path in (src / "vae-sd").rglob("*.npy"):
        np.save(path, np.load(path)[None])
    plain = converted(tmp_path / "a", write_repa(tmp_path / "plain"))
    source = converted(tmp_path / "b", src)
    for index in range(7):
        np.testing.assert_array_equal(source.read(index)["moments"], plain.read(index)["moments"])


def test_a_deviation_of_zero_is_the_smallest_log_variance(tmp_path):
    src = write_repa(tmp_path / "src")
    path = src / "vae-sd" / "00000" / "img-mean-std-00000001.npy"
    moments = mean_and_std(1)
    moments[4:6] = 0.0
    moments[6:7] = -0.0
    moments[7:] = np.exp(-15.0)  # the smallest that REPA's autoencoder gives
    np.save(path, moments)
    got = converted(tmp_path, src).read(1)["moments"]
    np.testing.assert_array_equal(got[..., 4:], -30.0)
    np.testing.assert_array_equal(got[..., :4], hwm(moments[:4]).astype(np.float16))


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_lightningdit(tmp_path, monkeypatch, mirrored, dtype):
    monkeypatch.setattr(latents, "_SHARD_RECORDS", 3)  # borders that are not those of the files
    src = write_lightning(tmp_path / "src", mirrored=mirrored, dtype=dtype)
    source = converted(tmp_path, src, channels=8, dtype="float32")
    assert len(source) == 11 and len(source.manifest.shards) == 4
    assert source.can_mirror == mirrored
    mean, std = (part.reshape(-1) for part in stats_of())
    for index in range(11):
        assert source.labels[index] == source.read(index)["label"] == index % 3
        for view in range(1 + mirrored):
            moments = source.read(index, bool(view))["moments"]
            z = hwm(lightning_latent(index, view)).astype(dtype).astype(np.float32)
            np.testing.assert_array_equal(moments[..., :8], z)
            np.testing.assert_array_equal(moments[..., 8:], -np.inf)
            got = network_input(source, index, jax.random.key(0), bool(view))
            np.testing.assert_allclose(got, (z - mean) / std, rtol=1e-5, atol=1e-5)
    assert source.manifest.plan.autoencoder == {"name": "other"}
    assert source.manifest.plan.image_size is None


def test_lightningdits_multiplier_and_an_own_scale(tmp_path):
    src = write_lightning(tmp_path / "src")
    mean, std = (part.reshape(-1) for part in stats_of())
    z = hwm(lightning_latent(3, 0))
    key = jax.random.key(0)
    source = converted(tmp_path / "a", src, channels=8, multiplier=0.5, dtype="float32")
    want = (z - mean) / std * 0.5
    np.testing.assert_allclose(network_input(source, 3, key), want, rtol=1e-5, atol=1e-5)
    # latent_norm: false needs no latents_stats.pt.
    (src / "latents_stats.pt").unlink()
    source = converted(
        tmp_path / "b", src, channels=8, scale="0.18215", dtype="float32", image_size=64
    )
    np.testing.assert_allclose(network_input(source, 3, key), z * 0.18215, rtol=1e-6)
    assert source.manifest.plan.image_size == 64
    shift = ",".join(map(str, range(-4, 4)))
    source = converted(tmp_path / "c", src, channels=8, scale="2", shift=shift, dtype="float32")
    want = 2 * (z - np.arange(-4, 4))
    np.testing.assert_allclose(network_input(source, 3, key), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axes", ["chw", "hwc"])
@pytest.mark.parametrize("spread", ["std", "logvar", "none"])
@pytest.mark.parametrize("kind", [".npy", ".npz"])
def test_a_folder_of_moments(tmp_path, axes, spread, kind):
    stored = {number: noise(number, 6, 4, 4, dtype=np.float16) for number in range(5)}
    if spread == "std":
        stored = {number: np.abs(array) + 0.1 for number, array in stored.items()}
    arranged = {
        f"part{number % 2}/{number}{kind}": hwm(array) if axes == "hwc" else array
        for number, array in stored.items()
    }
    if kind == ".npz":
        arranged = {name: {"anything": array} for name, array in arranged.items()}
    src = write_moments(tmp_path / "src", arranged)
    channels = 6 if spread == "none" else 3
    source = converted(tmp_path, src, channels=channels, spread=spread, scale="1", dtype="float32")
    numbers = sorted(stored, key=lambda number: f"part{number % 2}/{number}")
    for index, number in enumerate(numbers):
        record = source.read(index)
        want = hwm(stored[number]).astype(np.float32)
        np.testing.assert_array_equal(record["moments"][..., :channels], want[..., :channels])
        second = want[..., 3:] if spread == "logvar" else np.float32(-np.inf)
        if spread == "std":
            second = 2 * np.log(want[..., 3:])
        np.testing.assert_allclose(record["moments"][..., channels:], second, rtol=1e-6)
        assert record["label"] == number % 3


def test_mars_files_have_the_mirror_image_and_classes_as_folders(tmp_path):
    src = tmp_path / "src"
    for number, name in enumerate(["n01/a.npz", "n01/b.npz", "n02/a.npz"]):
        moments = {
            "moments": noise(number, 32, 2, 2),
            "moments_flip": noise(-1 - number + 9, 32, 2, 2),
        }
        moments["moments"][16:] *= 20  # beyond what the autoencoder itself uses
        write_moments(src, {name: moments}, labels=None)
    source = converted(
        tmp_path, src, side=2, channels=16, layout="moments", labels="folders", spread="logvar",
        scale="0.2325", dtype="float32",
    )  # fmt: skip
    assert source.can_mirror and source.class_names == ("n01", "n02")
    assert source.labels.tolist() == [0, 0, 1]
    for number in range(3):
        moments = hwm(noise(number, 32, 2, 2))
        got = source.read(number)["moments"]
        np.testing.assert_array_equal(got[..., :16], moments[..., :16])
        want = np.clip(20 * moments[..., 16:], -30, 20)
        assert want.max() == 20 or want.min() == -30 or number
        np.testing.assert_array_equal(got[..., 16:], want)
        flipped = source.read(number, mirrored=True)["moments"]
        np.testing.assert_array_equal(flipped, hwm(noise(8 - number, 32, 2, 2)))


def test_axes_that_a_shape_does_not_tell_are_asked_for(tmp_path):
    array = noise(0, 4, 4, 4)
    src = write_moments(tmp_path / "src", {"a.npy": array})
    options = {"spread": "none", "autoencoder": "sd-vae", "dtype": "float32"}
    with pytest.raises(UserError, match=r"shape \[4, 4, 4\], which does not tell .*--axes chw or"):
        converted(tmp_path, src, **options)
    for axes, want in (("chw", hwm(array)), ("hwc", array)):
        source = converted(tmp_path / axes, src, axes=axes, **options)
        np.testing.assert_array_equal(source.read(0)["moments"][..., :4], want)
        assert source.manifest.plan.scale == (0.18215,) * 4


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [">f4", "<f8", "<f2"])
def test_byte_order_and_order_of_axes_of_npy_files(tmp_path, order, dtype):
    array = noise(0, 2, 3, 3).astype(dtype)
    src = write_moments(tmp_path / "src", {"a.npy": np.asarray(array, order=order)})
    source = converted(
        tmp_path, src, side=3, channels=1, spread="logvar", scale="1", dtype="float32"
    )
    np.testing.assert_array_equal(source.read(0)["moments"], hwm(array).astype(np.float32))


def test_other_files_are_counted(tmp_path, capsys):
    src = write_repa(tmp_path / "src")
    (src / "vae-sd" / ".DS_Store").write_text("")
    (src / "vae-sd" / ".ipynb_checkpoints").mkdir()
    (src / "vae-sd" / "00000" / "notes.txt").write_text("")
    (src / "vae-sd" / "00000" / "more.txt").write_text("")
    assert len(converted(tmp_path, src)) == 7
    out = capsys.readouterr().out
    assert "not read: .txt (2), hidden folders (1), hidden files (1)\n" in out
    assert "to write: 7 records of 4x4x4 in 3 classes, float16, 0.00 GB in 1 files" in out
    assert "7 records of 3 classes -> " in out


CASES = {
    "repa": (lambda src: write_repa(src, side=16), {}, 16, 4),
    "repa with another scale": (lambda src: write_repa(src, side=32), {"scale": "0.2"}, 32, 4),
    "repa with a shift": (
        lambda src: write_repa(src, side=32),
        {"scale": "1,2,3,4", "shift": "0.1"},
        32,
        4,
    ),
    "lightningdit": (lambda src: write_lightning(src, channels=32, side=16), {}, 16, 32),
    "moments": (
        lambda src: write_moments(src, {"a.npy": noise(0, 4, 3, 3)}),
        {"spread": "logvar", "scale": "1"},
        3,
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_printed_command_has_the_settings_of_the_cache(tmp_path, capsys, case):
    write, options, side, channels = CASES[case]
    source = converted(tmp_path, write(tmp_path / "src"), side, channels, **options)
    (line,) = re.findall("train from it: (.*)", capsys.readouterr().out)
    words = shlex.split(line)
    assert words[:5] == ["python", "-m", "sit_jax.main", "--config", "configs/latents.py"]
    overrides = [
        tuple(word.removeprefix("--config.").split("=", 1))
        for word in words
        if word.startswith("--config.")
    ]
    config = config_lib.load(str(ROOT / words[4]), overrides)
    data = config.data
    assert opened(data.path, data.image_size, data.channels).spec == source.spec
    assert data.classes == len(source.class_names)
    assert data.flip == source.can_mirror
    want = {"repa": "sd-vae", "repa with another scale": "sd-vae"}.get(case, "stored")
    assert config.latents.codec == want
    if want == "sd-vae":
        assert config.latents.scale == source.manifest.plan.scale[0]
    assert data.image_size % (config.model.patch or 2) == 0


def run_slowly(src, dst):
    """Start a conversion in shards of two records that takes a second or more."""
    code = """
import sys, time
from convert import cli, latents
latents._SHARD_RECORDS = 2
check = latents._check_storable
latents._check_storable = lambda *arguments: (time.sleep(0.05), check(*arguments))
sys.exit(cli.run(latents.main))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(src), str(dst)], env=environment, cwd=ROOT
    )


@pytest.mark.parametrize("layout", ["repa", "lightningdit"])
def test_a_killed_conversion_continues(tmp_path, monkeypatch, capsys, layout):
    monkeypatch.setattr(latents, "_SHARD_RECORDS", 2)
    if layout == "repa":
        src = write_repa(tmp_path / "src", count=40)
    else:
        src = write_lightning(tmp_path / "src", counts=(15, 9, 16))
    dst = tmp_path / "dst"
    process = run_slowly(src, dst)
    deadline = time.monotonic() + 100
    while len(list(dst.glob("*.json"))) < 4:  # the plan and three shards
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    complete = {path.name: path.stat().st_mtime_ns for path in dst.glob("*.json")}
    assert 4 <= len(complete) < 21 and not (dst / "manifest.json").exists()
    kept = {
        path: path.stat().st_mtime_ns
        for path in dst.glob("*.array_record")
        if f"{path.name}.json" in complete
    }
    convert(str(src), str(dst), Options())
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    convert(str(src), str(tmp_path / "alone"), Options())
    assert snapshot(dst) == snapshot(tmp_path / "alone")
    capsys.readouterr()
    convert(str(src), str(dst), Options())
    assert f"{dst} is already complete\n" in capsys.readouterr().out
    assert snapshot(dst) == snapshot(tmp_path / "alone")
    with pytest.raises(UserError, match="holds other latents: moments."):
        convert(str(src), str(dst), Options(dtype="float32"))


def test_a_run_does_not_continue_with_other_labels(tmp_path):
    src = write_repa(tmp_path / "src")
    dst = str(tmp_path / "dst")
    convert(str(src), dst, Options())
    write_repa(src, labels=[2, 1, 0, 0, 1, 2, 0])
    with pytest.raises(UserError, match="holds other latents: source.files is"):
        convert(str(src), dst, Options())


def test_the_command_line_reads_every_flag(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(latents, "convert", lambda *arguments: calls.append(arguments))
    latents.main(["~/src", "dst"])
    names = str(tmp_path)
    given = {
        "layout": "moments", "labels": "folders", "class_names": names, "axes": "hwc",
        "spread": "std", "autoencoder": "sd-vae", "scale": "1,2", "shift": "-1,0",
        "multiplier": 2.0, "image_size": 256, "dtype": "bfloat16",
    }  # fmt: skip
    latents.main(["src", "dst", *(f"--{key}={value}" for key, value in given.items())])
    home = str(pathlib.Path.home() / "src")
    assert calls == [(home, "dst", Options()), ("src", "dst", Options(**given))]
