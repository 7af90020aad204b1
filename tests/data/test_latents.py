"""Stored latents are read as they were written, and errors name the damage."""

import dataclasses
import json
import pickle

import ml_dtypes
import numpy as np
import pytest

from sit_jax.data import latent_cache
from sit_jax.data.latent_cache import CacheWriter, Moments
from sit_jax.data.latents import latent_spec, open_latents
from sit_jax.data.source import SourceOptions, UnreadableImage
from sit_jax.errors import UserError
from tests.caches import examples, make_plan, moments_of, write

COUNT = 23
CHANNELS = 3


def open_folder(folder, image_size=4, channels=CHANNELS, split="all"):
    return open_latents(SourceOptions(str(folder), None, split, image_size, channels, None))


@pytest.fixture
def cache(tmp_path):
    write(tmp_path / "cache", make_plan())
    return tmp_path / "cache"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("variance", [True, False])
def test_records_are_read_back(tmp_path, dtype, mirrored, variance):
    plan = make_plan(dtype=dtype, mirrored=mirrored, variance=variance)
    write(tmp_path / "cache", plan)
    source = pickle.loads(pickle.dumps(open_folder(tmp_path / "cache")))
    numpy_dtype = {"bfloat16": ml_dtypes.bfloat16}.get(dtype) or np.dtype(dtype).type
    assert len(source) == COUNT and source.class_names == ("ant", "bee")
    assert source.spec == latent_spec((4, 4, CHANNELS), numpy_dtype)
    assert source.can_mirror == mirrored
    for index in (0, 4, 5, COUNT - 1):
        for view in range(1 + mirrored):
            record = source.read(index, bool(view))
            expected = moments_of(plan, index)[view].astype(numpy_dtype)
            if not variance:
                none = np.full((4, 4, CHANNELS), -np.inf, numpy_dtype)
                expected = np.concatenate([expected, none], axis=-1)
            np.testing.assert_array_equal(record["moments"], expected)
            assert record["moments"].dtype == numpy_dtype
            assert record["label"] == index % 2
            assert record["scale"].tolist() == [0.5, 2.0, 1.0]
            assert record["shift"].tolist() == [0.0, -1.0, 0.25]
            for name, spec in source.spec.items():
                assert np.shape(record[name]) == spec.shape and record[name].dtype == spec.dtype


def test_examples_that_cannot_be_read_are_left_out_and_named(tmp_path):
    manifest = write(tmp_path / "cache", make_plan(), left_out=(0, 7, 20, 21, 22))
    assert manifest.left_out == (0, 7, 20, 21, 22)
    source = open_folder(tmp_path / "cache")
    assert len(source) == 18 and source.passed_over == "5 images that could not be read"
    kept = [number for number in range(COUNT) if number not in manifest.left_out]
    for index, number in enumerate(kept):
        record = source.read(index)
        assert record["label"] == number % 2
        np.testing.assert_array_equal(record["moments"], moments_of(make_plan(), number)[0])


def test_writing_continues_with_the_missing_shards(tmp_path):
    plan = make_plan()
    write(tmp_path / "alone", plan)
    folder = tmp_path / "cache"
    folder.mkdir()
    writer = CacheWriter(folder, plan)
    writer.begin()
    names = [name for name, _ in writer.missing()]
    assert len(names) == 5
    name, numbers = writer.missing()[2]
    writer.write_shard(name, numbers, examples(plan, numbers))
    # A shard without its note, as when the process is killed between the two.
    name, numbers = writer.missing()[0]
    writer.write_shard(name, numbers, examples(plan, numbers))
    (folder / f"{name}.json").unlink()
    with pytest.raises(UserError, match="is not complete: .* give the same command again"):
        open_folder(folder)
    again = CacheWriter(folder, plan)
    again.begin()
    assert [name for name, _ in again.missing()] == [names[0], names[1], names[3], names[4]]
    for name, numbers in again.missing():
        again.write_shard(name, numbers, examples(plan, numbers))
    again.finish()
    files = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert len(files) == 7  # five shards, labels and manifest
    again.begin()  # of a complete folder changes nothing
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_plan_without_shards_can_be_withdrawn(tmp_path):
    CacheWriter(tmp_path, make_plan()).begin()
    CacheWriter(tmp_path, make_plan()).withdraw()
    assert not latent_cache.holds_latents(tmp_path) and not list(tmp_path.iterdir())
    other = CacheWriter(tmp_path, make_plan(dtype="float16"))
    other.begin()
    name, numbers = other.missing()[0]
    other.write_shard(name, numbers, examples(other.plan, numbers))
    other.withdraw()
    assert latent_cache.holds_latents(tmp_path) and len(other.missing()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "moments.dtype is .float16. and was .float32."),
        ({"scale": (1.0, 1.0, 1.0)}, "scale is"),
        ({"class_names": ("bee", "ant")}, "class_names is"),
        ({"examples": 24}, "examples is 24 and was 23"),
        ({"autoencoder": {"name": "sd-vae"}}, "autoencoder.name is"),
        ({"source": {"path": "elsewhere"}}, "source.path is .elsewhere. and was"),
    ],
)
@pytest.mark.parametrize("is_complete", [True, False])
def test_a_folder_of_other_latents_is_refused(tmp_path, change, message, is_complete):
    folder = tmp_path / "cache"
    folder.mkdir()
    CacheWriter(folder, make_plan()).begin()
    if is_complete:
        write(folder, make_plan())
    with pytest.raises(UserError, match=f"holds other latents: {message}.*; give another folder"):
        CacheWriter(folder, make_plan(**change)).begin()


def test_a_full_disk_is_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(
        latent_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**9})
    )
    plan = make_plan(shape=(32, 32, 4), dtype="float16", examples=1_281_167, shard_records=4096)
    plan = dataclasses.replace(plan, scale=(1.0,) * 4, shift=(0.0,) * 4)
    with pytest.raises(UserError, match=r"42\.1 GB are needed in .* which has 1\.0 GB free"):
        CacheWriter(tmp_path / "cache", plan).begin()


def test_moments_beyond_the_storage_dtype_are_refused():
    moments = Moments((1, 1, 1), "float16", False, False)
    assert latent_cache.pack(3, 0, np.full((1, 1, 1, 1), 65504.0), moments)
    with pytest.raises(UserError, match="example 3 are not finite in float16 .*70000"):
        latent_cache.pack(3, 0, np.full((1, 1, 1, 1), 7e4), moments)


def flip_byte(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 255
    path.write_bytes(data)


def shards(cache):
    return sorted(cache.glob("*.array_record"))


def test_missing_and_cut_shards_are_named(cache):
    second = shards(cache)[1]
    data = second.read_bytes()
    second.write_bytes(data[:-100])
    with pytest.raises(UserError, match=f"{second.name} has .* bytes instead of"):
        open_folder(cache)
    second.unlink()
    with pytest.raises(UserError, match=f"{second.name} is missing: 5 shards belong"):
        open_folder(cache)
    second.write_bytes(bytes(len(data)))
    with pytest.raises(UserError, match=f"{second.name} cannot be read"):
        open_folder(cache)


@pytest.mark.parametrize("other", [1, 2])
def test_swapped_shards_are_noticed_at_the_first_record(cache, other):
    """Also where the labels are the same, as in shards 0 and 2."""
    first, second = (shards(cache)[number] for number in (0, other))
    data = first.read_bytes()
    assert len(data) == len(second.read_bytes())
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    source = open_folder(cache)
    message = f"{first.name} is another shard: it holds example {5 * other} "
    with pytest.raises(UserError, match=message) as error:
        source.read(0)
    assert not isinstance(error.value, UnreadableImage)
    with pytest.raises(UserError, match=f"{second.name} is another shard"):
        source.read(5 * other + 2)
    source.read(15)


def test_a_damaged_record_is_named_and_others_are_read(cache):
    path = shards(cache)[0]
    source = open_folder(cache)
    place = path.read_bytes().find(source._records[2])
    flip_byte(path, place + 30)
    source = open_folder(cache)
    with pytest.raises(UnreadableImage, match=f"latent 2 in .*{path.name} cannot be read"):
        source.read(2)
    source.read(1)
    with pytest.raises(UserError, match=f"{path.name} has changed"):
        latent_cache.check_sha256(path, source.manifest.shards[0].sha256)


def edit(cache, **changes):
    path = cache / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "sit_jax latents 2"}, "has the format 'sit_jax latents 2'"),
        ({"examples": 24}, "the shards are not those of 24 examples|are not the 24 examples"),
        ({"left_out": [3]}, "23 records are not the 23 examples"),
        ({"scale": [1.0]}, "scale and shift are not 3 numbers each"),
        ({"scale": [1.0, 0.0, 1.0]}, "a scale is not positive"),
        ({"shift": [1.0, float("nan"), 1.0]}, "not finite"),
        ({"shards": []}, "the shards are not those"),
        ({"shards": [1]}, "cannot be read"),
        ({"moments": {}}, "cannot be read"),
        ({"moments": {"shape": [4, 4, 3], "dtype": "int8"}}, "cannot be read"),
        ({"labels_sha256": ""}, "labels.npy has changed"),
        ({"class_names": ["ant"]}, "labels that do not belong to its 23 records of 1 classes"),
    ],
)
def test_a_wrong_manifest_is_one_line(cache, changes, message):
    edit(cache, **changes)
    with pytest.raises(UserError, match=message) as error:
        open_folder(cache)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00"])
def test_a_damaged_manifest_is_one_line(cache, text):
    (cache / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest.json cannot be read"):
        open_folder(cache)


def test_another_shape_split_or_path_than_the_config_is_refused(cache, tmp_path):
    with pytest.raises(UserError, match="data.image_size=8, but the latents in .* are 4x4 .of im"):
        open_folder(cache, image_size=8)
    with pytest.raises(UserError, match="data.channels=4, but the latents in .* have 3"):
        open_folder(cache, channels=4)
    with pytest.raises(UserError, match="data.split='train', but stored latents are one split"):
        open_folder(cache, split="train")
    with pytest.raises(UserError, match="holds no stored latents"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="data.path is empty"):
        open_latents(SourceOptions(None, None, "all", 4, 3, None))


def test_a_record_has_its_own_digest(cache):
    source = open_folder(cache)
    assert len({source.digest(index) for index in range(COUNT)}) == COUNT
