"""Jobs that use a part of the data set draw a sample of it, and say what they drew."""

import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from sit_jax import config as config_lib
from sit_jax.data.source import ArraySource
from sit_jax.jobs import sweep
from sit_jax.jobs.data import RealImages, draw, open_source, read_real_images
from sit_jax.jobs.setup import set_up
from tests.commands import DIGITS, FOLDER, TINY, flags, refusal, succeed, write_images

pytestmark = pytest.mark.usefixtures("quiet_machine")

SWEEP = {
    "sweep__solvers": "heun", "sweep__steps": 2, "sweep__count": 8, "sweep__components": 4
}  # fmt: skip


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory):
    """Return a folder of 3 classes of 20 noisy images, each class of its own brightness."""
    folder = tmp_path_factory.mktemp("three")
    random = np.random.default_rng(0)
    for number, name in enumerate("abc"):
        (folder / name).mkdir()
        for index in range(20):
            noise = random.integers(0, 40, (8, 8, 3)) + 80 * number
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f"{index:02d}.png")
    return folder


def setup_of(data, **settings):
    overrides = {"data__source": "folder", "data__split": "all", "data__channels": 3}
    overrides |= {"data__classes": 3, "data__path": data} | settings
    pairs = [(key.replace("__", "."), str(value)) for key, value in overrides.items()]
    return set_up(config_lib.load(DIGITS, pairs))


def test_half_of_the_data_is_close_to_all_of_it(three_classes):
    setup = setup_of(three_classes)
    source = open_source(setup)
    everything = read_real_images(setup, source, 10_000)
    half = read_real_images(setup, source, 30)
    assert np.bincount(half.labels).tolist() == [10, 10, 10]
    first_half = RealImages(everything.images[:30], everything.labels[:30], 30, {})

    def distance_to_everything(real):
        evaluate, _ = sweep.make_evaluator(real, components_kept=4)
        return evaluate(everything.images, everything.labels)["frechet"]

    assert distance_to_everything(everything) == pytest.approx(0, abs=1e-9)
    assert distance_to_everything(half) < 0.01
    assert distance_to_everything(first_half) > 5  # the first files, without the third class


def test_what_was_drawn_is_recorded(three_classes):
    setup = setup_of(three_classes)
    source = open_source(setup)
    settings = read_real_images(setup, source, 30).settings
    assert settings["data"]["subset_seed"] == 0
    # Neither the name of a data set nor "stratified": results of earlier versions are continued.
    assert not settings["data"].keys() & {"name", "stratified"}
    drawn = settings["real_images"]
    assert (drawn["drawn"], drawn["of"], drawn["read"]) == (30, 60, 30)
    other = setup_of(three_classes, data__subset_seed=1)
    assert draw(other, source, 30) != draw(setup, source, 30)
    assert draw(setup, source, 40)[:30] == draw(setup, source, 30)
    others = read_real_images(other, source, 30).settings["real_images"]
    assert others["sha256"] != drawn["sha256"]
    # All of the data are the same data with any seed.
    assert draw(setup, source, None) == list(range(60))
    assert (
        read_real_images(other, source, 60).settings["real_images"]
        == read_real_images(setup, source, 10_000).settings["real_images"]
    )


def test_a_digest_is_of_the_pixels_and_of_the_label():
    images = np.zeros((3, 2, 2, 1), np.uint8)
    images[1] = 1
    source = ArraySource(images, np.array([0, 0, 1], np.int32), ("a", "b"))
    digests = [source.digest(index) for index in range(3)]
    assert len(set(digests)) == 3 and all(len(digest) == 16 for digest in digests)
    assert digests == [source.digest(index) for index in range(3)]


@pytest.fixture(scope="module")
def trained_on_colours(quiet_machine, tmp_path_factory):
    """Return the workdir of a run of one step on twelve images of two classes, and the images."""
    folder = tmp_path_factory.mktemp("colours")
    write_images(folder / "data", *(f"{name}/{i}.png" for name in "ab" for i in range(6)))
    settings = flags(data__path=folder / "data", train__steps=1, log__sheet_every=0)
    succeed(*TINY, *FOLDER, *settings, "--workdir", folder / "run")
    return folder / "run", folder / "data"


@pytest.fixture
def run_and_data(trained_on_colours, tmp_path):
    """Return copies of both that a test may change, and the flags that name the data."""
    run, data = (
        pathlib.Path(shutil.copytree(path, tmp_path / path.name)) for path in trained_on_colours
    )
    return run, data, ["--workdir", run, f"--config.data.path={data}"]


def test_changed_images_have_a_sweep_of_their_own(run_and_data):
    run, data, arguments = run_and_data
    arguments = [*arguments, "--mode", "sweep", *flags(**SWEEP)]
    out = succeed(*arguments)
    assert "compared with 12 real images, a stratified draw of 12, whose halves" in out
    assert "0 of 1 samplers" in succeed(*arguments)
    (before,) = (run / "sweeps").iterdir()
    (data / "b" / "3.png").write_bytes((data / "a" / "3.png").read_bytes())
    succeed(*arguments)
    (after,) = set((run / "sweeps").iterdir()) - {before}
    drawn = [
        json.loads((path / "settings.json").read_text())["real_images"] for path in (before, after)
    ]
    assert drawn[0].pop("sha256") != drawn[1].pop("sha256")
    assert drawn[0] == drawn[1] == {"drawn": 12, "of": 12, "read": 12}


@pytest.mark.slow
def test_inverted_images_are_a_draw_and_redone_when_they_change(run_and_data):
    run, data, arguments = run_and_data
    arguments = [*arguments, "--mode", "invert", *flags(sample__count=4, sample__batch=4)]
    out = succeed(*arguments)
    assert "inverting 4 of 4 images" in out and "they are a stratified draw of 12" in out
    (folder,) = (run / "inversions").iterdir()

    def entries():
        return [np.load(path) for path in sorted(folder.glob("*.npz"))]

    before = entries()
    assert [int(entry["label"]) for entry in before].count(0) == 2
    source = open_source(setup_of(data, data__classes=2))
    for entry in before:
        assert source.labels[entry["index"]] == entry["label"]
        assert source.digest(int(entry["index"])) == str(entry["sha256"])
    # A larger count keeps these and adds to them; a changed image is inverted again.
    out = succeed(*arguments, "--config.sample.count=64")
    assert "inverting 8 of 12 images" in out
    assert "sample.count is 64, but these are all that there are" in out
    index = int(before[1]["index"])
    pathlib.Path(source.files[index]).write_bytes(
        pathlib.Path(source.files[(index + 1) % 6]).read_bytes()
    )
    picture = (folder / "images" / "000001.png").read_bytes()
    assert "inverting 1 of 4 images" in succeed(*arguments)
    after = entries()
    assert len(after) == 12 and (folder / "images" / "000001.png").read_bytes() != picture
    assert str(after[1]["sha256"]) != str(before[1]["sha256"])
    assert (after[1]["noise"] != before[1]["noise"]).any()
    for number in (0, 2, 3):
        np.testing.assert_array_equal(after[number]["noise"], before[number]["noise"])
    # A file that is damaged counts as missing.
    kept = (folder / "000000.npz").read_bytes()
    for damage in (b"", b"PK", kept[: len(kept) // 2], b"\x93NUMPY", pickle.dumps({"index": 1})):
        (folder / "000000.npz").write_bytes(damage)
        assert "inverting 1 of 4 images" in succeed(*arguments)
        assert str(entries()[0]["sha256"]) == str(before[0]["sha256"])


@pytest.mark.parametrize("key", ["sample.labels", "sample.frames"])
def test_inversion_refuses_settings_of_samples(trained_on_colours, key):
    message = refusal("--workdir", trained_on_colours[0], "--mode", "invert", f"--config.{key}=3")
    assert f"--config.{key} has no effect on --mode invert" in message


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_sweep_needs_four_real_images(run_and_data, count):
    run, _, arguments = run_and_data
    few = flags(**SWEEP, sweep__reference_count=count)
    message = refusal(*arguments, "--mode", "sweep", *few)
    assert f"{count} real images were read; a sweep compares with 4 or more" in message
    assert not (run / "sweeps").exists()


def test_one_class_can_be_swept_but_not_read_by_a_classifier(tmp_path):
    write_images(tmp_path / "data", *(f"only/{i}.png" for i in range(6)))
    settings = flags(data__path=tmp_path / "data", train__steps=1, log__sheet_every=0)
    settings += flags(data__classes=1)
    succeed(*TINY, *FOLDER, *settings, "--workdir", tmp_path / "run")
    arguments = ["--workdir", tmp_path / "run", "--mode"]
    assert "heun" in succeed(*arguments, "sweep", *flags(**SWEEP))
    message = refusal(*arguments, "quality")
    assert "the real images are of one class, so a classifier reads every sample as" in message
