"""Labels of the caches that convert.latents reads: every form, and what is refused."""

import numpy as np
import pytest

from tests.other_caches import converted, noise, refused, write_json, write_moments, write_repa


def labelled(tmp_path, name, text, **options):
    """Convert three files with a file of labels and return labels and class names."""
    src = tmp_path / "src"
    arrays = {file: noise(0, 2, 3, 3) for file in ("a.npy", "b/c.npy", "b/d.npy")}
    write_moments(src, arrays, labels=None)
    if isinstance(text, str):
        (src / name).write_text(text)
    else:
        np.save(src / name, text)
    source = converted(tmp_path, src, side=3, channels=1, spread="logvar", scale="1", **options)
    return source.labels.tolist(), source.class_names


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("labels.json", '{"a.npy": 1, "b/d.npy": 0, "b/c.npy": 2}', [1, 2, 0]),
        ("labels.json", '{"labels": [["a.npy", 1], ["b/d.npy", 0], ["b/c.npy", 0]]}', [1, 0, 0]),
        ("labels.csv", "file,label\nb/c.npy,0\na.npy,1\nb/d.npy,1\n", [1, 0, 1]),
        ("labels.csv", "b/c.npy,0\r\na.npy, 1\r\n\r\nb/d.npy,1", [1, 0, 1]),
        ("labels.npy", np.array([1, 0, 2]), [1, 0, 2]),
        ("labels.npy", np.array([1, 0, 2], np.uint8), [1, 0, 2]),
    ],
)
def test_files_of_labels(tmp_path, name, text, want):
    labels, names = labelled(tmp_path, name, text)
    assert labels == want and names == tuple(map(str, range(max(want) + 1)))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.json", '{"a.npy": "cat", "b/c.npy": "ant", "b/d.npy": "cat"}'),
        ("labels.csv", "a.npy,cat\nb/c.npy,ant\nb/d.npy,cat\n"),
        ("labels.npy", np.array(["cat", "ant", "cat"])),
    ],
)
def test_names_as_labels_are_numbered_in_sorted_or_given_order(tmp_path, name, text):
    assert labelled(tmp_path / "a", name, text) == ([1, 0, 1], ("ant", "cat"))
    names = tmp_path / "names.txt"
    names.write_text("dog\ncat\nant\n")
    got = labelled(tmp_path / "b", name, text, class_names=str(names))
    assert got == ([1, 2, 1], ("dog", "cat", "ant"))


def test_class_names_allow_a_class_without_examples(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\ndog\n")
    src = write_repa(tmp_path / "src", labels=[0, 2, 2, 0, 0, 2, 0])
    source = converted(tmp_path, src, class_names=str(names))
    assert source.class_names == ("ant", "bee", "cat", "dog")
    assert source.labels.tolist() == [0, 2, 2, 0, 0, 2, 0]


BAD_LABELS = {
    "-1": ([0, 1, 2, -1, 0, 1, 2], "label -1; expected whole numbers from 0"),
    "floats": ([0, 1.0, 2, 0, 0, 1, 2], "label 1.0; expected whole numbers from 0"),
    "bool": ([0, True, 2, 0, 0, 1, 2], "label True; expected whole numbers"),
    "null": ([0, None, 2, 0, 0, 1, 2], "label None; expected whole numbers"),
    "numbers as text": (
        list("0120120"),
        "label '0' as text; expected whole numbers without quotes",
    ),
    "an empty name": (["a", "b", "a", "", "b", "b", "b"], "label '' as text; expected"),
    "one-hot": ([[0, 1]] * 7, r"label \[0, 1\]; expected whole numbers"),
    "names among numbers": ([0, "cat", 2, 0, 0, 1, 2], "label 'cat'; expected whole numbers"),
    "a gap": ([0, 3, 0, 3, 3, 0, 0], "label 3 but no example of 2 smaller ones, such as 1; renum"),
    "from 1": ([1, 2, 3, 1, 2, 3, 3], "label 3 but no example of 1 smaller ones, such as 0"),
    "huge": ([0, 10**30, 0, 0, 0, 0, 0], "label 10{30}; expected less than 1,000,000"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_refused(tmp_path, case):
    values, message = BAD_LABELS[case]
    refused(write_repa(tmp_path / "src", labels=values), f"dataset.json has the {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": None}, "its labels are null, since the images had none"),
        ({"labels": 3}, "its labels are 3"),
        ({"labels": [3]}, "3 is not a file and its label"),
        ({"labels": [["a", 1, 2]]}, "is not a file and its label"),
        ({"labels": [[1, 1]]}, r"\[1, 1\] is not a file and its label"),
        ([["a", 1]], "it holds"),
        ("text", "it holds 'text'"),
    ],
)
def test_bad_json_of_labels(tmp_path, content, message):
    src = write_repa(tmp_path / "src")
    write_json(src / "vae-sd" / "dataset.json", content)
    refused(src, f"dataset.json cannot be read .*{message}.*; expected")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", '{"a": 1' + "0" * 5000 + "}"])
def test_damaged_json_of_labels(tmp_path, text):
    src = write_repa(tmp_path / "src")
    (src / "vae-sd" / "dataset.json").write_bytes(text.encode("latin-1"))
    refused(src, "dataset.json cannot be read")


def test_a_file_that_is_listed_twice(tmp_path):
    src = write_moments(tmp_path / "src", {"a.npy": noise(0, 2, 3, 3)}, labels=None)
    for name, text in (
        ("labels.json", '{"a.npy": 0, "a.npy": 1}'),
        ("labels.json", '{"labels": [["a.npy", 0], ["a.npy", 0]]}'),
        ("labels.csv", "a.npy,0\na.npy,0\n"),
    ):
        (src / name).write_text(text)
        refused(src, f"{name} lists 'a.npy' more than once", spread="logvar", scale="1")
        (src / name).unlink()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.csv", "a.npy,0\nb.npy,1.5\n", "the label '1.5' is not a whole number"),
        ("labels.csv", "a.npy,nan\nb.npy,1\n", "the label 'nan' is not a whole number"),
        ("labels.csv", "a.npy,0\nb.npy,cat\n", "the label '0' is a number beside names"),
        ("labels.csv", "a.npy,0,1\nb.npy,1\n", "is not a file and its label"),
        ("labels.csv", "a.npy\nb.npy\n", "is not a file and its label"),
        ("labels.csv", 'a.npy,"0\nb.npy,1\n', "cannot be read"),
        ("labels.csv", "name,class\na.npy,0\nb.npy,0\n", "number beside names|such as 'name'"),
        ("labels.csv", "a.npy,-1\nb.npy,0\n", "has the label -1"),
        ("labels.csv", "", "no label for 2 files"),
        ("labels.npy", np.array([0.0, 1.0]), "type float64; expected whole numbers or names"),
        ("labels.npy", np.array([True, False]), "type bool; expected whole numbers or names"),
        ("labels.npy", np.array([[0, 1]]), r"shape \[1, 2\]"),
        ("labels.npy", np.array([0, 1, 2]), "has 3 labels for 2 files"),
        ("labels.npy", np.array([0, -1]), "has the label -1"),
    ],
)
def test_bad_files_of_labels(tmp_path, name, content, message):
    arrays = {file: noise(0, 2, 3, 3) for file in ("a.npy", "b.npy")}
    src = write_moments(tmp_path / "src", arrays, labels=None)
    if isinstance(content, str):
        (src / name).write_text(content)
    else:
        np.save(src / name, content)
    refused(src, f"{name}.*({message})", spread="logvar", scale="1")


def test_an_order_of_files_that_names_do_not_tell(tmp_path):
    arrays = {f"{number}.npy": noise(0, 2, 3, 3) for number in range(11)}
    src = write_moments(tmp_path / "src", arrays, labels=None)
    np.save(src / "labels.npy", np.arange(11))
    message = "sorted as text '10.npy' comes where sorted by number '2.npy' does"
    refused(src, message, spread="logvar", scale="1")


def test_class_names(tmp_path):
    src = write_repa(tmp_path / "src")
    names = tmp_path / "names.txt"
    for text, message in (
        ("a\nb\n", "has the label 2, but --class_names has 2 names"),
        ("a\nb\na\n", "names 'a' twice"),
        ("a\n\nb\n", "has no names, or an empty line"),
        ("", "has no names, or an empty line"),
    ):
        names.write_text(text)
        refused(src, message, class_names=str(names))
    refused(src, "nowhere cannot be read .No such file", class_names="nowhere")
    src = write_repa(tmp_path / "other", labels=["a", "b", "e", "a", "b", "a", "a"])
    names.write_text("a\nb\nc\n")
    refused(src, "has the label 'e', which --class_names does not list", class_names=str(names))


def test_folders_as_classes_need_every_file_in_one(tmp_path):
    arrays = {"a/a.npy": noise(0, 2, 3, 3), "b.npy": noise(0, 2, 3, 3)}
    src = write_moments(tmp_path / "src", arrays, labels=None)
    options = {"layout": "moments", "spread": "logvar", "scale": "1"}
    refused(src, "b.npy is in no sub-folder, so it has no class", labels="folders", **options)
    refused(src, "holds no labels.json, labels.npy, labels.csv; give --labels FILE, or", **options)
    refused(
        src, "x.txt'; expected a .json, .npy or .csv file, or folders", labels="x.txt", **options
    )
