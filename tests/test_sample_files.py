"""--mode sample: its files, and how it continues after kills, damage and other settings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sit_jax import config as config_lib
from sit_jax import image_io
from sit_jax.errors import UserError
from sit_jax.jobs import results
from sit_jax.jobs.parts import Parts
from sit_jax.jobs.sampler import whole_microbatches
from sit_jax.jobs.setup import set_up
from tests.commands import DIGITS, ROOT, flags, pictures, refusal, snapshot, succeed
from tests.processes import MAIN, TIMEOUT_S, run_python

# A microbatch of 4, which 18 is not a multiple of.
SETTINGS = {"sample__count": 18, "sample__microbatch": 4}


def command(workdir, **settings):
    return ["--workdir", workdir, "--mode", "sample", *flags(**SETTINGS | settings)]


def draw(workdir, out, **settings):
    """Draw samples; return the printed text and their folder."""
    printed = succeed(*command(workdir, **settings), "--out", out)
    (folder,) = (out / "samples").iterdir()
    return printed, folder


@pytest.fixture(scope="module")
def workdir(trained):
    return trained[0]


@pytest.fixture(scope="module")
def both(workdir, tmp_path_factory):
    """Return the folder of samples drawn in both formats, which no test may change."""
    return draw(workdir, tmp_path_factory.mktemp("both"), sample__format="both")[1]


@pytest.fixture
def out(both, tmp_path):
    """Return an --out that holds a copy of them."""
    shutil.copytree(both, tmp_path / "samples" / both.name)
    return tmp_path


def arrays(folder):
    with np.load(folder / "samples.npz") as file:
        return {name: file[name] for name in file.files}


def test_the_npz_holds_the_images_and_labels_as_adm_reads_them(both):
    stored = arrays(both)
    assert stored["arr_0"].shape == (18, 8, 8, 3) and stored["arr_0"].dtype == np.uint8
    for index, (_, image) in enumerate(sorted(pictures(both).items())):
        for channel in range(3):
            np.testing.assert_array_equal(stored["arr_0"][index, ..., channel], image)
    assert stored["arr_1"].tolist() == [i % 10 for i in range(18)]


def test_formats_differ_only_in_what_is_written(workdir, both, tmp_path):
    expected = snapshot(both)
    for name, without in (("npz", "images"), ("png", "samples.npz")):
        _, folder = draw(workdir, tmp_path / name, sample__format=name)
        assert folder.name == both.name
        rest = {path: data for path, data in expected.items() if without not in path}
        assert snapshot(folder) == rest


@pytest.mark.parametrize(("old", "new"), [("npz", "both"), ("png", "both"), ("both", "npz")])
def test_another_format_is_made_of_the_samples_that_exist(workdir, both, out, old, new):
    folder = out / "samples" / both.name
    if old == "npz":
        shutil.rmtree(folder / "images")
    if old == "png":
        (folder / "samples.npz").unlink()
    printed, folder = draw(workdir, out, sample__format=new)
    assert "sampling 0 of 18" in printed and snapshot(folder) == snapshot(both)


def test_a_killed_job_continues_and_ends_with_the_same_bytes(workdir, both, tmp_path, monkeypatch):
    calls = 0

    def flush_then_die(parts):
        nonlocal calls
        calls += 1
        parts.flush()
        if calls in (2, 4):
            parts.add(17, np.zeros((8, 8, 1), np.uint8))  # never written
            raise UserError("killed")

    monkeypatch.setattr(Parts, "flush_if_due", flush_then_die)
    arguments = [*command(workdir, sample__format="npz"), "--out", tmp_path]
    assert "killed" in refusal(*arguments)
    assert "killed" in refusal(*arguments)
    printed = succeed(*arguments)
    assert "sampling 2 of 18" in printed
    (folder,) = (tmp_path / "samples").iterdir()
    assert (folder / "samples.npz").read_bytes() == (both / "samples.npz").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == [
        "samples.npz", "settings.json", "sheet.png", "summary.json"
    ]  # fmt: skip


def test_damaged_images_are_drawn_again_and_said(workdir, both, out):
    (out / "samples" / both.name / "samples.npz").unlink()  # which holds them too
    images = out / "samples" / both.name / "images"
    data = (images / "000003.png").read_bytes()
    (images / "000003.png").write_bytes(data[:-20])
    (images / "000007.png").write_bytes(b"")
    (images / "000009.png").write_bytes(image_io.encode_png(np.zeros((9, 8, 1), np.uint8)))
    (images / "000011.png").unlink()
    printed, folder = draw(workdir, out, sample__format="both")
    assert "sampling 4 of 18" in printed
    assert "3 images in" in printed and "000003.png, 000007.png, 000009.png" in printed
    assert snapshot(folder) == snapshot(both)


def test_a_damaged_npz_is_made_again(workdir, both, out):
    path = out / "samples" / both.name / "samples.npz"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    printed, folder = draw(workdir, out, sample__format="both")
    assert "samples.npz is damaged" in printed and "sampling 0 of 18" in printed
    assert snapshot(folder) == snapshot(both)


def test_the_count_may_be_raised_and_lowered(workdir, both, tmp_path):
    stored = arrays(both)
    sizes = ((5, "5 of 5"), (18, "13 of 18"), (3, "0 of 3"), (10, "0 of 10"), (18, "0 of 18"))
    for count, words in sizes:
        printed, folder = draw(workdir, tmp_path, sample__format="npz", sample__count=count)
        assert f"sampling {words}" in printed
        for name, array in arrays(folder).items():
            np.testing.assert_array_equal(array, stored[name][:count])
    assert (folder / "samples.npz").read_bytes() == (both / "samples.npz").read_bytes()


def test_more_images_than_asked_for_are_kept_and_said(workdir, both, out):
    printed, folder = draw(workdir, out, sample__format="both", sample__count=16)
    assert "holds 2 more images than the 16 asked for" in printed
    assert len(pictures(folder)) == 18 and len(arrays(folder)["arr_0"]) == 16


def test_images_of_an_earlier_version_move_into_their_folder(workdir, both, out):
    folder = out / "samples" / both.name
    for path in list((folder / "images").iterdir()):
        path.rename(folder / path.name)
    (folder / "images").rmdir()
    printed, _ = draw(workdir, out, sample__format="both")
    assert "the 18 images in" in printed and "sampling 0 of 18" in printed
    assert snapshot(folder) == snapshot(both)


def labels_of(workdir, out, **settings):
    return arrays(draw(workdir, out, sample__format="npz", **settings)[1])["arr_1"].tolist()


def test_random_labels_depend_on_seed_and_index_only(workdir, tmp_path):
    settings = {"sample__label_draw": "random", "sample__solver": "euler", "sample__steps": 1}
    first = labels_of(workdir, tmp_path / "a", sample__count=200, **settings)
    counts = np.bincount(first, minlength=10)
    assert len(counts) == 10 and counts.min() >= 8 and counts.std() > 1
    fewer = {"sample__count": 7, "sample__microbatch": 1}
    assert labels_of(workdir, tmp_path / "b", **fewer, **settings) == first[:7]
    assert labels_of(workdir, tmp_path / "c", sample__seed=1, **settings) != first[:18]
    chosen = labels_of(workdir, tmp_path / "d", sample__labels="3,5", **settings)
    assert set(chosen) == {3, 5}


@pytest.mark.parametrize("suffix", ["txt", "npy", "npz"])
def test_labels_of_a_file(workdir, tmp_path, suffix):
    labels = np.arange(18) * 7 % 10
    path = tmp_path / f"labels.{suffix}"
    if suffix == "txt":
        path.write_text("\n".join(map(str, labels)))
    elif suffix == "npy":
        np.save(path, labels.astype(np.uint8))
    else:
        np.savez(path, np.zeros((18, 2)), labels)  # arr_0 and arr_1
    assert labels_of(workdir, tmp_path / "out", sample__labels_file=path) == labels.tolist()
    (folder,) = (tmp_path / "out" / "samples").iterdir()
    assert len(json.loads((folder / "settings.json").read_text())["sample"]["labels_file"]) == 16


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1 2 3", "holds 3 labels, but sample.count is 18; give a label for each sample"),
        ("1 10 3", "label 1 is 10; expected 0 to 9"),
        ("1 -1", "label 1 is -1; expected 0 to 9"),
        ("1 two", "cannot be read (invalid literal for int() with base 10: 'two')"),
        ("", "holds int64 of shape (0,); expected whole numbers [n]"),
        (None, "cannot be read (No such file or directory); give whole numbers"),
    ],
)
def test_bad_labels_of_a_file_are_one_line(workdir, tmp_path, content, words):
    path = tmp_path / "labels.txt"
    if content is not None:
        path.write_text(content)
    message = refusal(*command(workdir, sample__labels_file=path), "--out", tmp_path / "out")
    assert f"sample.labels_file {str(path)!r}" in message and words in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sample__format": "jpg"}, "unknown sample.format 'jpg'"),
        ({"sample__label_draw": "rand"}, "unknown sample.label_draw 'rand'; did you mean 'random'"),
        ({"sample__microbatch": 0}, "sample.microbatch is 0; expected 1 to 1,048,576"),
        (
            {"sample__labels_file": "l.txt", "sample__labels": 1},
            "but sample.labels is (1,); set sample.labels=(), or sample.labels_file=none",
        ),
        (
            {"sample__labels_file": "l.txt", "sample__label_draw": "random"},
            "but sample.label_draw is 'random'; set sample.label_draw=balanced, or",
        ),
    ],
)
def test_a_mistake_is_one_line(workdir, settings, words):
    assert words in refusal(*command(workdir, **settings))


def test_without_a_terminal_progress_is_a_line_at_intervals(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_LINE_EVERY_S", 0.0)
    printed, _ = draw(workdir, tmp_path)
    assert "8 of 18 images, " in printed and "images/s" in printed
    assert "18 of 18 images, " in printed and "00:00 left" in printed


def draw_on(devices, workdir, out, **settings):
    """Draw 64 samples in a program with as many devices; return samples.npz as bytes."""
    arguments = command(workdir, sample__format="npz", sample__count=64, **settings)
    run_python(*MAIN, *map(str, arguments), "--out", str(out), devices=devices)
    (folder,) = (out / "samples").iterdir()
    return (folder / "samples.npz").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"sample__solver": "dopri5", "sample__steps": "none", "sample__rtol": 0.01},
        {"sample__solver": "sra1", "sample__steps": 4, "sample__cfg_interval": "0.2,0.8"},
    ],
)
def test_the_npz_has_the_same_bytes_on_any_number_of_devices(workdir, tmp_path, settings):
    one = draw_on(1, workdir, tmp_path / "1", **settings)
    assert draw_on(8, workdir, tmp_path / "8", **settings) == one


@pytest.mark.slow
def test_other_microbatches_and_meshes_change_few_pixels_by_one(workdir, tmp_path):
    draw_on(1, workdir, tmp_path / "one")
    draw_on(1, workdir, tmp_path / "microbatch", sample__microbatch=16)
    draw_on(8, workdir, tmp_path / "tensor", mesh__tensor=2, mesh__data=4)
    draw_on(8, workdir, tmp_path / "fsdp", mesh__fsdp=4, mesh__data=2)
    images = {
        path.name: arrays(next((path / "samples").iterdir()))["arr_0"].astype(int)
        for path in tmp_path.iterdir()
    }
    expected = images.pop("one")
    assert expected.std() > 20
    for name, others in images.items():
        difference = np.abs(others - expected)
        assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3, name


@pytest.mark.slow
def test_a_job_of_2000_images_killed_five_times_ends_with_the_bytes_of_a_quiet_one(
    workdir, tmp_path
):
    settings = {"sample__format": "npz", "sample__count": 2000, "sample__microbatch": 50}
    arguments = [*map(str, command(workdir, **settings)), "--out"]
    for _ in range(5):
        kill_after_a_part([*arguments, str(tmp_path / "killed")], tmp_path / "killed")
    run_python(*MAIN, *arguments, str(tmp_path / "killed"), devices=8)
    run_python(*MAIN, *arguments, str(tmp_path / "quiet"), devices=1)
    (killed,) = (tmp_path / "killed" / "samples").iterdir()
    (quiet,) = (tmp_path / "quiet" / "samples").iterdir()
    contents = snapshot(killed)
    assert contents == snapshot(quiet)
    assert sorted(contents) == ["samples.npz", "settings.json", "sheet.png", "summary.json"]


def kill_after_a_part(arguments, out):
    """Start the job, and kill it once it has written another part."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    before = set(out.rglob("parts/0*"))
    with subprocess.Popen(
        [sys.executable, *MAIN, *arguments], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL
    ) as child:
        end = time.monotonic() + TIMEOUT_S
        while child.poll() is None and set(out.rglob("parts/0*")) == before:
            assert time.monotonic() < end
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL


def test_missing_samples_are_drawn_in_the_microbatches_of_the_first_time():
    setup = set_up(config_lib.load(DIGITS, [("sample.batch", "4")]))
    indices, is_missing = whole_microbatches(setup, np.array([1, 2, 9]), 10)
    assert indices.tolist() == [0, 1, 2, 3, 8, 9, 9, 9]  # the last sample fills the last one
    assert np.flatnonzero(is_missing)[:3].tolist() == [1, 2, 5]
