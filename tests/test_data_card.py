"""The data card: in a run's workdir, and by --mode data, which reads every record."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sit_jax import config as config_lib
from sit_jax.data import latent_cache, sources
from sit_jax.data.digits import open_digits
from sit_jax.data.source import SourceOptions
from sit_jax.errors import UserError
from sit_jax.image_io import to_uint8
from sit_jax.jobs import data as data_lib
from sit_jax.jobs.setup import set_up
from sit_jax.latents import sd_vae
from sit_jax.settings import Latents
from tests import caches, goldens
from tests.commands import (
    DIGITS,
    FOLDER,
    TINY,
    call,
    flags,
    refusal,
    rows,
    snapshot,
    succeed,
    write_images,
)

pytestmark = pytest.mark.usefixtures("quiet_machine")

LATENTS = [
    "--config", DIGITS,
    *flags(
        data__source="latents", data__split="all", data__image_size=4, data__channels=3,
        data__classes=2, latents__codec="stored",
    ),
]  # fmt: skip


def read_card(folder):
    return json.loads((folder / "data.json").read_text())


def card_of(workdir, kind):
    """Return the card that --mode data wrote, and its folder."""
    (folder,) = (workdir / "data").glob(f"{kind}-*")
    return read_card(folder), folder


# In a run's workdir.


def test_training_describes_its_data(trained):
    card = read_card(trained[0])
    assert card["source"] == "digits" and card["split"] == "train" and card["images"] == 899
    assert card["records"] == {"image": "uint8 [8, 8, 1]", "label": "int32 []"}
    digits = open_digits(SourceOptions(None, None, "train", 8, 1, None))
    counts = np.bincount(digits.labels)
    assert card["classes"] == {str(label): int(count) for label, count in enumerate(counts)}
    assert card["sheet"] == "data.png: the first 64 of 899"
    pixels = np.asarray(Image.open(trained[0] / "data.png"))
    # 5 columns of images of 3 x 8 pixels, with gaps of 2.
    assert pixels.shape == (13 * 26 + 2, 5 * 26 + 2)
    np.testing.assert_array_equal(pixels[2:26:3, 28:52:3], digits.images[1][..., 0])


@pytest.mark.slow
def test_a_card_is_written_again_only_if_the_data_have_changed(tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    write_images(data, "cat/1.png", "cat/2.png", "dog/1.png")
    (data / "dog" / "notes.txt").write_text("brown")
    command = [*TINY, *FOLDER, *flags(data__path=data, train__batch=2, log__sheet_every=0)]
    out = succeed(*command, *flags(train__steps=1), "--workdir", run)
    assert "is written again" not in out
    card = read_card(run)
    assert card["classes"] == {"cat": 2, "dog": 1} and card["passed_over"] == ".txt (1)"
    assert card["path"] == str(data) and card["crop"].endswith("the middle 8 x 8")
    assert card["decoding"]["EXIF orientation"] == "ignored, except that of a TIFF"
    assert Image.open(run / "data.png").size == (5 * 26 + 2, 26 + 2)
    before = {name: (run / name).stat().st_mtime_ns for name in ("data.json", "data.png")}
    out = succeed(*command, *flags(train__steps=2), "--workdir", run)
    assert "is written again" not in out
    assert before == {name: (run / name).stat().st_mtime_ns for name in before}
    write_images(data, "dog/2.png")
    out = succeed(*command, *flags(train__steps=3), "--workdir", run)
    assert "data.json is written again, as these have changed: images, classes\n" in out
    assert read_card(run)["classes"] == {"cat": 2, "dog": 2}
    (run / "data.json").write_text("{")
    succeed(*command, *flags(train__steps=4), "--workdir", run)
    assert read_card(run)["images"] == 4


def test_a_set_smaller_than_a_batch_trains_and_is_said(tmp_path):
    data = tmp_path / "data"
    write_images(data, "cat/1.png", "cat/2.png", "dog/1.png")
    command = [*TINY, *FOLDER, *flags(data__path=data, train__steps=1, log__sheet_every=0)]
    out = succeed(*command, "--workdir", tmp_path / "run")
    assert (
        "the data set's 3 images are fewer than train.batch 8: a step sees images more than once"
    ) in out
    assert rows(tmp_path / "run")[0]["epoch"] == pytest.approx(8 / 3)
    command = [*command, *flags(train__batch=2)]
    assert "are fewer" not in succeed(*command, "--workdir", tmp_path / "other")


# --mode data.


def test_every_image_is_read_and_what_cannot_be_is_named(tmp_path):
    data = tmp_path / "data"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        folder = data / ("ant" if index < 3 else "bee")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    whole = (data / "bee" / "4.png").read_bytes()
    (data / "bee" / "5.png").write_bytes(whole[: len(whole) // 2])
    (data / "bee" / "6.jpg").write_bytes(b"")
    command = [*TINY, *FOLDER, *flags(data__path=data), "--mode", "data"]
    status, out, _ = call(*command, "--workdir", tmp_path / "run")
    assert status == 0
    card, folder = card_of(tmp_path / "run", "folder")
    assert card["images"] == 7 and card["classes"] == {"ant": 3, "bee": 2}
    assert len(card["unreadable"]) == 2
    for name, line in zip(("5.png", "6.jpg"), card["unreadable"], strict=True):
        assert f"image {str(data / 'bee' / name)!r} cannot be read (" in line and line in out
    assert card["statistics"]["mean"] == pytest.approx(pixels.mean(axis=(0, 1, 2)), abs=1e-4)
    assert card["statistics"]["std"] == pytest.approx(pixels.std(axis=(0, 1, 2)), abs=1e-4)
    assert card["sheet"] == "data.png: the first 7 of 7; black where unreadable: 5, 6"
    sheet = np.asarray(Image.open(folder / "data.png"))
    np.testing.assert_array_equal(sheet[2:26:3, 2:26:3], pixels[0])
    assert not sheet[28:52, 28:52].any()  # image 6
    assert card["sizes"] == {
        "images": 6, "width": [8, 8, 8], "height": [8, 8, 8], "smaller_than_image_size": 0,
    }  # fmt: skip
    assert "images of a class: 2 ('bee') to 3 ('ant'), 5 in all" in out and "unreadable: 2" in out


def test_the_sizes_of_the_files_are_listed(tmp_path):
    for index, size in enumerate([(20, 30), (7, 9), (40, 8), (12, 16)]):
        (tmp_path / "data" / "cat").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "data" / "cat" / f"{index}.png")
    command = [*TINY, *FOLDER, *flags(data__path=tmp_path / "data", data__classes=1)]
    out = succeed(*command, "--mode", "data", "--workdir", tmp_path / "run")
    card, _ = card_of(tmp_path / "run", "folder")
    assert card["sizes"] == {
        "images": 4, "width": [7, 16, 40], "height": [8, 12, 30], "smaller_than_image_size": 1,
    }  # fmt: skip
    assert "width 7, 16, 40; height 8, 12, 30; 1 are smaller than data.image_size" in out


def test_results_may_lie_outside_of_the_workdir(tmp_path, trained):
    before = snapshot(trained[0])
    out = succeed("--workdir", trained[0], "--mode", "data", "--out", tmp_path)
    assert snapshot(trained[0]) == before
    card, folder = card_of(tmp_path, "digits")
    assert f"card: {folder / 'data.json'}" in out
    # All that the run's own card says, and more.
    assert card.items() >= read_card(trained[0]).items()
    assert card["unreadable"] == []


def test_a_process_without_a_share_reads_nothing():
    """As the second of two that read one record."""
    setup = set_up(config_lib.load(DIGITS, [("data.workers", "none")]))
    source = data_lib.open_source(setup)
    assert not list(data_lib.read_in_order(setup, source, range(1, 1, 2), 64, skip_unreadable=True))


def test_nothing_readable_is_said_and_is_no_error(tmp_path):
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "cat" / "1.png").write_bytes(b"")
    command = [*TINY, *FOLDER, *flags(data__path=tmp_path / "data", data__classes=1)]
    status, out, _ = call(*command, "--mode", "data", "--workdir", tmp_path / "run")
    assert status == 0 and "unreadable: 1" in out
    card, _ = card_of(tmp_path / "run", "folder")
    assert card["classes"] == {"cat": 0} and "statistics" not in card


@pytest.fixture
def cache(tmp_path):
    """Return a folder of 23 latents, of which example 7 was left out."""
    caches.write(tmp_path / "cache", caches.make_plan(), left_out=[7])
    return tmp_path / "cache"


def expected_moments(plan, left_out):
    """Return mean and std of x, channel by channel, from the definition."""
    kept = [number for number in range(plan.examples) if number not in left_out]
    moments = np.stack([caches.moments_of(plan, number)[0] for number in kept]).astype(np.float64)
    mean, logvar = np.split(moments, 2, axis=-1)
    x = np.array(plan.scale) * (mean - np.array(plan.shift))
    noise = (np.array(plan.scale) ** 2 * np.exp(logvar)).mean(axis=(0, 1, 2))
    return x.mean(axis=(0, 1, 2)), np.sqrt(x.var(axis=(0, 1, 2)) + noise)


def test_latents_are_measured_against_their_scale(cache, tmp_path):
    out = succeed(*LATENTS, *flags(data__path=cache), "--mode", "data", "--workdir", tmp_path / "w")
    card, folder = card_of(tmp_path / "w", "latents")
    mean, std = expected_moments(caches.make_plan(), [7])
    values = card["statistics"]
    assert values["mean"] == pytest.approx(mean, abs=1e-4)
    assert values["std"] == pytest.approx(std, abs=1e-4)
    assert values["promise"] == "each channel: mean 0, std 1, within 0.25"
    assert [line.partition(":")[0] for line in values["off"]] == ["channel 1", "channel 2"]
    assert "promise of the scale (each channel: mean 0, std 1, within 0.25): OFF: channel 1" in out
    assert card["changed_shards"] == [] and "shards with another checksum: 0 of 5" in out
    assert card["left_out"] == [7] and card["autoencoder"] == {"name": "other"}
    assert card["classes"] == {"ant": 12, "bee": 10}
    assert card["sheet"] == (
        "data.png: the first 22 of 22, latents in false colours (latents.codec=stored has no "
        "decoder)"
    )
    assert (folder / "data.png").exists()


@pytest.mark.parametrize(("scale", "off"), [(1.0, 0), (3.0, 1)])
def test_one_scale_for_all_channels_promises_only_their_common_spread(tmp_path, scale, off):
    """As that of the SD-VAE. Without variances the latents are standard normal."""
    plan = caches.make_plan(variance=False, scale=(scale,) * 3, shift=(0.0,) * 3)
    caches.write(tmp_path / "cache", plan)
    command = [*LATENTS, *flags(data__path=tmp_path / "cache"), "--mode", "data"]
    out = succeed(*command, "--workdir", tmp_path / "w")
    values = card_of(tmp_path / "w", "latents")[0]["statistics"]
    assert values["promise"] == "all channels together: std 1, within 0.25"
    assert len(values["off"]) == off and ("OFF" in out) == bool(off)
    assert values["std_of_all"] == pytest.approx(scale, rel=0.1)


def test_a_changed_shard_is_named_and_stops_nothing(cache, tmp_path):
    path = cache / latent_cache.read_manifest(cache).shards[1].name
    data = bytearray(path.read_bytes())
    data[data.index(caches.moments_of(caches.make_plan(), 6).tobytes()[:64])] ^= 1
    path.write_bytes(data)
    command = [*LATENTS, *flags(data__path=cache), "--mode", "data", "--workdir", tmp_path / "w"]
    status, out, _ = call(*command)
    assert status == 0
    card, folder = card_of(tmp_path / "w", "latents")
    (line,) = card["changed_shards"]
    assert f"{path} has changed since the latents were stored" in line and line in out
    assert "shards with another checksum: 1 of 5" in out
    assert card["sheet"].endswith("; black where unreadable: 6")
    # Seven in a row of 10 columns; an image is 24 pixels wide, with gaps of 2.
    assert not np.asarray(Image.open(folder / "data.png"))[2:26, 2 + 6 * 26 : 26 + 6 * 26].any()
    assert len(card["unreadable"]) == 1 and f"latent 6 in {path} cannot be" in card["unreadable"][0]


def test_latents_are_decoded_if_the_weights_are_at_hand(tmp_path):
    moments = {
        "shape": (4, 4, 4), "scale": (0.5,) * 4, "shift": (0.0,) * 4, "shard_records": 23,
        "autoencoder": {"name": "sd-vae"},
    }  # fmt: skip
    caches.write(tmp_path / "cache", caches.make_plan(**moments))
    vae = goldens.FOLDER / "vae_legacy"
    settings = flags(
        data__path=tmp_path / "cache", data__channels=4, latents__codec="sd-vae",
        latents__path=vae, latents__scale=0.5, sample__columns=5, sample__scale=1,
    )  # fmt: skip
    command = [*LATENTS, *settings, "--mode", "data"]
    succeed(*command, "--workdir", tmp_path / "w")
    card, folder = card_of(tmp_path / "w", "latents")
    assert card["sheet"] == "data.png: the first 23 of 23, decoded"
    codec = sd_vae.open_sd_vae(
        sd_vae.VaeOptions(str(vae), None, None, "float32", 0.5, 8), lambda apply: apply
    )
    mean = caches.moments_of(caches.make_plan(**moments), 1)[:1, ..., :4]
    image = to_uint8(np.asarray(codec.decode(codec.load(), 0.5 * mean))[0])
    side = len(image)
    assert side > 4
    sheet = np.asarray(Image.open(folder / "data.png")).astype(int)
    shown = sheet[2 : 2 + side, 4 + side : 4 + 2 * side]
    assert np.abs(shown - image).max() <= 1  # a grey level, from another batch
    # Without the weights it shows the latents, and says why.
    (tmp_path / "vae").mkdir()
    shutil.copy(vae / "config.json", tmp_path / "vae")
    succeed(*command, *flags(latents__path=tmp_path / "vae"), "--workdir", tmp_path / "other")
    card, _ = card_of(tmp_path / "other", "latents")
    assert "latents in false colours (latents.path" in card["sheet"]
    assert "has no diffusion_pytorch_model.safetensors" in card["sheet"]


def test_training_from_latents_has_a_card_in_false_colours(cache, tmp_path):
    command = [*TINY, *LATENTS[2:], *flags(data__path=cache, train__steps=1, log__sheet_every=0)]
    succeed(*command, "--workdir", tmp_path / "run")
    card = read_card(tmp_path / "run")
    assert card["sheet"] == (
        "data.png: the first 22 of 22, latents in false colours (latents.codec=stored has no "
        "decoder)"
    )
    assert card["scale"] == [0.5, 2.0, 1.0] and card["left_out"] == [7]


# Labels that cannot be right are refused wherever a source is opened.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"class_names": ("a", "b", "a", *"cdefghi")},
            "two classes are called 'a', labels 0 and 2; rename one in the data set",
        ),
        (
            {"labels": np.array([0, 1, -1, 2, -1], np.int32)},
            "record 2 has the label -1, one of 2 outside of the classes among 5; expected 0 to 9. "
            "Test splits often have no labels: choose another data.split",
        ),
        (
            {"labels": np.array([0, 10], np.int32)},
            "record 1 has the label 10, one of 1 outside of the classes among 2; expected 0 to 9",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["train", "data", "likelihood"])
def test_labels_that_mean_no_class_or_two_are_refused(trained, monkeypatch, changes, words, mode):
    kind = sources.SOURCES["digits"]

    def open_changed(options):
        return dataclasses.replace(open_digits(options), **changes)

    monkeypatch.setitem(sources.SOURCES, "digits", kind._replace(open=open_changed))
    before = snapshot(trained[0])
    assert words in refusal("--workdir", trained[0], "--mode", mode)
    assert snapshot(trained[0]) == before


# Readers chosen from the machine.


@pytest.mark.parametrize(
    ("source", "platform", "workers", "expected"),
    [
        ("digits", "gpu", "none", 0),
        ("latents", "tpu", "none", 0),
        ("folder", "gpu", "none", 7),
        ("folder", "tpu", "none", 7),
        ("folder", "cpu", "none", 0),
        ("folder", "gpu", "3", 3),
        ("folder", "cpu", "2", 2),
        ("digits", "gpu", "1", 1),
    ],
)
def test_readers_are_chosen_by_the_source_and_the_machine(
    monkeypatch, source, platform, workers, expected
):
    monkeypatch.setattr(data_lib.hosts, "cores", lambda: 8)
    config = config_lib.load(DIGITS, [("data.source", source), ("data.workers", workers)])
    if source == "latents":
        config = dataclasses.replace(config, latents=Latents(codec="stored"))

    class Device:
        pass

    class Mesh:
        devices = np.array([Device()])

    Device.platform = platform
    setup = dataclasses.replace(set_up(config), mesh=Mesh())
    assert data_lib.choose_workers(setup, 16) == (expected, "")


def test_the_readers_are_printed_and_recorded_as_given(trained):
    workdir, out = trained
    assert "data: read by threads\n" in out
    assert json.loads((workdir / "config.json").read_text())["data"]["workers"] is None


def test_readers_that_only_wait_for_a_core_are_refused(monkeypatch):
    monkeypatch.setattr(data_lib.hosts, "cores", lambda: 2)
    setup = set_up(config_lib.load(DIGITS, [("data.workers", "64")]))
    assert data_lib.choose_workers(setup, 16) == (64, "")
    setup = set_up(config_lib.load(DIGITS, [("data.workers", "65")]))
    with pytest.raises(UserError, match="data.workers is 65, but this machine has 2 cores"):
        data_lib.choose_workers(setup, 16)
