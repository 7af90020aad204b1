"""Convert the published weights of a feature network to safetensors, with unchanged names."""

import argparse
import dataclasses
import math
import os
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import save_file

from convert import cli
from convert.torch_file import Tensor, read_torch_file
from sit_jax import storage
from sit_jax.errors import UserError, check, check_tensors
from sit_jax.metrics import weight_files
from sit_jax.metrics.weight_files import Published

_CHUNK = 2**20  # bytes
_TIMEOUT_S = 60  # without any byte


@dataclasses.dataclass(frozen=True)
class File:
    """A published file, and the shapes of its tensors by name.

    Tensors whose names end with `unused` are left out.
    """

    published: Published
    shapes: Callable[[], Mapping[str, tuple[int, ...]]]
    unused: str | None = None

    @property
    def name(self) -> str:
        """The name under which it is published."""
        return os.path.basename(self.published.url)


def main(file: File, argv: Sequence[str]) -> None:
    """Parse the command line, download the published file unless one is given, and convert."""
    flags = _parser(file).parse_args(argv)
    check(
        flags.out or not flags.any_weights,
        "--any_weights needs WEIGHTS and OUT: the cache folder holds only the published weights",
    )
    out = flags.out or weight_files.cached_path(file.published)
    if flags.weights:
        convert(file, flags.weights, out, overwrite=flags.overwrite, any_weights=flags.any_weights)
        return
    cli.check_output(out, flags.overwrite)  # before the download
    weights = epath.Path(out).parent / file.name
    download(file.published, weights)
    convert(file, os.fspath(weights), out, overwrite=flags.overwrite)
    weights.unlink()


def _parser(file: File) -> argparse.ArgumentParser:
    parser = cli.parser(
        file.published.converter.removeprefix("convert."),
        f"Convert {file.name} to safetensors. Tensor names stay unchanged; values are stored as "
        "float32.",
    )
    parser.add_argument(
        "weights",
        nargs="?",
        help=f"{file.name}; without it, {file.published.url} is downloaded",
    )
    parser.add_argument(
        "out",
        nargs="?",
        help="the .safetensors file to write (default: in the user's cache folder, where it is "
        f"looked for: {weight_files.cached_path(file.published)})",
    )
    parser.add_argument(
        "--any_weights",
        action="store_true",
        help="accept weights other than the published ones, which give other numbers; needs OUT",
    )
    return parser


def download(published: Published, target: epath.Path) -> None:
    """Fetch the published file, unless `target` already is that file.

    Raises UserError, which says how to do without a network, if it cannot be fetched.
    """
    storage.make_writable_folder(target.parent)
    storage.clean_up(target.parent, target.name)
    if target.exists() and storage.sha256(target) == published.sha256:
        return
    print(f"downloading {published.url} ({published.bytes / 1e6:,.0f} MB)", flush=True)
    with storage.beside(target) as new:
        try:
            with (
                urllib.request.urlopen(published.url, timeout=_TIMEOUT_S) as response,
                open(new, "wb") as written,
            ):
                while chunk := response.read(_CHUNK):
                    written.write(chunk)
        except (OSError, ValueError) as error:  # a ValueError is an answer that is not HTTP
            raise UserError(
                f"{published.url} could not be downloaded into {str(target.parent)!r} "
                f"({storage.reason(error)}); repair the network or make room, or download it "
                f"elsewhere and run `python -m {published.converter} FILE`"
            ) from error
        check(
            storage.sha256(new) == published.sha256,
            f"{published.url} gave {os.path.getsize(new):,} bytes that are not the published file "
            f"({published.bytes:,} bytes, sha256 {published.sha256}); run the command again, or "
            f"download it elsewhere and run `python -m {published.converter} FILE`",
        )


def convert(
    file: File, weights: str, out: str, *, overwrite: bool = False, any_weights: bool = False
) -> None:
    """Write the tensors of a .pth file to `out` as float32, with the file's SHA-256.

    Raises UserError if it is not the published file. With `any_weights`, only if its tensors are
    not those of the network.
    """
    check(out.endswith(".safetensors"), f"{out!r} is not a valid name; expected NAME.safetensors")
    cli.check_input(weights)
    digest = storage.sha256(epath.Path(weights))
    published = file.published
    check(
        any_weights or digest == published.sha256,
        f"{weights} has {os.path.getsize(weights):,} bytes and sha256 {digest[:8]}..., expected "
        f"{published.bytes:,} and {published.sha256[:8]}...; get {published.url}, or give OUT and "
        "--any_weights for weights other than the published ones",
    )
    shapes = file.shapes()
    tensors = _tensors(weights, file.unused)
    check_tensors(weights, {name: tensor.shape for name, tensor in tensors.items()}, shapes)
    size = sum(4 * math.prod(shape) for shape in shapes.values())
    with cli.output(out, size, overwrite) as new:
        arrays = {name: np.ascontiguousarray(tensors[name], np.float32) for name in shapes}
        bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
        check(
            not bad,
            f"{weights}: {', '.join(bad[:4])} holds NaN or infinite values; get an intact file",
        )
        save_file(arrays, new, {"format": "pt", weight_files.SOURCE: digest})
    print(f"{len(shapes)} tensors -> {out}")


def _tensors(weights: str, unused: str | None) -> dict[str, Any]:
    """Return the tensors of a state dict by name. Raises UserError if it is not one."""
    content = read_torch_file(weights)
    check(
        isinstance(content, Mapping),
        f"{weights} holds {type(content).__name__}, not a state dict; get the published file",
    )
    return {
        str(name): value
        for name, value in content.items()
        if isinstance(value, Tensor) and not (unused and str(name).endswith(unused))
    }
