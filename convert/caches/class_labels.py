"""Labels of a cache: the files that hold them, and their checks.

Labels are whole numbers 0 to n-1, or names. Nothing is rounded, shifted or left out.
"""

import collections
import csv
import io
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from convert.caches import arrays
from sit_jax import storage
from sit_jax.errors import UserError, brief, check

FOLDERS = "folders"  # in place of a file: each sub-folder is a class
NAMES = ("labels.json", "labels.npy", "labels.csv")
_LARGEST = 2**30  # bytes of a file of labels
_LARGEST_NAMES = 2**26
_MOST_CLASSES = 1_000_000  # of data.classes
_WHOLE = re.compile(r"[+-]?\d{1,9}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf)", re.IGNORECASE)
_UNREADABLE = (OSError, ValueError, RecursionError, csv.Error)


def read_labels(path: str, files: Sequence[str]) -> list[Any]:
    """Return the label of each file, as a file of labels gives it.

    - .json: {"labels": [[file, label], ...]} or {file: label, ...};
    - .csv: lines `file,label`, after an optional first line with these two words;
    - .npy: whole numbers or names [n], in the order of the sorted files.

    Raises UserError unless it lists exactly these files.
    """
    labels = _read_labels(path, files)
    # Sorted as text, 10 would come before 2.
    texts = {label for label in labels if isinstance(label, str)}
    wrong = sorted(text for text in texts if not text.strip() or _NUMBER.fullmatch(text))
    check(
        not wrong,
        f"{path} has the label {_first(wrong)} as text; expected whole numbers without quotes, or "
        "names",
    )
    return labels


def _read_labels(path: str, files: Sequence[str]) -> list[Any]:
    extension = os.path.splitext(path)[1].lower()
    if extension == ".npy":
        return _from_npy(path, files)
    readers = {".json": _pairs_of_json, ".csv": _pairs_of_csv}
    check(
        extension in readers,
        f"--labels is {path!r}; expected a .json, .npy or .csv file, or {FOLDERS}",
    )
    try:
        text = arrays.read_file(path, _LARGEST).decode("utf-8-sig")
        pairs = readers[extension](text)
    except _UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read ({storage.reason(error)[:200]}); expected "
            '{"labels": [["FILE", LABEL], ...]} or {"FILE": LABEL, ...} in .json, or lines '
            "FILE,LABEL in .csv"
        ) from error
    return _matched(path, pairs, files)


def _pairs_of_json(text: str) -> list[tuple[str, Any]]:
    # Objects as tuples of pairs, so that a name that is given twice shows.
    content = json.loads(text, object_pairs_hook=tuple)
    if not isinstance(content, tuple):
        raise ValueError(f"it holds {brief(content)}")
    pairs = content[0][1] if [key for key, _ in content] == ["labels"] else content
    if pairs is None:
        raise ValueError("its labels are null, since the images had none")
    if not isinstance(pairs, list | tuple):
        raise ValueError(f"its labels are {brief(pairs)}")
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(f"{brief(pair)} is not a file and its label")
    return [(file, label) for file, label in pairs]


def _pairs_of_csv(text: str) -> list[tuple[str, Any]]:
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"{brief(row)} is not a file and its label")
    if rows and rows[0] == ["file", "label"]:
        del rows[0]
    labels = [label.strip() for _, label in rows]
    numbers = [bool(_WHOLE.fullmatch(label)) for label in labels]
    if all(numbers):
        return [(file, int(label)) for file, label in rows]
    for label in labels:
        if _NUMBER.fullmatch(label) and not _WHOLE.fullmatch(label):
            raise ValueError(f"the label {brief(label)} is not a whole number")
    if any(numbers):
        raise ValueError(f"the label {brief(labels[numbers.index(True)])} is a number beside names")
    return [(file, label) for (file, _), label in zip(rows, labels, strict=True)]


def _matched(path: str, pairs: Sequence[tuple[str, Any]], files: Sequence[str]) -> list[Any]:
    labels = dict(pairs)
    if len(labels) != len(pairs):
        ((file, _),) = collections.Counter(file for file, _ in pairs).most_common(1)
        raise UserError(f"{path} lists {brief(file)} more than once; leave one of them")
    absent = sorted(labels.keys() - set(files))
    check(
        not absent,
        f"{path} lists {len(absent):,} files that do not exist, such as {_first(absent)}; copy "
        "them, or take them from the list",
    )
    unlisted = sorted(set(files) - labels.keys())
    check(
        not unlisted,
        f"{path} has no label for {len(unlisted):,} files, such as {_first(unlisted)}; add them, "
        "or remove the files",
    )
    return [labels[file] for file in files]


def _first(values: Sequence[Any]) -> str:
    return brief(values[0]) if values else ""


def _from_npy(path: str, files: Sequence[str]) -> list[Any]:
    (labels,) = arrays.read_arrays(path, _LARGEST).values()
    check(
        labels.ndim == 1 and labels.dtype.kind in "iuU",
        f"{path} has shape {list(labels.shape)} and type {labels.dtype}; expected whole numbers "
        "or names [n]",
    )
    check(
        len(labels) == len(files),
        f"{path} has {len(labels):,} labels for {len(files):,} files; expected one for each",
    )
    by_number = sorted(files, key=_natural)
    for file, other in zip(files, by_number, strict=True):
        check(
            file == other,
            f"{path} does not tell which file its labels belong to: sorted as text {file!r} comes "
            f"where sorted by number {other!r} does; give labels.json or labels.csv, which name "
            "the files, or pad the numbers in the names with zeros",
        )
    return labels.tolist()


def _natural(name: str) -> list[tuple[int, int | str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(part[:18])) if part.isdecimal() else (1, part) for part in parts]


def folders_as_labels(folder: str, files: Sequence[str]) -> list[str]:
    """Return the sub-folder of each file as its label. Raises UserError if a file is in none."""
    for file in files:
        check(
            "/" in file,
            f"{os.path.join(folder, file)} is in no sub-folder, so it has no class; move it into "
            "one, or give --labels FILE",
        )
    return [file.partition("/")[0] for file in files]


def read_class_names(path: str) -> tuple[str, ...]:
    """Return the names of the classes: the lines of a text file."""
    try:
        names = tuple(arrays.read_file(path, _LARGEST_NAMES).decode("utf-8-sig").splitlines())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({storage.reason(error)}); expected a text file with the name "
            "of a class on each line"
        ) from error
    check(
        names and all(name.strip() for name in names),
        f"{path} has no names, or an empty line; expected the name of a class on each line",
    )
    seen: set[str] = set()
    for name in names:
        check(name not in seen, f"{path} names {brief(name)} twice; classes need different names")
        seen.add(name)
    return names


def to_classes(
    source: str, labels: Sequence[Any], names: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels int32 [n] and the names of the classes.

    Names as labels are numbered in the order of `names`; without it, in sorted order. Raises
    UserError for labels that are neither whole numbers from 0 nor names, and for a number
    without an example unless `names` has one for it.
    """
    check(len(labels), f"{source} has no labels; expected one for each example")
    kinds = {type(label) for label in labels}
    if kinds == {str}:
        return _from_names(source, labels, names)
    wrong = [label for label in labels if type(label) is not int][:1]
    check(
        not wrong,
        f"{source} has the label {_first(wrong)}; expected whole numbers from 0, or names only",
    )
    low = min(labels)
    high = max(labels)
    check(
        low >= 0,
        f"{source} has the label {brief(low)}; expected whole numbers from 0 (-1 often stands for "
        "an unknown class); give labels of all examples",
    )
    if names:
        check(
            high < len(names),
            f"{source} has the label {brief(high)}, but --class_names has {len(names):,} names; "
            "give a name for each class",
        )
        return np.array(labels, np.int32), names
    check(
        high < _MOST_CLASSES,
        f"{source} has the label {brief(high)}; expected less than {_MOST_CLASSES:,}",
    )
    absent = sorted(set(range(high + 1)) - set(labels))
    check(
        not absent,
        f"{source} has the label {high} but no example of {len(absent):,} smaller ones, such as "
        f"{absent[0] if absent else ''}; renumber the labels, or give --class_names with a name "
        "for each class",
    )
    return np.array(labels, np.int32), tuple(map(str, range(high + 1)))


def _from_names(
    source: str, labels: Sequence[str], names: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    names = names or tuple(sorted(set(labels)))
    number = {name: index for index, name in enumerate(names)}
    unknown = next((label for label in labels if label not in number), None)
    check(
        unknown is None,
        f"{source} has the label {brief(unknown)}, which --class_names does not list; add it",
    )
    return np.array([number[label] for label in labels], np.int32), names
