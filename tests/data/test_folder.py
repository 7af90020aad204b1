"""What a folder of images holds is said, and only images are read from it."""

import os
import socket
import threading

import pytest
from PIL import Image

from sit_jax.data import transforms
from sit_jax.data.folder import IMAGE_EXTENSIONS, open_folder
from sit_jax.data.source import SourceOptions, UnreadableImage
from sit_jax.data.transforms import Decoding
from sit_jax.errors import UserError
from tests.commands import FOLDER, TINY, flags, refusal, succeed, write_images

DECODING = Decoding(max_pixels=2**16, exif_orientation=False)


def open_source(root, decoding=DECODING):
    return open_folder(SourceOptions(str(root), None, "all", 8, 3, decoding))


def refused(root):
    with pytest.raises(UserError) as error:
        open_source(root)
    assert "\n" not in str(error.value)
    return str(error.value)


def names(source, root):
    return [os.path.relpath(file, root) for file in source.files]


def test_the_extensions_of_torchvision_are_read(tmp_path):
    files = [f"a/{number}{extension}" for number, extension in enumerate(IMAGE_EXTENSIONS)]
    write_images(tmp_path, *files)
    source = open_source(tmp_path)
    assert names(source, tmp_path) == files and source.passed_over == ""
    assert all(source.read(index)["image"].shape == (8, 8, 3) for index in range(len(files)))
    assert set(IMAGE_EXTENSIONS) == {
        ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"
    }  # fmt: skip


HIDDEN = [".ipynb_checkpoints", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "lost+found", ".cache"]


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_and_system_folders_are_not_classes_at_any_depth(tmp_path, name):
    write_images(tmp_path, "a/0.png", "b/sub/0.png", f"{name}/0.png", f"b/sub/{name}/1.png")
    source = open_source(tmp_path)
    assert source.class_names == ("a", "b")
    assert names(source, tmp_path) == ["a/0.png", "b/sub/0.png"]
    assert source.passed_over == f"folder {name!r} (2)"


def test_what_is_passed_over_is_counted(tmp_path):
    write_images(tmp_path, "a/0.png", "b/0.png", "beside.png")
    for name in (
        "a/1.gif",
        "a/2.GIF",
        "a/3.npy",
        "a/README",
        "a/._0.png",
        "b/.DS_Store",
        "a/x.a\nb",
        "a/x.\udcff",
        "a/v1.2 of a thing",
    ):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a" / "self.png").symlink_to(tmp_path / "a" / "self.png")
    source = open_source(tmp_path)
    assert names(source, tmp_path) == ["a/0.png", "b/0.png"]
    assert set(source.passed_over.split(", ")) == {
        ".gif (2)",
        ".npy (1)",
        "without extension (1)",
        "other names (3)",
        "hidden files (2)",
        "broken links (2)",
        "images beside the class folders (1)",
    }


def test_a_link_loop_is_not_followed(tmp_path):
    write_images(tmp_path, "a/0.png", "b/sub/0.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "sub" / "again").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "self").symlink_to(tmp_path / "b")
    (tmp_path / "root").symlink_to(tmp_path)
    source = open_source(tmp_path)
    assert source.class_names == ("a", "b")
    assert names(source, tmp_path) == ["a/0.png", "b/sub/0.png"]
    assert source.passed_over == "link loops (4)"


def test_links_that_are_no_loop_are_followed_each_time(tmp_path):
    write_images(tmp_path / "store", "0.png", "1.png")
    for name in ("a", "b/deep"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "link").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "store")
    assert names(open_source(tmp_path / "data"), tmp_path / "data") == [
        "a/link/0.png", "a/link/1.png", "b/deep/link/0.png", "b/deep/link/1.png", "c/0.png",
        "c/1.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("folders", "first"),
    [
        (["train", "val"], "train"),
        (["val", "train", "test"], "train"),
        (["Training", "Validation"], "Training"),
        (["test", "valid"], "valid"),
        (["train"], "train"),
        (["train", "val", ".cache", "__MACOSX"], "train"),
        (["train2017", "val2017"], "train2017"),
        (["TRAIN_0", "dev-1"], "TRAIN_0"),
        (["train", "val", "annotations"], "train"),
    ],
)
def test_a_root_of_splits_is_refused(tmp_path, folders, first):
    write_images(tmp_path, *(f"{folder}/{name}/0.png" for folder in folders for name in "ab"))
    message = refused(tmp_path)
    assert message.endswith(f"not classes; set data.path={str(tmp_path / first)!r}")
    assert len(open_source(tmp_path / first).class_names) == 2  # the remedy works


@pytest.mark.parametrize(
    "files",
    [
        ["train/0.png"],  # one class, perhaps of vehicles
        ["train/0.png", "bus/0.png"],
        ["train/0.png", "test/0.png", "bus/0.png"],
        ["train/a/0.png", "bus/0.png"],
        ["train station/0.png", "test tube/0.png"],
        ["test/0.png", "other/a/0.png"],
    ],
)
def test_classes_named_like_splits_are_classes(tmp_path, files):
    write_images(tmp_path, *files)
    assert len(open_source(tmp_path)) == len(files)


def test_flat_splits_are_refused_too(tmp_path):
    write_images(tmp_path, "train/0.png", "test/0.png")
    assert "holds splits ('test', 'train'), not classes" in refused(tmp_path)


def test_images_without_class_folders(tmp_path):
    write_images(tmp_path, "0.png", "1.bmp")
    message = refused(tmp_path)
    assert "holds 2 images but no class folders" in message and "data.classes=1" in message
    (tmp_path / ".hidden").mkdir()
    assert "holds 2 images but no class folders" in refused(tmp_path)


def test_class_folders_without_images_are_named(tmp_path):
    write_images(tmp_path, "full/0.png")
    for name in ("b", "a", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "0.gif").write_bytes(b"")
    message = refused(tmp_path)
    assert "has 3 class folders without images" in message
    assert "'a', 'b', 'c' (passed over: .gif (1)); fill or remove them" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    write_images(tmp_path, "a/0.png", "b/0.png")
    (tmp_path / "b").chmod(0)
    assert f"the folder {str(tmp_path / 'b')!r} of data.path cannot be listed" in refused(tmp_path)
    (tmp_path / "b").chmod(0o700)


def special_file(path, kind):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(path.parent)  # the name of a socket must be short
            server.bind(path.name)
            os.chdir(here)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    write_images(tmp_path, "a/0.png", "a/1.png")
    special_file(tmp_path / "a" / "2.png", kind)
    source = open_source(tmp_path)
    assert names(source, tmp_path) == ["a/0.png", "a/1.png"]
    passed_over = "" if kind == "folder" else "special files (1)"
    assert source.passed_over == passed_over
    # One that takes the place of an image after the folder was listed neither hangs nor is read.
    (tmp_path / "a" / "1.png").unlink()
    special_file(tmp_path / "a" / "1.png", kind)
    for read in (source.read, source.digest):
        errors = []

        def attempt(read=read, errors=errors):
            with pytest.raises(UnreadableImage, match="1.png.* cannot be read") as error:
                read(1)
            errors.append(error)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(10)
        assert errors, "reading hangs"


def test_files_are_bounded_in_bytes_and_pixels(tmp_path):
    write_images(tmp_path, "a/0.png", "a/1.png")
    with open(tmp_path / "a" / "0.png", "ab") as file:
        file.truncate(2**40)  # sparse: a TB, of which nothing is stored
    Image.new("RGB", (257, 256)).save(tmp_path / "a" / "1.png")
    source = open_source(tmp_path)
    for read in (source.read, source.digest):
        with pytest.raises(UnreadableImage, match=r"more than 1,572,864 bytes, .*; raise it"):
            read(0)
    with pytest.raises(UnreadableImage, match="257 x 256 pixels, more than data.max_pixels=65536"):
        source.read(1)
    assert open_source(tmp_path, Decoding(257 * 256, False)).read(1)["image"].shape == (8, 8, 3)


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    write_images(tmp_path, *(f"a/{number}.png" for number in range(4)))
    monkeypatch.setattr(transforms, "_LARGE", 10)
    at_once = []
    decode = transforms.to_rgb

    def slow_decode(image, decoding):
        at_once.append(transforms._large_image.locked())
        return decode(image, decoding)

    monkeypatch.setattr(transforms, "to_rgb", slow_decode)
    source = open_source(tmp_path)
    assert source.read(0)["image"].shape == (8, 8, 3)
    monkeypatch.setattr(transforms, "_LARGE", 2**24)
    assert source.read(1)["image"].shape == (8, 8, 3)
    assert at_once == [True, False]


def test_another_format_under_an_image_name_is_unreadable(tmp_path):
    (tmp_path / "a").mkdir()
    for number, (format, extension) in enumerate(
        [("EPS", "jpg"), ("GIF", "png"), ("ICO", "bmp"), ("TGA", "tif")]
    ):
        Image.new("RGB", (16, 16)).save(tmp_path / "a" / f"{number}.{extension}", format)
    Image.new("RGB", (16, 16)).save(tmp_path / "a" / "4.jpg", "PNG")  # such as in ImageNet
    source = open_source(tmp_path)
    for index in range(4):
        with pytest.raises(UnreadableImage, match="not an image of JPEG, PNG"):
            source.read(index)
    assert source.read(4)["image"].shape == (8, 8, 3)


def test_training_says_what_the_folder_holds(tmp_path):
    data = tmp_path / "data"
    write_images(data, "a/0.png", "b/0.png", "b/1.png", "@eaDir/0.png")
    (data / "b" / "0.gif").write_bytes(b"")
    settings = flags(data__path=data, train__steps=1, log__sheet_every=0)
    out = succeed(*TINY, *FOLDER, *settings, "--workdir", tmp_path / "run")
    assert f"data: 3 images in 2 classes ('a', 'b') of {str(data)!r}; passed over: folder" in out
    assert "'@eaDir' (1), .gif (1)\n" in out
    write_images(data, *(f"{name}/0.png" for name in "cdefgh"))
    message = refusal(*TINY, *FOLDER, *settings, "--workdir", tmp_path / "other")
    assert "has 8 classes ('a', 'b', 'c', 'd', 'e', ...); set data.classes=8" in message
