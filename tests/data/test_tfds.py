"""A data set that tensorflow-datasets prepared gives its images, labels and order, and trains."""

import concurrent.futures
import contextlib
import io
import itertools
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags as absl_flags

from sit_jax.data import pipeline, readers
from sit_jax.data.folder import open_folder
from sit_jax.data.source import SourceOptions
from tests import tfds_sets
from tests.commands import ROOT, flags, refusal, succeed
from tests.tfds_sets import CLASSES, DECODING, SIZE, encoded, open_set, picture, prepare, shard


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return a data_dir with the data set pets: 23 and 7 examples, each in 4 shards."""
    data_dir = tmp_path_factory.mktemp("tfds")
    prepare(data_dir)
    return data_dir


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
