"""Convert latents that another project has stored, to train from them with data.source=latents.

python -m convert.latents SRC DST

It reads the caches of REPA and of LightningDiT, and folders of .npy or .npz files of moments. Shape
suffixes are those of `convert.caches.cache`.
"""

import dataclasses
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath

from convert import cli
from convert.caches import class_labels, files, lightning
from convert.caches.cache import (
    LOGVAR,
    NONE,
    SD_VAE,
    SD_VAE_CHANNELS,
    SD_VAE_FACTOR,
    SD_VAE_SCALE,
    STD,
    Cache,
    Normalisation,
)
from sit_jax import storage
from sit_jax.data import latent_cache
from sit_jax.data.latent_cache import DTYPES, CacheWriter, Example, Manifest, Moments, Plan
from sit_jax.errors import UserError, check
from sit_jax.jobs.results import progress_bar
from sit_jax.jobs.workdir import open_for_writing

LAYOUTS = ("repa", "lightningdit", "moments")
_SHARD_RECORDS = 4096  # at most
_SHARD_BYTES = 2**27  # at most; a shard that was being written is lost when the run is killed
_FEW_CELLS = 16  # a side of so few cells is read in patches of one cell, to have enough tokens

_DESCRIPTION = """\
Convert latents that another project has stored into the form that data.source=latents reads. SRC is
REPA's data folder or its vae-sd; LightningDiT's folder of .safetensors files and latents_stats.pt;
or a folder of .npy or .npz files, one for each image, with a file of labels. PyTorch is not needed,
and no code in a file is run. Given again, the command continues where it was stopped."""
_EPILOG = """\
A value that starts with - needs an equals sign: --shift=-0.1,0.2. What each layout holds, and how
labels are read, is in convert/README.md."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says, or None for what the layout implies."""

    layout: str | None = None
    labels: str | None = None
    class_names: str | None = None
    axes: str | None = None
    spread: str | None = None
    autoencoder: str | None = None
    scale: str | None = None
    shift: str | None = None
    multiplier: float | None = None
    image_size: int | None = None
    dtype: str = "float16"


def main(argv: Sequence[str]) -> None:
    """Parse the command line and convert."""
    parser = cli.parser("latents", _DESCRIPTION, _EPILOG, overwrites=False)
    parser.add_argument("src", help="the folder of the other project's cache")
    parser.add_argument("dst", help="the folder to fill")
    parser.add_argument(
        "--layout", choices=LAYOUTS, help="the layout of SRC; without it, detected from its files"
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float16", help="to store them in (float16)"
    )
    parser.add_argument(
        "--scale",
        metavar="NUMBERS",
        help="the network sees scale * (z - shift): one number, or one for each channel with "
        "commas between. Without it: 0.18215 for sd-vae; latents_stats.pt for lightningdit",
    )
    parser.add_argument("--shift", metavar="NUMBERS", help="see --scale, without which it is 0")
    parser.add_argument(
        "--multiplier",
        type=float,
        metavar="NUMBER",
        help="lightningdit: the latent_multiplier of its config, beside latents_stats.pt (1.0)",
    )
    parser.add_argument(
        "--autoencoder",
        metavar="NAME",
        help="what made the latents: sd-vae for Stable Diffusion's, whose decoder then draws the "
        "samples; any other name for another one, whose samples are stored as latents. Without "
        "it: sd-vae for repa, other for the others",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        metavar="PIXELS",
        help="side of the images that were encoded, for the record (sd-vae: 8 for each cell)",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help=f"a .json, .npy or .csv file, or {class_labels.FOLDERS} if each sub-folder is a "
        "class; without it SRC/dataset.json (repa), SRC/labels.json, .npy or .csv (moments)",
    )
    parser.add_argument(
        "--class_names",
        metavar="FILE",
        help="a text file with the name of a class on each line, in the order of the labels; "
        "without it their names are 0, 1, ..., or the labels themselves if they are names",
    )
    parser.add_argument(
        "--spread",
        choices=(STD, LOGVAR, NONE),
        help="moments: what the second half of the channels is, a standard deviation or a log "
        "variance; none: all channels are of a latent",
    )
    parser.add_argument(
        "--axes", choices=("chw", "hwc"), help="moments: the axes, where shapes do not tell"
    )
    flags = vars(parser.parse_args(argv))
    convert(flags.pop("src"), flags.pop("dst"), Options(**flags))


def convert(src: str, dst: str, options: Options) -> Manifest:
    """Fill `dst` with the latents of `src`, shard by shard, and return its manifest.

    Raises UserError if the cache cannot be used. Shards that are complete then stay, so that the
    same command continues once the file is repaired.
    """
    _check_folders(src, dst)
    cache = open_cache(src, options)
    labels, plan = make_plan(src, cache, options)
    _print_plan(src, dst, cache, plan)
    _check_storable(cache, 0, next(cache.read(range(1))), plan)
    with open_for_writing(epath.Path(dst)):
        writer = CacheWriter(dst, plan)
        writer.begin()
        if writer.is_complete():
            print(f"{dst} is already complete")
        try:
            _write(writer, cache, labels)
        except UserError:
            writer.withdraw()  # flags may have been wrong: the next ones may be others
            raise
        manifest = writer.finish()
    print(f"{manifest.records:,} records of {len(plan.class_names):,} classes -> {dst}")
    print(f"train from it: {training_command(dst, plan)}")
    return manifest


def _check_folders(src: str, dst: str) -> None:
    check(
        not storage.is_remote(src),
        f"{src!r} is not on a local disk; copy it, or mount it, and give that folder",
    )
    check(os.path.exists(src), f"{src!r} does not exist; expected a folder of latents")
    check(
        os.path.isdir(src),
        f"{src!r} is not a folder; expected a folder of latents: unpack an archive first",
    )
    check(
        not latent_cache.holds_latents(src),
        f"{src!r} already holds latents of this project; train from it with data.source=latents "
        "and that data.path",
    )
    storage.check_reachable("DST", dst)
    if not storage.is_remote(dst):
        inner, outer = os.path.realpath(dst), os.path.realpath(src)
        check(
            os.path.commonpath([inner, outer]) != outer,
            f"{dst!r} is inside of {src!r}, which is only read; give a folder beside it",
        )
    folder = epath.Path(dst)
    check(
        not folder.exists() or folder.is_dir(), f"{dst!r} is a file; give the name of a new folder"
    )
    if folder.exists() and not latent_cache.holds_latents(folder):
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        check(
            not others,
            f"{dst!r} holds other files, such as {others[0] if others else ''!r}; give the name of "
            "a new folder",
        )


def open_cache(src: str, options: Options) -> Cache:
    """Open a cache in the layout that `options` gives, or else in the one that its files show."""
    layout = options.layout or _find_layout(src)
    for name in ("axes", "spread"):
        check(
            layout == "moments" or getattr(options, name) is None,
            f"--{name} is {getattr(options, name)}, but the layout {layout} has its own; leave it "
            "out, or give --layout moments",
        )
    check(
        layout == "lightningdit" or options.multiplier is None,
        f"--multiplier is {options.multiplier}, but only lightningdit has one; give --scale",
    )
    if layout == "lightningdit":
        check(
            options.labels is None,
            f"--labels is {options.labels}, but lightningdit's files hold the labels; leave it out",
        )
        return _open_lightning(src, options)
    if layout == "repa":
        return files.open_repa(src, options.labels)
    if options.spread is None:
        raise UserError(
            f"{src!r} does not say what the second half of its channels is; give --spread std, "
            "logvar, or none if all channels are of a latent"
        )
    return files.open_moments(src, options.labels, options.axes, options.spread)


def _open_lightning(src: str, options: Options) -> Cache:
    multiplier = 1.0 if options.multiplier is None else options.multiplier
    check(
        math.isfinite(multiplier) and multiplier > 0,
        f"--multiplier is {multiplier}; expected a number above 0",
    )
    check(
        options.multiplier is None or options.scale is None,
        f"--multiplier is {multiplier} beside --scale; give only --scale, which includes it",
    )
    return lightning.open_lightning(src, multiplier, needs_stats=options.scale is None)


def _find_layout(src: str) -> str:
    """Return the only layout whose files are in a folder."""
    names = set(os.listdir(src))
    inner = os.path.join(src, files.REPA_FOLDER, files.DATASET)
    found = {
        "repa": files.DATASET in names or os.path.exists(inner),
        "lightningdit": any(name.endswith(lightning.EXTENSION) for name in names),
        "moments": not names.isdisjoint(class_labels.NAMES),
    }
    layouts = [layout for layout, exists in found.items() if exists]
    check(
        layouts,
        f"{src!r} holds neither {files.DATASET} (repa), nor {lightning.EXTENSION} files "
        f"(lightningdit), nor {', '.join(class_labels.NAMES)} (moments); give the folder that "
        "does, or --layout",
    )
    check(
        len(layouts) == 1,
        f"{src!r} may be {' or '.join(layouts)}; give --layout, which decides",
    )
    return layouts[0]


def make_plan(src: str, cache: Cache, options: Options) -> tuple[np.ndarray, Plan]:
    """Return the labels int32 [n], and what the folder is to hold."""
    names = class_labels.read_class_names(options.class_names) if options.class_names else None
    labels, class_names = class_labels.to_classes(cache.labels_file, cache.labels, names)
    autoencoder = options.autoencoder or cache.autoencoder
    side, _, channels = cache.shape
    check(
        autoencoder != SD_VAE or channels == SD_VAE_CHANNELS,
        f"{cache.file_of(0)} has latents of {channels} channels, but those of {SD_VAE} have "
        f"{SD_VAE_CHANNELS}; give --autoencoder other, and --scale",
    )
    normalisation = _normalisation(cache, autoencoder, options)
    image_size = options.image_size or (side * SD_VAE_FACTOR if autoencoder == SD_VAE else None)
    check(
        image_size is None or (image_size > 0 and image_size % side == 0),
        f"--image_size is {image_size}; expected a multiple of {side} pixels, since the latents "
        f"are {side}x{side}",
    )
    moments = Moments(cache.shape, options.dtype, cache.mirrored, cache.variance)
    plan = Plan(
        moments=moments,
        scale=normalisation.scale,
        shift=normalisation.shift,
        autoencoder={"name": autoencoder},
        image_size=image_size,
        class_names=class_names,
        examples=len(labels),
        shard_records=max(1, min(_SHARD_RECORDS, _SHARD_BYTES // moments.record_bytes)),
        source={
            "converted_from": os.path.basename(os.path.abspath(src)),
            "layout": cache.layout,
            **cache.details,
        },
    )
    return labels, plan


def _normalisation(cache: Cache, autoencoder: str, options: Options) -> Normalisation:
    channels = cache.shape[2]
    check(
        options.scale is not None or options.shift is None,
        f"--shift is {options.shift} without --scale; give both",
    )
    if options.scale is not None:
        scale = _numbers("--scale", options.scale, channels)
        check(min(scale) > 0, f"--scale is {options.scale}; expected numbers above 0")
        return Normalisation(scale, _numbers("--shift", options.shift or "0", channels))
    if cache.normalisation:
        return cache.normalisation
    check(
        autoencoder == SD_VAE,
        f"the scale of the latents of the autoencoder {autoencoder!r} is unknown; give --scale "
        "(the network sees scale * (z - shift)), or --autoencoder sd-vae for Stable Diffusion's",
    )
    return Normalisation((SD_VAE_SCALE,) * channels, (0.0,) * channels)


def _numbers(flag: str, text: str, channels: int) -> tuple[float, ...]:
    """Return one number for each channel."""
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    check(
        len(numbers) in (1, channels) and all(map(math.isfinite, numbers)),
        f"{flag} is {text!r}; expected a number, or {channels} with commas between, one for each "
        "channel",
    )
    return numbers * (channels if len(numbers) == 1 else 1)


def _print_plan(src: str, dst: str, cache: Cache, plan: Plan) -> None:
    side, _, channels = cache.shape
    stored = "mean and log variance" if cache.variance else "one latent each, without a variance"
    views = "the images and their mirror images" if cache.mirrored else "no mirror images"
    beside = f"; beside them, not read: {cache.beside}" if cache.beside else ""
    print(f"{src} is {cache.layout}: {stored}, {views}{beside}")
    print(
        f"to write: {plan.examples:,} records of {side}x{side}x{channels} in "
        f"{len(plan.class_names):,} classes, {plan.moments.dtype}, {plan.total_bytes / 1e9:,.2f} "
        f"GB in {len(plan.shards):,} files in {dst}",
        flush=True,
    )


def _write(writer: CacheWriter, cache: Cache, labels: np.ndarray) -> None:
    missing = writer.missing()
    with progress_bar(writer.plan.examples, "latent", desc="converting") as bar:
        bar.update(writer.plan.examples - sum(len(numbers) for _, numbers in missing))
        for name, numbers in missing:
            examples = _examples(writer.plan, cache, labels, numbers, bar.update)
            writer.write_shard(name, numbers, examples)


def _examples(
    plan: Plan,
    cache: Cache,
    labels: np.ndarray,
    numbers: range,
    on_example: Callable[[], object],
) -> Iterator[Example]:
    for number, moments_vhwm in zip(numbers, cache.read(numbers), strict=True):
        _check_storable(cache, number, moments_vhwm, plan)
        yield Example(number, int(labels[number]), moments_vhwm)
        on_example()


def _check_storable(cache: Cache, number: int, moments_vhwm: np.ndarray, plan: Plan) -> None:
    """Raise UserError that names the file of a latent beyond the range of the storage dtype."""
    largest = max(moments_vhwm.max(), -moments_vhwm.min())
    with np.errstate(over="ignore"):
        stored = largest.astype(DTYPES[plan.moments.dtype])
    if not np.isfinite(np.float32(stored)):
        raise UserError(
            f"{cache.file_of(number)} has the value {largest:g}, which {plan.moments.dtype} cannot "
            "hold; give --dtype bfloat16 or float32"
        )


def training_command(folder: str, plan: Plan) -> str:
    """Return the command that trains from a folder of latents."""
    side, _, channels = plan.moments.shape
    settings = {
        "data.path": folder,
        "data.image_size": side,
        "data.channels": channels,
        "data.classes": len(plan.class_names),
    }
    if not plan.moments.mirrored:
        settings["data.flip"] = False
    uniform = len(set(plan.scale)) == 1 and not any(plan.shift)
    if plan.autoencoder["name"] != SD_VAE or not uniform:
        settings["latents.codec"] = "stored"
    elif plan.scale[0] != SD_VAE_SCALE:
        settings["latents.scale"] = plan.scale[0]
    if side <= _FEW_CELLS or side % 2:
        settings["model.patch"] = 1
    flags = (shlex.quote(f"--config.{key}={value}") for key, value in settings.items())
    return "python -m sit_jax.main --config configs/latents.py --workdir runs/latents " + " ".join(
        flags
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
