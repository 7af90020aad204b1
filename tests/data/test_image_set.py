"""Images of any project are read as they are, or refused in a line that says why."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from sit_jax.data import image_set
from sit_jax.data.npz import NpzFile
from sit_jax.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (150, 6, 5, 3), np.uint8)


def write_folder(folder, images, name="{:06d}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / name.format(number))
    return str(folder)


def open_images(path):
    return image_set.open_images(path, are_samples=True)


def read(images):
    return np.concatenate(list(images.batches()))


@pytest.mark.parametrize("name", ["{:06d}.png", "{}.png", "{}.PNG", "cat_{:03d}.png"])
def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path, name):
    found = open_images(write_folder(tmp_path / "x", IMAGES, name))
    assert (found.count, found.shape, found.labels) == (150, (6, 5, 3), None)
    np.testing.assert_array_equal(read(found), IMAGES)
    np.testing.assert_array_equal(read(found), IMAGES)  # as often as wanted


def test_numbers_may_start_at_one_and_files_that_are_no_images_are_named(tmp_path, capsys):
    folder = tmp_path / "x"
    write_folder(folder, IMAGES[:3])
    (folder / "000000.png").rename(folder / "000003.png")
    (folder / "notes.txt").write_text("")
    (folder / ".hidden.png").write_text("")
    np.testing.assert_array_equal(read(open_images(str(folder))), IMAGES[[1, 2, 0]])
    assert "1 files are not images: notes.txt" in capsys.readouterr().out


def test_grey_images_have_one_channel_and_palettes_are_resolved(tmp_path):
    grey = open_images(write_folder(tmp_path / "grey", IMAGES[:2, ..., :1]))
    np.testing.assert_array_equal(read(grey), IMAGES[:2, ..., :1])
    (tmp_path / "palette").mkdir()
    Image.fromarray(IMAGES[0]).quantize(256).save(tmp_path / "palette" / "0.png")
    palette = open_images(str(tmp_path / "palette"))
    assert palette.shape == (6, 5, 3)
    np.testing.assert_allclose(read(palette)[0], IMAGES[0], atol=16)


def test_a_folder_of_class_folders_is_read_entirely(tmp_path):
    write_folder(tmp_path / "x" / "a", IMAGES[:2])
    write_folder(tmp_path / "x" / "b" / "c", IMAGES[2:5])
    np.testing.assert_array_equal(read(open_images(str(tmp_path / "x"))), IMAGES[:5])


def test_the_folder_of_a_sampling_job_is_read_without_its_sheet(tmp_path):
    write_folder(tmp_path / "x" / "images", IMAGES[:4])
    write_folder(tmp_path / "x", IMAGES[:1], "sheet.png")
    (tmp_path / "x" / "settings.json").write_text("{}")
    np.testing.assert_array_equal(read(open_images(str(tmp_path / "x"))), IMAGES[:4])


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_chosen_images_are_read_in_order(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(image_set, "_NPZ_CHUNK", 1000)  # pieces of 11 images
    np.savez(tmp_path / "x.npz", IMAGES)
    folder = write_folder(tmp_path / "x", IMAGES)
    found = open_images(folder if kind == "folder" else str(tmp_path / "x.npz"))
    for chosen in ([0], [149], [10, 11, 12, 99], list(range(3, 150, 2))):
        got = np.concatenate(list(found.read(np.array(chosen))))
        np.testing.assert_array_equal(got, IMAGES[chosen])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("labels", [None, "arr_1", "labels"])
def test_an_npz_file_of_any_project_is_read(tmp_path, save, labels, monkeypatch):
    monkeypatch.setattr(image_set, "_NPZ_CHUNK", 1000)  # pieces of 11 images
    others = {} if labels is None else {labels: np.arange(150)}
    save(tmp_path / "x.npz", arr_0=IMAGES, **others)
    found = open_images(str(tmp_path / "x.npz"))
    np.testing.assert_array_equal(read(found), IMAGES)
    if labels is None:
        assert found.labels is None
    else:
        np.testing.assert_array_equal(found.labels, np.arange(150))


def test_equal_pixels_have_equal_digests_wherever_they_are(tmp_path):
    np.savez(tmp_path / "x.npz", IMAGES)
    sets = [open_images(str(tmp_path / "x.npz")), open_images(write_folder(tmp_path / "x", IMAGES))]
    hashes = [np.concatenate([image_set.hashes(b) for b in found.batches()]) for found in sets]
    np.testing.assert_array_equal(*hashes)
    changed = IMAGES.copy()
    changed[7, 0, 0, 0] ^= 1
    (different,) = np.flatnonzero(image_set.hashes(changed) != hashes[0])
    assert different == 7
    assert image_set.digest(hashes[0]) != image_set.digest(hashes[0][::-1])


def test_only_the_part_of_an_npz_that_is_wanted_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_set, "_NPZ_CHUNK", 1000)  # pieces of 11 images
    np.savez(tmp_path / "x.npz", IMAGES)
    found = open_images(str(tmp_path / "x.npz"))
    pieces = []
    rows = NpzFile.rows

    def counted(*arguments):
        for piece in rows(*arguments):
            pieces.append(len(piece))
            yield piece

    monkeypatch.setattr(NpzFile, "rows", counted)
    wanted = np.array([2, 13, 20])
    np.testing.assert_array_equal(np.concatenate(list(found.read(wanted))), IMAGES[wanted])
    assert pieces == [11, 11]


def refused(path, *parts):
    """Check that opening and reading `path` fails in one line with these parts."""
    with pytest.raises(UserError) as caught:
        read(open_images(str(path)))
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(path), *parts):
        assert part in message


def test_what_is_not_a_set_of_images_is_refused(tmp_path):
    refused(tmp_path / "none", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no images")
    (tmp_path / "x.txt").write_text("")
    refused(tmp_path / "x.txt", "not an .npz file")
    np.savez(tmp_path / "x.npz", samples=IMAGES)
    refused(tmp_path / "x.npz", "holds samples, but no arr_0")
    with pytest.raises(UserError, match="not on a local disk"):
        open_images("gs://bucket/x.npz")


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (IMAGES.astype(np.float32) / 127.5 - 1, "float32, from -1 to 1; expected uint8"),
        (IMAGES.astype(np.int64) * 2, "int64, from 0 to 510"),
        (IMAGES.astype(np.float32), "float32, from 0 to 255"),
        (IMAGES > 3, "bool; expected uint8"),
        (IMAGES[0], "[6, 5, 3]; expected images [n, h, w, 3]"),
        (np.moveaxis(IMAGES, 3, 1), "[150, 3, 6, 5]; expected images [n, h, w, 3]; np.moveaxis"),
        (IMAGES[:0], "[0, 6, 5, 3]"),
        (np.concatenate([IMAGES, IMAGES], -1), "[150, 6, 5, 6]"),
        (np.asfortranarray(IMAGES), "Fortran order"),
    ],
)  # fmt: skip
def test_other_arrays_are_refused_with_what_they_hold(tmp_path, array, part):
    np.savez(tmp_path / "x.npz", array)
    refused(tmp_path / "x.npz", part)


def test_samples_that_are_not_finite_are_named(tmp_path):
    array = IMAGES.astype(np.float32)
    array[[3, 140], 2, 2, 1] = np.nan, np.inf
    np.savez(tmp_path / "x.npz", array)
    refused(tmp_path / "x.npz", "images 3, 140 hold NaN or infinite")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_truncated_or_changed_npz_file_is_damaged(tmp_path, save):
    path = tmp_path / "x.npz"
    save(path, IMAGES)
    data = path.read_bytes()
    for damaged in (data[:-300], data[:100], b"", data[:3000] + b"\x55\x66" + data[3002:]):
        path.write_bytes(damaged)
        refused(path, "is damaged or incomplete")


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", np.array([{"a": 1}], object))
    refused(tmp_path / "x.npz")


def test_holes_and_strangers_among_numbered_images_are_refused(tmp_path):
    folder = write_folder(tmp_path / "x", IMAGES[:9])
    shutil.copy(tmp_path / "x" / "000003.png", tmp_path / "x" / "sheet.png")
    refused(folder, "holds 'sheet.png' among 9 numbered images")
    (tmp_path / "x" / "sheet.png").unlink()
    (tmp_path / "x" / "000003.png").rename(tmp_path / "x" / "000012.png")
    refused(folder, "holds 9 images up to the number 12, but 3, 9, 10, 11 are missing")
    (tmp_path / "x" / "000012.png").rename(tmp_path / "x" / "3.png")
    open_images(folder)
    shutil.copy(tmp_path / "x" / "3.png", tmp_path / "x" / "03.png")
    refused(folder, "holds both '03.png' and '3.png'")


def test_holes_are_for_samples_only(tmp_path):
    folder = write_folder(tmp_path / "x", IMAGES[:5])
    (tmp_path / "x" / "000003.png").rename(tmp_path / "x" / "000000397133.png")
    refused(folder, "but 3, 5, 6, 7, ... are missing")
    reference = image_set.open_images(folder, are_samples=False)
    np.testing.assert_array_equal(read(reference), IMAGES[[0, 3, 1, 2, 4]])


def test_folders_that_mix_levels_are_refused(tmp_path):
    write_folder(tmp_path / "x", IMAGES[:2])
    write_folder(tmp_path / "x" / "more", IMAGES[:2])
    refused(tmp_path / "x", "holds 2 images, and 2 more in sub-folders")


def test_images_of_other_sizes_modes_and_damage_are_named(tmp_path):
    folder = write_folder(tmp_path / "x", IMAGES[:5])
    file = tmp_path / "x" / "000002.png"
    Image.fromarray(IMAGES[0, :5]).save(file)
    refused(folder, "000002.png' is 5 x 5 in colour, but", "is 5 x 6 in colour", "--config")
    Image.fromarray(IMAGES[0, ..., 0]).save(file)
    refused(folder, "000002.png' is 5 x 6 in grey")
    Image.fromarray(np.dstack([IMAGES[0], IMAGES[0, ..., :1]])).save(file)
    refused(folder, "has the mode 'RGBA'")
    Image.fromarray(IMAGES[0, ..., 0].astype(np.uint16)).save(file)
    refused(folder, "has the mode 'I;16'")
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(buffer, "PNG")
    for data in (b"", b"hello", buffer.getvalue()[:-40]):
        file.write_bytes(data)
        refused(folder, "000002.png' cannot be read as an image")


def test_links_are_followed_and_hidden_folders_left_out(tmp_path):
    write_folder(tmp_path / "x" / "a", IMAGES[:2])
    write_folder(tmp_path / "x" / "a" / ".ipynb_checkpoints", IMAGES[2:9])
    write_folder(tmp_path / "elsewhere", IMAGES[9:12])
    (tmp_path / "x" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "x" / "b").symlink_to(tmp_path / "elsewhere")
    found = read(open_images(str(tmp_path / "x")))
    np.testing.assert_array_equal(found, IMAGES[[0, 1, 9, 10, 11, 9, 10, 11]])
    (tmp_path / "x" / "a" / "up").symlink_to(tmp_path / "x")
    with pytest.raises(UserError, match="up' links to a folder that holds it"):
        open_images(str(tmp_path / "x"))


def test_a_link_to_nothing_is_named(tmp_path):
    folder = write_folder(tmp_path / "x", IMAGES[:2], "cat_{}.png")
    (tmp_path / "x" / "cat_2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match="cat_2.png' cannot be read"):
        read(open_images(folder))


def test_a_folder_of_samples_without_pngs_is_its_npz_file(tmp_path):
    np.savez(tmp_path / "samples.npz", IMAGES[:5])
    (tmp_path / "settings.json").write_text("{}")
    Image.fromarray(IMAGES[0]).save(tmp_path / "sheet.png")
    np.testing.assert_array_equal(read(open_images(str(tmp_path))), IMAGES[:5])
