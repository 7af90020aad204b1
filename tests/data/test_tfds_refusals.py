"""A data set that cannot be used, or of which something is missing or damaged, is one line."""

import contextlib
import json
import shutil

import pytest
import tensorflow_datasets as tfds
from etils import epath

from sit_jax import storage
from sit_jax.data import pipeline
from sit_jax.data.source import UnreadableImage
from sit_jax.errors import UserError
from tests.tfds_sets import CLASSES, FEATURES, SIZE, encoded, open_set, picture, prepare, shard


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


def refused(*arguments, **options):
    with pytest.raises(UserError) as error:
        open_set(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


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
