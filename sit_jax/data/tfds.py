"""Data sets prepared by tensorflow-datasets (TFDS) as ArrayRecord files, without TensorFlow.

A data set is found and opened by its files, so its own code is not needed. TFDS says which records
a split has. The images are decoded here: TFDS would decode them with OpenCV where that is
installed, which gives other pixels.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import re
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from sit_jax import storage
from sit_jax.data.shards import check_shards
from sit_jax.data.source import (
    EncodedImages,
    SourceOptions,
    UnreadableImage,
    check_rgb,
    short_digest,
)
from sit_jax.data.transforms import Decoding
from sit_jax.errors import UserError, brief, check, unknown_name

_INFO = "dataset_info.json"
_DOWNLOADS = "downloads"  # of TFDS, beside the data sets: often many thousands of folders
_NAME = re.compile(r"(?P<base>(?P<top>[\w-]+)(/[\w+.-]+)?)(:(?P<version>[\d.]+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
# TFDS imports its modules on first use, and threads that do so at the same time deadlock. Parsing
# is pure Python, so more threads would not make it faster.
_one_thread = threading.Lock()
_PREPARE = 'download_and_prepare(file_format="array_record")'


class Shard(NamedTuple):
    """The records of a file that belong to a split: `size` of them from number `first` on."""

    path: str
    first: int
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource(EncodedImages):
    """The records of a split, each an encoded image and its label, read from ArrayRecord shards.

    Labels are known only from the records: TFDS stores no list of them.
    """

    records: ArrayRecordDataSource
    shards: tuple[Shard, ...]
    image_key: str  # the name of its feature, here and below
    label_key: str
    class_names: tuple[str, ...]
    image_size: int
    decoding: Decoding

    labels = None

    def __len__(self) -> int:
        return len(self.records)

    def place(self, index: int) -> str:
        """Return the file of a record and its position there."""
        position = index
        for shard in self.shards:
            if position < shard.size:
                return f"record {shard.first + position} of {shard.path}"
            position -= shard.size
        raise IndexError(index)

    def encoded(self, index: int) -> tuple[bytes, np.int32]:
        """Return the encoded image of a record and its label.

        Raises `UnreadableImage`, or another `UserError` if the record has no valid label.
        """
        try:
            record = self.records[index]
            with _one_thread:
                example = _parser(self.image_key, self.label_key)(record)
            data, label = example[self.image_key], int(example[self.label_key])
        except Exception as error:  # of array_record, protobuf, or TFDS for missing features
            raise self.unreadable(index, error) from error
        classes = len(self.class_names)
        check(
            0 <= label < classes,
            f"{self.place(index)} has the label {label}{' (not labelled)' * (label == -1)}, but the"
            f" {classes} classes have labels 0 to {classes - 1}; set data.split to one whose images"
            " are labelled, such as train",
        )
        return data, np.int32(label)

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the path of a shard, or which records it has."""
        return short_digest(json.dumps(self.shards).encode())


@functools.cache
def _parser(image_key: str, label_key: str) -> Any:
    """Return `(record) -> {image_key: encoded image, label_key: label}`. Skips other features."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {image_key: tfds.features.Image(), label_key: tfds.features.Scalar(np.int64)}
    )
    decoders = {image_key: tfds.decode.SkipDecoding()}
    return functools.partial(features.deserialize_example_np, decoders=decoders)


def open_tfds(options: SourceOptions) -> TfdsSource:
    """Open a split of a data set in the folder data.path, a data_dir of TFDS.

    All its shards must exist and be complete.
    """
    # Imported in functions because it takes 0.3 s and serves only this source.
    import tensorflow_datasets as tfds

    check_rgb(options, "tfds")
    folder = _find(options)
    builder = _open_builder(folder)
    info = builder.info
    image_key, label_key = _find_features(folder, info)
    class_names = _class_names(folder, label_key, info.features[label_key])
    formats = sorted(file_format.value for file_format in info.available_file_formats())
    check(
        "array_record" in formats,
        f"the data set in {folder} has files in the format {', '.join(formats) or 'tfrecord'}, "
        "which have no random access; prepare it again in another data.path, with "
        f"{_PREPARE}",
    )
    _check_split(info.splits, options.split)
    records = builder.as_data_source(
        options.split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        file_format="array_record",
    ).data_source
    files = info.splits[options.split].file_instructions
    check_shards(
        {file.filename: file.examples_in_shard for file in files}.items(),
        f"copy it again, or prepare the data set again with {_PREPARE}",
    )
    source = TfdsSource(
        records,
        tuple(Shard(file.filename, file.skip, file.take) for file in files),
        image_key,
        label_key,
        class_names,
        options.image_size,
        options.decoding,
    )
    _check_first_label(source)
    return source


def _check_first_label(source: TfdsSource) -> None:
    """Raise `UserError` for a split without labels, before anything is compiled."""
    with contextlib.suppress(UnreadableImage):  # data.skip_unreadable decides when it is read
        source.encoded(0)


def _find(options: SourceOptions) -> epath.Path:
    """Return the folder of the data set that data.path and data.name choose."""
    path, name = options.path, options.name
    if not path:
        raise UserError(
            "data.path is empty, but data.source='tfds' needs the folder of prepared data sets "
            "(data_dir of tensorflow-datasets, such as ~/tensorflow_datasets); set it"
        )
    storage.check_reachable("data.path", path)
    root = epath.Path(path)
    check(
        root.is_dir(),
        f"data.path={path!r} is not a folder; give the folder of prepared data sets (data_dir of "
        "tensorflow-datasets)",
    )
    if not name:
        if (root / _INFO).exists():
            return root
        raise UserError(
            f"data.name is empty, but data.source='tfds' needs the name of a data set in {path!r}; "
            f"{_listed(root)}"
        )
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(
            f"data.name={brief(name)} is not a name such as imagenette, imagenette/320px or "
            f"imagenette/320px:1.0.0; {_listed(root)}"
        )
    check(
        not (root / _INFO).exists(),
        f"data.path={path!r} is the folder of one data set ({_INFO} is there), but data.name is "
        f"{name!r}; set data.name=none",
    )
    versions = _versions_of(root, name, match["top"], match["base"])
    version = match["version"]
    if version is None:
        return versions[max(versions, key=_numbers)]
    if version not in versions:
        raise unknown_name(f"version of {match['base']!r} in data.name", version, versions)
    return versions[version]


def _versions_of(root: epath.Path, name: str, top: str, base: str) -> dict[str, epath.Path]:
    """Return the folder of each version of a data set, "name" or "name/config"."""
    prepared = _prepared(root, [top]) if (root / top).is_dir() else {}
    if base == top and base not in prepared and prepared:  # the config is not given
        check(
            len(prepared) == 1,
            f"data.name={name!r} has several configs: {', '.join(prepared)}; set data.name="
            f"{next(iter(prepared))}",
        )
        base = next(iter(prepared))
    if base not in prepared:
        everything = _all_prepared(root)
        if not everything:
            raise UserError(f"data.name={name!r} is not in data.path; {_listed(root)}")
        raise unknown_name("data.name", name, everything)
    return prepared[base]


def _prepared(root: epath.Path, tops: list[str]) -> dict[str, dict[str, epath.Path]]:
    """Return the folder of each version of each data set, "name" or "name/config", in `tops`."""
    found: dict[str, dict[str, epath.Path]] = collections.defaultdict(dict)
    for top in sorted(tops):
        for pattern in (f"*/{_INFO}", f"*/*/{_INFO}"):
            for file in sorted((root / top).glob(pattern)):
                *names, version = file.parent.relative_to(root).parts
                if _VERSION.fullmatch(version):  # not one that was interrupted: "incomplete..."
                    found["/".join(names)][version] = file.parent
    return dict(found)


def _all_prepared(root: epath.Path) -> dict[str, dict[str, epath.Path]]:
    tops = [path.name for path in root.iterdir() if path.name != _DOWNLOADS and path.is_dir()]
    return _prepared(root, tops)


def _listed(root: epath.Path) -> str:
    """Return what a data_dir holds, in words, as a remedy for a missing name."""
    names = list(_all_prepared(root))
    if names:
        return f"it holds {', '.join(names)}"
    return (
        f"{root} holds no prepared data set (NAME/1.0.0/{_INFO}); give another data.path, or "
        f"prepare it there with {_PREPARE}"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _open_builder(folder: epath.Path) -> Any:
    """Return TFDS's builder of a prepared data set, which reads only its files."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # of JSON, protobuf or TFDS
        raise UserError(
            f"the data set in {folder} cannot be opened ({type(error).__name__}: "
            f"{storage.reason(error)}); copy {_INFO}, features.json and the *.labels.txt again, or "
            f"prepare it again with {_PREPARE}"
        ) from error


def _find_features(folder: epath.Path, info: Any) -> tuple[str, str]:
    """Return the names of the image and of the class label of a record.

    Where there are several, the data set's own pair of input and label (supervised_keys) decides.
    """
    import tensorflow_datasets as tfds

    is_dict = isinstance(info.features, tfds.features.FeaturesDict)
    features = dict(sorted(info.features.items())) if is_dict else {}
    listed = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())

    def single(kind: type, words: str) -> str:
        # The type itself: a LabeledImage is an Image too, but shows classes, not colours.
        keys = [key for key, feature in features.items() if type(feature) is kind]
        chosen = [key for key in keys if key in (info.supervised_keys or ())]
        if len(keys) != 1 and len(chosen) == 1:
            keys = chosen
        check(
            len(keys) == 1,
            f"the data set in {folder} has {len(keys) or 'no'} features of the type "
            f"{kind.__name__}, but data.source='tfds' needs one {words} for each record (its "
            f"features: {listed or 'none'}); prepare it with one, or give another data set",
        )
        return keys[0]

    image_key = single(tfds.features.Image, "image")
    label_key = single(tfds.features.ClassLabel, "class label")
    image = features[image_key]
    check(
        len(image.shape) == 3 and image.np_dtype in (np.uint8, np.uint16),
        f"the images of the data set in {folder} have the shape {image.shape} and type "
        f"{np.dtype(image.np_dtype)}, but data.source='tfds' reads images of one frame as uint8 or "
        "uint16; prepare it with those",
    )
    return image_key, label_key


def _class_names(folder: epath.Path, key: str, feature: Any) -> tuple[str, ...]:
    """Return the names of the classes of a ClassLabel. Raises `UserError` if they do not fit it."""
    count = feature.num_classes or 0
    check(
        count,
        f"the data set in {folder} has a label {key!r} without classes; prepare it with "
        "ClassLabel(names=...)",
    )
    names = feature.names
    # TFDS itself loses the errors of these two when it reads the file.
    file = f"{folder}/{key}.labels.txt"
    for name, times in collections.Counter(names).items():
        check(times == 1, f"{file} has the class {name!r} {times} times; rename the others")
    check(
        len(names) == count,
        f"{file} has {len(names):,} class names, but features.json has {count:,} classes; copy "
        "both again",
    )
    return tuple(names)


def _check_split(splits: Mapping[str, Any], split: str) -> None:
    """Raise `UserError` unless `split` names records, such as "train" or "train[:10%]+test"."""
    import tensorflow_datasets as tfds

    listed = ", ".join(f"{name} ({info.num_examples:,})" for name, info in splits.items())
    check(splits, f"the data set has no splits; prepare it again with {_PREPARE}")
    check(
        split != "all" or len(splits) == 1,
        f"data.split='all', but the data set has splits {listed}; set data.split to one of them, "
        "or to several, such as train+validation",
    )
    for part in split.split("+"):
        name = part.strip().partition("[")[0]
        if name not in splits and split != "all":
            raise unknown_name("split in data.split", name, splits)
    try:
        spans = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    except Exception as error:  # TFDS raises several types
        raise UserError(
            f"data.split={brief(split)} cannot be used ({storage.reason(error)}); expected such as "
            f"train or train[:10%], of splits {listed}"
        ) from error
    for span in spans:
        start, stop = span.from_ or 0, span.to
        if stop is None:
            stop = splits[span.splitname].num_examples
        check(
            start < stop,
            f"data.split={split!r} has no records in {span.splitname!r}: it goes from {start} to "
            f"{stop}; the data set has splits {listed}",
        )
