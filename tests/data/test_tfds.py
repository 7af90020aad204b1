"""A data set that tensorflow-datasets prepared gives its images, labels and order, or one line."""

import concurrent.futures
import contextlib
import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags as absl_flags
from etils import epath

from sit_jax import storage
from sit_jax.data import pipeline, readers
from sit_jax.data.folder import open_folder
from sit_jax.data.source import SourceOptions, UnreadableImage
from sit_jax.data.sources import SOURCES
from sit_jax.data.transforms import Decoding
from sit_jax.errors import UserError
from tests import tfds_sets
from tests.commands import ROOT, flags, refusal, succeed
from tests.tfds_sets import CLASSES, FEATURES, picture, prepare

DECODING = Decoding(max_pixels=2**16, exif_orientation=False)
SIZE = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return a data_dir with the data set pets: 23 and 7 examples, each in 4 shards."""
    data_dir = tmp_path_factory.mktemp("tfds")
    prepare(data_dir)
    return data_dir


@pytest.fixture
def copied(prepared, tmp_path):
    """Return a copy of it that a test may change."""
    return shutil.copytree(prepared, tmp_path / "data")


def open_set(path, name="pets", split="train", channels=3):
    path = None if path is None else str(path)
    options = SourceOptions(path, name, split, SIZE, channels, DECODING)
    return SOURCES["tfds"].open(options)


def refused(*arguments, **options):
    with pytest.raises(UserError) as error:
        open_set(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def encoded(source):
    return [source.encoded(index) for index in range(len(source))]


def shard(data_dir, number, split="train"):
    return data_dir / "pets/1.0.0" / f"pets-{split}.array_record-{number:05}-of-00004"


def test_every_example_is_read_once_in_the_order_of_tfds(prepared):
    for split, numbers in tfds_sets.SPLITS.items():
        source = open_set(prepared, split=split)
        assert source.class_names == CLASSES and source.labels is None
        examples = encoded(source)
        builder = tfds.builder_from_directory(prepared / "pets/1.0.0")
        decoders = {"image": tfds.decode.SkipDecoding()}
        theirs = list(builder.as_data_source(split, decoders=decoders))
        assert examples == [(each["image"], each["label"]) for each in theirs]
        expected = sorted((picture(number), tfds_sets.label_of(number)) for number in numbers)
        assert sorted(examples) == expected
        assert examples != expected  # TFDS shuffles


def test_pixels_and_digests_equal_those_of_a_folder_of_the_same_files(prepared, tmp_path):
    source = open_set(prepared)
    for index, (data, label) in enumerate(encoded(source)):
        folder = tmp_path / CLASSES[label]
        folder.mkdir(exist_ok=True)
        (folder / f"{index:02d}.jpg").write_bytes(data)
    files = open_folder(SourceOptions(str(tmp_path), None, "all", SIZE, 3, DECODING))
    assert files.class_names == source.class_names and len(files) == len(source)
    assert files.spec == source.spec
    for number, file in enumerate(files.files):
        index = int(os.path.basename(file).partition(".")[0])
        for mirrored in (False, True):
            ours, theirs = source.read(index, mirrored), files.read(number, mirrored)
            np.testing.assert_array_equal(ours["image"], theirs["image"])
            assert ours["label"] == theirs["label"] and ours["label"].dtype == np.int32
        assert ours["image"].shape == (SIZE, SIZE, 3) and ours["image"].dtype == np.uint8
        assert source.digest(index) == files.digest(number)


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[:10%]", [range(2)]),
        ("train[10%:]", [range(2, 23)]),
        ("train[7:9]", [range(7, 9)]),
        ("train[-3:]", [range(20, 23)]),
        ("train[1shard]", [range(6, 12)]),
        ("train[20:] + train[:2]", [range(20, 23), range(2)]),
    ],
)
def test_a_part_of_a_split_is_that_part_of_its_order(prepared, split, numbers):
    everything = encoded(open_set(prepared))
    part = open_set(prepared, split=split)
    expected = [everything[number] for number in itertools.chain(*numbers)]
    assert encoded(part) == expected and len(part) == len(expected)


def test_splits_may_be_joined(prepared):
    both = encoded(open_set(prepared, split="validation+train"))
    assert both == encoded(open_set(prepared, split="validation")) + encoded(open_set(prepared))


def test_the_place_of_a_record_is_its_file_and_its_number_there(prepared):
    source = open_set(prepared, split="train[8:]")
    # The shards hold 6, 6, 5 and 6 records.
    assert source.place(0) == f"record 2 of {shard(prepared, 1)}"
    assert source.place(3) == f"record 5 of {shard(prepared, 1)}"
    assert source.place(4) == f"record 0 of {shard(prepared, 2)}"
    assert source.place(14) == f"record 5 of {shard(prepared, 3)}"


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_and_processes_read_the_same_batches(prepared, workers):
    absl_flags.FLAGS.mark_as_parsed()
    source = open_set(prepared)
    dataset = pipeline.batches(source, seed=1, batch_size=5, flip=True, skip_unreadable=False)
    expected = [dataset[number] for number in range(3, 9)]  # over the end of an epoch
    size = pipeline.batch_bytes(source.spec, 5)
    with contextlib.closing(
        readers.iterate(dataset, 3, workers=workers, batch_bytes=size)
    ) as batches:
        for batch in expected:
            read = next(batches)
            assert batch.keys() == read.keys()
            for name, array in batch.items():
                np.testing.assert_array_equal(read[name], array)


def test_it_is_pickled_after_reading_and_read_by_many_threads(prepared):
    source = open_set(prepared)
    examples = encoded(source)
    unpickled = pickle.loads(pickle.dumps(source))
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        assert list(threads.map(unpickled.encoded, [*range(23)] * 20)) == examples * 20


# Other data sets: their names, features and refusals.


def with_image(number, **others):
    return {"image": picture(number), **others}


def prepare_with(data_dir, features, example, **options):
    """Prepare a data set of four examples, each an image and other features."""
    options = {"splits": {"train": range(4)}, "shards": 1} | options
    features = {"image": tfds.features.Image()} | features
    return prepare(data_dir, features=features, example=example, **options)


def test_the_pair_of_input_and_label_chooses_among_several(tmp_path):
    features = {
        "label": tfds.features.ClassLabel(names=CLASSES),
        "coarse_label": tfds.features.ClassLabel(num_classes=20),
        "mask": tfds.features.Image(shape=(None, None, 1)),
        "segments": tfds.features.LabeledImage(labels=3, shape=(None, None, 1)),
    }

    def example(number):
        others = {"label": 1, "coarse_label": 19, "mask": b"", "segments": b""}
        return with_image(number, **others)

    prepare_with(tmp_path, features, example, supervised=("image", "label"))
    source = open_set(tmp_path)
    assert source.class_names == CLASSES and (source.image_key, source.label_key) == (
        "image",
        "label",
    )
    assert sorted(encoded(source)) == sorted((picture(number), 1) for number in range(4))
    prepare_with(tmp_path, features, example, name="alone")
    message = refused(tmp_path, "alone")
    assert "alone/1.0.0 has 2 features of the type Image, but data.source='tfds' needs one" in (
        message
    )
    assert "mask (Image), segments (LabeledImage)" in message


@pytest.mark.parametrize(
    ("features", "others", "words"),
    [
        ({}, {}, "no features of the type ClassLabel.*its features: image .Image."),
        (
            {"label": tfds.features.Text()},
            {"label": "ant"},
            "no features of the type ClassLabel.*its features: image .Image., label .Text.",
        ),
        (
            {"box": tfds.features.BBoxFeature()},
            {"box": tfds.features.BBox(0.0, 0.0, 1.0, 1.0)},
            "no features of the type ClassLabel.*box .BBoxFeature., image .Image.",
        ),
        (
            {"labels": tfds.features.Sequence(tfds.features.ClassLabel(names=CLASSES))},
            {"labels": [0, 1]},
            "no features of the type ClassLabel.*labels .Sequence.",
        ),
        (
            {"label": FEATURES["label"], "fine": tfds.features.ClassLabel(num_classes=9)},
            {"label": 0, "fine": 8},
            "2 features of the type ClassLabel.*needs one class label",
        ),
        (
            {"image": tfds.features.Image(shape=(None, 4, 4, 3)), "label": FEATURES["label"]},
            {"label": 0},
            r"have the shape \(None, 4, 4, 3\) and type uint8",
        ),
    ],
)
def test_other_features_are_refused_by_name(tmp_path, features, others, words):
    prepare_with(tmp_path, features, lambda number: with_image(number, **others))
    with pytest.raises(UserError, match=words):
        open_set(tmp_path)


def test_images_of_floats_are_refused(tmp_path):
    # They are stored as PNG files whose four channels are the bytes of a number.
    folder = prepare(tmp_path)
    path = folder / "features.json"
    text = path.read_text()
    assert '"image": {' in text
    features = json.loads(text)
    image = features["featuresDict"]["features"]["image"]["image"]
    image |= {"dtype": "float32", "shape": {"dimensions": ["-1", "-1", "1"]}}
    path.write_text(json.dumps(features))
    assert "have the shape (None, None, 1) and type float32" in refused(tmp_path)


def labelled(number):
    """Return an example that is not labelled if its number is 20 or more."""
    return with_image(number, label=-1 if number >= 20 else 0)


def test_a_split_without_labels_is_refused_when_it_is_opened(tmp_path):
    label = {"label": FEATURES["label"]}
    splits = {"train": range(4), "test": range(20, 24), "mixed": range(18, 22)}
    prepare_with(tmp_path, label, labelled, splits=splits)
    assert len(open_set(tmp_path)) == 4
    message = refused(tmp_path, split="test")
    assert "record 0 of" in message and "has the label -1 (not labelled)" in message
    assert "labels 0 to 2; set data.split to one whose images are labelled" in message


def test_a_record_without_a_label_is_never_skipped(tmp_path):
    label = {"label": FEATURES["label"]}
    prepare_with(tmp_path, label, labelled, splits={"train": range(2, 22)})
    source = open_set(tmp_path)
    labels = []
    for index in range(20):
        with contextlib.suppress(UserError):
            labels.append(source.encoded(index)[1])
    assert labels == [0] * 18
    for dataset in (
        pipeline.in_order(source, range(20), batch_size=20, skip_unreadable=True),
        pipeline.batches(source, seed=0, batch_size=20, flip=False, skip_unreadable=True),
    ):
        with pytest.raises(UserError, match="has the label -1") as error:
            dataset[0]
        assert not isinstance(error.value, UnreadableImage)


def test_a_label_beyond_the_classes_is_refused(copied):
    path = copied / "pets/1.0.0/features.json"
    path.write_text(path.read_text().replace('"numClasses": "3"', '"numClasses": "2"'))
    (copied / "pets/1.0.0/label.labels.txt").write_text("ant\nbee\n")
    with pytest.raises(UserError, match="has the label 2, but the 2 classes have labels 0 to 1"):
        for index in range(23):
            open_set(copied).encoded(index)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("ant\nbee\nant\n", "label.labels.txt has the class 'ant' 2 times; rename the others"),
        ("ant\nbee\n", "label.labels.txt has 2 class names, but features.json has 3 classes"),
        ("ant\nbee\ncat\ndog\n", "has 4 class names, but features.json has 3 classes"),
    ],
)
def test_wrong_class_names_are_refused(copied, names, words):
    (copied / "pets/1.0.0/label.labels.txt").write_text(names)
    assert words in refused(copied)


# What is not there.


def test_a_name_may_leave_out_the_version_and_a_single_config(tmp_path):
    for version in ("1.0.0", "10.0.0", "9.1.0"):
        prepare(tmp_path, version=version, splits={"train": range(int(version[0]) + 1)}, shards=1)
    prepare(tmp_path, "birds", config="small", splits={"train": range(5)}, shards=1)
    incomplete = tmp_path / "pets" / "incomplete.ABC_11.0.0"
    shutil.copytree(tmp_path / "pets/9.1.0", incomplete)
    assert "/pets/10.0.0/" in open_set(tmp_path).place(0)
    assert len(open_set(tmp_path, "pets:9.1.0")) == 10
    for name in ("birds", "birds/small", "birds:1.0.0", "birds/small:1.0.0"):
        assert "/birds/small/1.0.0/" in open_set(tmp_path, name).place(0)
    assert len(open_set(tmp_path / "birds/small/1.0.0", None)) == 5
    prepare(tmp_path, "birds", config="large", splits={"train": range(5)}, shards=1)
    assert refused(tmp_path, "birds") == (
        "data.name='birds' has several configs: birds/large, birds/small; set data.name=birds/large"
    )
    assert refused(tmp_path, "birds/tiny").startswith("unknown data.name 'birds/tiny'; did you")
    assert refused(tmp_path, "pet") == (
        "unknown data.name 'pet'; did you mean 'pets'? known: 'birds/large', 'birds/small', 'pets'"
    )
    message = refused(tmp_path, "pets:9.0.0")
    assert message.startswith(
        "unknown version of 'pets' in data.name '9.0.0'; did you mean '9.1.0'"
    )
    assert message.endswith("known: '1.0.0', '10.0.0', '9.1.0'")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": None}, "data.path is empty, but data.source='tfds' needs the folder of prepared"),
        ({"path": "/no/such"}, "data.path='/no/such' is not a folder; give the folder of prepared"),
        ({"name": None}, "data.name is empty.* it holds pets"),
        ({"name": "a b"}, "data.name='a b' is not a name such as .* it holds pets"),
        ({"channels": 1}, "data.channels=1, but the tfds source reads RGB images; set it to 3"),
        ({"split": "all"}, r"data.split='all', but .* splits train \(23\), validation \(7\); set"),
        ({"split": "tran"}, "unknown split in data.split 'tran'; did you mean 'train'. known"),
        ({"split": "train+test[:3]"}, "unknown split in data.split 'test'"),
        ({"split": "train[:24]"}, "data.split='train.:24.' cannot be used .*with 23 examples"),
        ({"split": "train["}, "data.split='train.' cannot be used"),
        ({"split": "train[5:4]"}, "has no records in 'train': it goes from 5 to 4"),
        ({"split": "train[:1%]"}, "has no records in 'train': it goes from 0 to 0"),
    ],
)
def test_bad_options_are_one_line(prepared, changes, words):
    with pytest.raises(UserError, match=words) as error:
        open_set(**{"path": prepared} | changes)
    assert "\n" not in str(error.value)


def test_a_folder_without_data_sets_says_how_to_prepare_one(tmp_path):
    message = refused(tmp_path)
    assert message.startswith(f"data.name='pets' is not in data.path; {tmp_path} holds no prepared")
    assert 'prepare it there with download_and_prepare(file_format="array_record")' in message
    assert "holds no prepared data set" in refused(tmp_path, None)


def test_a_name_beside_the_folder_of_one_data_set_is_refused(prepared):
    folder = prepared / "pets/1.0.0"
    assert refused(folder).endswith("but data.name is 'pets'; set data.name=none")


def test_a_single_split_may_be_called_all(tmp_path):
    prepare(tmp_path, splits={"train": range(3)}, shards=1)
    assert len(open_set(tmp_path, split="all")) == 3


def test_files_of_another_format_are_refused(copied):
    path = copied / "pets/1.0.0/dataset_info.json"
    path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
    message = refused(copied)
    assert "has files in the format tfrecord, which have no random access; prepare it" in message
    assert 'with download_and_prepare(file_format="array_record")' in message


def test_array_record_files_beside_those_of_another_format_are_read(copied):
    path = copied / "pets/1.0.0/dataset_info.json"
    info = json.loads(path.read_text())
    info |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    path.write_text(json.dumps(info))
    assert len(encoded(open_set(copied))) == 23


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "text", "swapped"])
def test_a_damaged_shard_is_named_when_it_is_opened(copied, damage):
    path = shard(copied, 1)
    data = path.read_bytes()
    path.unlink()
    if damage == "swapped":
        shutil.copy(shard(copied, 2), path)
    elif damage != "missing":
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"x" * 9}[damage])
    message = refused(copied)
    reason = " has 5 records instead of 6" if damage == "swapped" else " cannot be read ("
    assert message.startswith(f"{path}{reason}")
    assert "; copy it again, or prepare the data set again with download_and_prepare(" in message
    assert len(open_set(copied, split="train[:6]")) == 6  # does not need that shard


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", ["", "{}", "[" * 10, "\x00"])
def test_damaged_metadata_is_one_line(copied, file, text):
    (copied / "pets/1.0.0" / file).write_text(text)
    message = refused(copied)
    assert message.startswith(f"the data set in {copied}/pets/1.0.0 ")


def test_no_records_at_all_are_refused(copied):
    path = copied / "pets/1.0.0/dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"splits": [{**info["splits"][0], "shardLengths": ["0"]}]}))
    assert "data.split='train' has no records in 'train': it goes from 0 to 0" in refused(copied)
    path.write_text(json.dumps(info | {"splits": []}))
    assert "the data set has no splits; prepare it again" in refused(copied)


def test_a_damaged_record_is_named_and_others_are_read(copied):
    path = shard(copied, 1)
    expected = encoded(open_set(copied))
    data = bytearray(path.read_bytes())
    data[data.find(expected[8][0][-20:])] ^= 1
    path.write_bytes(data)
    source = open_set(copied)
    for read in (source.read, source.digest):
        with pytest.raises(UnreadableImage, match=f"^record 2 of {path} cannot be read .Runtime"):
            read(8)
    assert [source.encoded(index) for index in (0, 7, 9)] == [expected[i] for i in (0, 7, 9)]


def test_a_broken_image_is_named_and_may_be_the_first(tmp_path):
    features = {"label": FEATURES["label"]}

    def example(number):
        data = {0: picture(0)[:200], 1: b"", 2: b"text", 3: picture(3)}[number]
        return {"image": data, "label": 0}

    prepare_with(tmp_path, features, example)
    source = open_set(tmp_path)
    broken = []
    for index in range(4):
        try:
            assert source.read(index)["image"].shape == (SIZE, SIZE, 3)
        except UnreadableImage as error:
            assert str(error).startswith(f"record {index} of {tmp_path}/pets/1.0.0/pets-train.")
            assert "\n" not in str(error)
            broken.append(index)
    assert len(broken) == 3


def test_a_bucket_is_tried_before_anything_is_read_from_it(monkeypatch):
    # ArrayRecord and TFDS would try for ever without a network.
    def refuse(name, path):
        raise UserError(f"{name} {path!r} cannot be read (no network)")

    monkeypatch.setattr(storage, "check_reachable", refuse)
    monkeypatch.setattr(epath, "Path", None)
    assert refused("gs://bucket/data") == "data.path 'gs://bucket/data' cannot be read (no network)"


# Complete runs.

SETTINGS = flags(
    model__depth=1, model__width=16, model__heads=2, data__source="tfds", data__name="pets",
    data__split="train", data__image_size=16, data__classes=3, train__steps=2, train__batch=4,
    log__every=1, log__sheet_every=0, log__tensorboard=False, checkpoint__every=2,
    likelihood__solver="euler", likelihood__steps=2,
)  # fmt: skip


def training(path, workdir):
    config = str(ROOT / "configs" / "folder.py")
    return ["--config", config, f"--config.data.path={path}", *SETTINGS, "--workdir", str(workdir)]


def test_training_and_a_draw(prepared, tmp_path, quiet_machine):
    out = succeed(*training(prepared, tmp_path / "run"))
    place = f"split 'train' of 'pets' in {str(prepared)!r}"
    assert f"data: 23 images in 3 classes ('ant', 'bee', 'cat') of {place}\n" in out
    losses = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [row["step"] for row in losses] == [1, 2]
    assert all(np.isfinite(row["loss"]) for row in losses)
    out = succeed(
        "--mode", "likelihood", "--workdir", tmp_path / "run", "--config.likelihood.count=3",
        "--config.likelihood.split=validation",
    )  # fmt: skip
    assert "they are a uniform draw of 7" in out
    (folder,) = (tmp_path / "run" / "likelihood").iterdir()
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["data"]["stratified"] is False and settings["data"]["name"] == "pets"
    arguments = training(prepared, tmp_path / "other")
    assert refusal(*arguments, "--config.data.source=folder") == (
        "error: data.name is 'pets', but data.source 'folder' has no named data sets; set "
        "data.name=none, or data.source=tfds\n"
    )
    message = refusal(*arguments, "--config.data.classes=4")
    assert "but the tfds source has 3 classes ('ant', 'bee', 'cat'); set data.classes=3" in message


def test_the_builder_in_the_readme_prepares_a_folder_of_images(tmp_path):
    for number in range(8):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    blocks = (ROOT / "configs" / "README.md").read_text().split("```python\n")[1:]
    (code,) = (block.partition("```")[0] for block in blocks if "GeneratorBasedBuilder" in block)
    code = code.replace('"IMAGES"', repr(str(tmp_path / "images")))
    code = code.replace('"DATA"', repr(str(tmp_path / "data")))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exec(code, {"__name__": "__main__"})
    source = open_set(tmp_path / "data", "photos")
    assert source.class_names == ("a", "b")
    assert sorted(encoded(source)) == sorted((picture(number), number % 2) for number in range(8))


_WITHOUT_TENSORFLOW = """
import sys
from sit_jax import main
from tests.tfds_sets import prepare

prepare(sys.argv[1])
status = main.main(sys.argv[2:])
print(status, "tensorflow" in sys.modules)
import tensorflow
print(tensorflow.__version__)
"""


def test_preparing_and_training_load_no_tensorflow(tmp_path):
    """An empty stand-in on the path makes the check work where TensorFlow is not installed."""
    (tmp_path / "tensorflow.py").write_text("__version__ = '0'\n")
    arguments = [*training(tmp_path / "data", tmp_path / "run"), "--config.data.workers=2"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TENSORFLOW, str(tmp_path / "data"), *arguments],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert process.stdout.splitlines()[-2:] == ["0 False", "0"], process.stdout + process.stderr
