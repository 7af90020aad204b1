"""A folder of class folders of image files, ordered as in torchvision's ImageFolder.

What else lies in the folder is counted, so that a user sees what is not read.
"""

import collections
import dataclasses
import os
import stat

import numpy as np

from sit_jax.data.source import (
    EncodedImages,
    SourceOptions,
    check_rgb,
    first_names,
    short_digest,
)
from sit_jax.data.transforms import Decoding
from sit_jax.errors import UserError, check
from sit_jax.storage import is_remote

# Those of torchvision.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Made by file servers and operating systems. Names that start with a dot are passed over as well.
_SYSTEM_FOLDERS = (
    "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX",
    "lost+found",
)  # fmt: skip
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval")
_LISTED_KINDS = 8
_LONGEST_EXTENSION = 12

FileId = tuple[int, int]  # device and inode: the same for every path to a folder


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(EncodedImages):
    """Image files, each cropped to [image_size, image_size, 3]; labels int32 [n]."""

    files: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    image_size: int
    decoding: Decoding
    passed_over: str

    def __len__(self) -> int:
        return len(self.files)

    def place(self, index: int) -> str:
        """Return which image a record is, by its path."""
        return f"image {self.files[index]!r}"

    def encoded(self, index: int) -> tuple[bytes, np.int32]:
        """Return the bytes of a file and its label. Raises `UnreadableImage`."""
        try:
            data = _read_file(self.files[index], self.decoding.max_bytes)
        except (OSError, ValueError) as error:
            raise self.unreadable(index, error) from error
        return data, self.labels[index]

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the path or label of any file."""
        listed = "\0".join(self.files)
        return short_digest(listed.encode("utf-8", "surrogateescape") + self.labels.tobytes())


def _read_file(path: str, max_bytes: int) -> bytes:
    """Return the bytes of a regular file. Raises OSError, or ValueError for any other file."""
    # Without O_NONBLOCK, opening a pipe would wait for a writer for ever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        data = file.read(max_bytes + 1)  # its size may be wrong: it may grow
    if len(data) > max_bytes:
        raise ValueError(
            f"more than {max_bytes:,} bytes, which no image of data.max_pixels needs; raise it"
        )
    return data


def open_folder(options: SourceOptions) -> FolderSource:
    """Open a folder with one sub-folder of image files for each class.

    Classes and files are ordered as in torchvision's ImageFolder. The folder is one split, "all".
    Hidden and system folders are not classes.
    """
    path = options.path
    check_rgb(options, "folder")
    if not path:
        raise UserError(
            "data.path is empty, but data.source='folder' needs a folder of class folders; set it"
        )
    check(
        not is_remote(path),
        f"data.path={path!r} is not on a local disk; copy it to one, or mount the bucket",
    )
    check(
        options.split == "all",
        f"data.split={options.split!r}, but a folder is one split; set it to 'all', and data.path "
        "to that split's folder",
    )
    check(
        os.path.isdir(path),
        f"data.path={path!r} is not a folder; give a folder with a sub-folder for each class",
    )
    passed_over: collections.Counter[str] = collections.Counter()
    class_names = _class_names(path, passed_over)
    files_by_class = [
        _images_below(os.path.join(path, name), _identity(path), passed_over)
        for name in class_names
    ]
    counts = [len(files) for files in files_by_class]
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    check(
        not empty,
        f"data.path={path!r} has {len(empty)} class folders without images "
        f"({', '.join(IMAGE_EXTENSIONS)}): {first_names(empty)}{_beside(passed_over)}; fill or "
        "remove them",
    )
    labels = np.repeat(np.arange(len(class_names), dtype=np.int32), counts)
    files = tuple(file for files in files_by_class for file in files)
    return FolderSource(
        files,
        labels,
        tuple(class_names),
        options.image_size,
        options.decoding,
        _listed(passed_over),
    )


def _class_names(path: str, passed_over: collections.Counter[str]) -> list[str]:
    """Return the names of the class folders in `path`, in order."""
    root = _identity(path)
    folders, images = _sorted_entries(path, passed_over)
    names = []
    for name in folders:
        if _identity(os.path.join(path, name)) == root:
            passed_over["link loops"] += 1
        else:
            names.append(name)
    check(
        names or not images,
        f"data.path={path!r} holds {len(images):,} images but no class folders; put the images of "
        f"each class into a sub-folder of it, or all into one and set data.classes=1",
    )
    if images:
        passed_over["images beside the class folders"] += len(images)
    check(
        names,
        f"data.path={path!r} has no sub-folders{_beside(passed_over)}; put the images of each "
        "class into a sub-folder of it",
    )
    _refuse_splits(path, names)
    return names


def _refuse_splits(path: str, class_names: list[str]) -> None:
    """Raise `UserError` if the class folders are the splits of a data set.

    One sign is not enough: "train" may be a class of vehicles, without folders inside, or beside
    "car" and "ship".
    """
    splits = {name: _split(name) for name in class_names if _split(name) in _SPLITS}
    if not splits:
        return
    first = min(splits, key=lambda name: _SPLITS.index(splits[name]))
    folder = os.path.join(path, first)
    has_folders = bool(_sorted_entries(folder, collections.Counter())[0])
    signs = (len(splits) > 1, len(splits) == len(class_names), has_folders)
    check(
        sum(signs) < 2,
        f"data.path={path!r} holds splits ({first_names(list(splits))}), not classes; set "
        f"data.path={folder!r}",
    )


def _split(name: str) -> str:
    """Return "train" for "Train", "train2017" or "train_1"."""
    return name.lower().rstrip("0123456789_-")


def _images_below(
    class_folder: str, root: FileId, passed_over: collections.Counter[str]
) -> list[str]:
    """Return the images at any depth below `class_folder`, in torchvision's order.

    Links are followed, but not one to a folder that the link lies in: that is a loop.
    """
    images_by_folder = []
    # Folders, each with those that it lies in.
    waiting: list[tuple[str, tuple[FileId, ...]]] = [(class_folder, (root,))]
    while waiting:
        folder, above = waiting.pop()
        identity = _identity(folder)
        if identity in above:
            passed_over["link loops"] += 1
            continue
        folders, images = _sorted_entries(folder, passed_over)
        waiting += [(os.path.join(folder, name), (*above, identity)) for name in folders]
        images_by_folder.append((folder, images))
    # torchvision sorts complete folder paths as strings, so "a-b" comes before "a/c". Any other
    # order would be another data order.
    images_by_folder.sort()
    return [os.path.join(folder, name) for folder, images in images_by_folder for name in images]


def _sorted_entries(
    folder: str, passed_over: collections.Counter[str]
) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the image files in `folder`; count all else."""
    folders = []
    images = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                kind = _kind(entry)
                if kind == "folder":
                    folders.append(entry.name)
                elif kind == "image":
                    images.append(entry.name)
                else:
                    passed_over[kind] += 1
    except OSError as error:
        raise UserError(
            f"the folder {folder!r} of data.path cannot be listed ({error.strerror or error}); "
            "make it readable, or remove it"
        ) from error
    return sorted(folders), sorted(images)


def _kind(entry: os.DirEntry) -> str:
    """Return "folder", "image", or in other words why an entry is passed over."""
    name = entry.name
    try:
        # Only links cost a system call here.
        if entry.is_dir():
            is_system = name.startswith(".") or name in _SYSTEM_FOLDERS
            return f"folder {name!r}" if is_system else "folder"
        if name.startswith("."):
            return "hidden files"
        if not entry.is_file():
            return "special files" if os.path.exists(entry.path) else "broken links"
    except OSError:  # a link to itself, or into a folder that may not be entered
        return "broken links"
    extension = os.path.splitext(name)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return "image"
    if len(extension) > _LONGEST_EXTENSION or not extension.isprintable():
        return "other names"
    return extension or "without extension"


def _identity(folder: str) -> FileId:
    """Return the device and inode of a folder, which no other folder has."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _listed(passed_over: collections.Counter[str]) -> str:
    """Return "'.gif' (3), hidden files (1)", the most frequent first."""
    kinds = [f"{kind} ({count:,})" for kind, count in passed_over.most_common()]
    more = len(kinds) - _LISTED_KINDS
    return ", ".join(kinds[:_LISTED_KINDS]) + (f" and {more} other kinds" if more > 0 else "")


def _beside(passed_over: collections.Counter[str]) -> str:
    """Return a phrase on what was passed over, or nothing."""
    return f" (passed over: {_listed(passed_over)})" if passed_over else ""
