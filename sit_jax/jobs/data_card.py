"""What a data set holds: the card in a run's workdir, and `--mode data`, which reads every record.

A card is data.json beside data.png, a sheet of the first images.
"""

import argparse
import concurrent.futures
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from sit_jax import hosts, sharding, storage
from sit_jax.data import latent_cache, pipeline, statistics
from sit_jax.data.latents import LatentSource
from sit_jax.data.source import EncodedImages, Source, UnreadableImage
from sit_jax.data.statistics import ChannelSums
from sit_jax.errors import UserError
from sit_jax.image_io import encode_png, to_uint8
from sit_jax.jobs.data import draw, open_source, read_in_order, record_settings
from sit_jax.jobs.job import SHEET, Job
from sit_jax.jobs.results import OUT, make_sheet, open_results, progress_bar
from sit_jax.jobs.setup import Setup, call_with_batches, jit_for_batches, set_up
from sit_jax.latents.stored import false_colours
from sit_jax.record import Record
from sit_jax.settings import Config

CARD = "data.json"
_PICTURE = "data.png"
_SHOWN = 64  # images of the sheet
_THREADS = 8
_BATCH = 64
_SIZED = 10_000  # images whose size is looked at, at most
_LISTED = 5  # unreadable files in the printed summary

# How far the mean and the spread of normalised latents may lie from 0 and 1. A scale or shift for
# each channel promises that each channel is normalised. A single factor, such as the SD-VAE's,
# promises it only of all channels together: on ImageNet its channels have means of up to
# 1.1 and spreads down to 0.6, by the figures that EDM2 (arXiv 2312.02696) publishes with its code.
_TOLERANCE = 0.25

Decode = Callable[[np.ndarray], np.ndarray]  # x_bhwc -> images_bhwc in [-1, 1]


def describe_data(setup: Setup, source: Source, counts: np.ndarray | None) -> dict[str, Any]:
    """Return a card of what is known without reading all records.

    `counts` are the numbers of images of the classes; None if they are not known.
    """
    data = setup.config.data
    names = source.class_names
    return {
        "source": data.source,
        "path": data.path,
        "name": data.name,
        "split": data.split,
        "images": len(source),
        "classes": (
            list(names) if counts is None else dict(zip(names, counts.tolist(), strict=True))
        ),
        "records": {
            name: f"{np.dtype(array.dtype).name} {list(array.shape)}"
            for name, array in source.spec.items()
        },
        "mirrored_at_random": data.flip,
        "passed_over": source.passed_over,
        **source.details,
    }


def write_card(setup: Setup, source: Source, workdir: epath.Path) -> None:
    """Write data.json and data.png into the workdir, unless they describe these data already.

    Says what has changed. Reads no more than the images of the sheet.
    """
    counts = None
    if source.labels is not None:
        counts = np.bincount(source.labels, minlength=len(source.class_names))
    card = json.loads(json.dumps(describe_data(setup, source, counts)))
    before = _read(workdir / CARD)
    if before is not None:
        changed = [key for key in card if before.get(key) != card[key]]
        changed += [key for key in before if key not in card and key != "sheet"]
        if not changed:
            return
        print(f"{CARD} is written again, as these have changed: {', '.join(changed)}")
    reason = "--mode data decodes them" if setup.codec.has_decoder else _no_decoder(setup)
    sheet, card["sheet"] = _sheet(setup, source, reason)
    storage.write_bytes(workdir / _PICTURE, sheet)
    storage.write_text(workdir / CARD, json.dumps(card, indent=2) + "\n")


def _read(path: epath.Path) -> dict[str, Any] | None:
    """Return a card written earlier, or None if there is none or it is damaged."""
    try:
        card = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError, RecursionError):
        return None
    return card if isinstance(card, dict) else None


def _sheet(setup: Setup, source: Source, decode: Decode | str) -> tuple[bytes, str]:
    """Return the first images as a PNG, and a phrase on it. Unreadable ones are black.

    `decode` is for latents; a text is the reason why they are not decoded.
    """
    count = min(_SHOWN, len(source))

    def read(index: int) -> Record | None:
        try:
            return source.read(index)
        except UserError:
            return None

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        records = list(threads.map(read, range(count)))
    blank = {name: np.zeros(array.shape, array.dtype) for name, array in source.spec.items()}
    batch = {name: np.stack([(record or blank)[name] for record in records]) for name in blank}
    text = f"{_PICTURE}: the first {count:,} of {len(source):,}"
    if "image" in batch:
        images = batch["image"]
    elif isinstance(decode, str):
        images = to_uint8(false_colours(_normalised(batch)))
        text += f", latents in false colours ({decode})"
    else:
        images = to_uint8(decode(_normalised(batch)))
        text += ", decoded"
    if missing := [index for index, record in enumerate(records) if record is None]:
        images[missing] = 0
        text += f"; black where unreadable: {', '.join(map(str, missing))}"
    return encode_png(make_sheet(setup.config, images)), text


def _normalised(batch: Record) -> np.ndarray:
    """Return x_bhwc, float32, of the means of stored latents."""
    scale_bc, shift_bc = batch["scale"], batch["shift"]
    mean_bhwc = np.split(batch["moments"].astype(np.float32), 2, axis=-1)[0]
    return scale_bc[:, None, None, :] * (mean_bhwc - shift_bc[:, None, None, :])


def _no_decoder(setup: Setup) -> str:
    return f"latents.codec={setup.config.latents.codec} has no decoder"


def _decoder(setup: Setup) -> Decode | str:
    """Return a function from the network's input to images, or the reason why there is none."""
    if not setup.codec.has_decoder:
        return _no_decoder(setup)
    try:
        _ = setup.codec_params
    except UserError as error:
        return str(error)

    def images_of(params: None, codec_params: Any, x_bhwc: jax.Array) -> jax.Array:
        return setup.codec.decode(codec_params, x_bhwc)

    compiled = jit_for_batches(images_of, sharding.replicated(setup.mesh))

    def decode(x_bhwc: np.ndarray) -> np.ndarray:
        shards = sharding.batch_shards(setup.mesh)
        padded = pipeline.pad({"x": x_bhwc}, -(-len(x_bhwc) // shards) * shards)["x"]
        images = call_with_batches(setup, compiled)(None, padded)
        return np.asarray(hosts.to_host(images))[: len(x_bhwc)]

    return decode


class Contents(NamedTuple):
    """What `read_all` has found."""

    counts: np.ndarray  # readable records of each class
    unreadable: list[str]  # why each of the others cannot be read, which names it
    sums: ChannelSums | None  # of pixels or of normalised latents; None if nothing is readable


def read_all(setup: Setup, source: Source) -> Contents:
    """Read every record, each process its share. An unreadable record does not stop it."""
    indices = range(jax.process_index(), len(source), jax.process_count())
    counts = np.zeros(len(source.class_names), np.int64)
    unreadable: list[tuple[int, str]] = []
    sums: list[ChannelSums] = []  # one, or none so far
    batches = read_in_order(setup, source, indices, _BATCH, skip_unreadable=True)
    with progress_bar(len(indices), "image", desc="reading") as bar:
        for batch in batches:
            readable = batch["skipped"] == 0
            counts += np.bincount(batch["label"][readable], minlength=len(counts))
            lost = batch["index"][~readable].tolist()
            unreadable += [(index, _reason(source, index)) for index in lost]
            if readable.any():
                sums = [statistics.total([*sums, _sums(batch, readable)])]
            bar.update(len(readable))
    found = hosts.gather([counts.tolist(), unreadable, [part.to_json() for part in sums]])
    lost_records = sorted((index, reason) for _, lost, _ in found for index, reason in lost)
    parts = [ChannelSums.from_json(part) for _, _, of_one in found for part in of_one]
    return Contents(
        np.sum([of_one for of_one, _, _ in found], axis=0),
        [reason for _, reason in lost_records],
        statistics.total(parts) if parts else None,
    )


def _sizes(source: EncodedImages, indices: Sequence[int]) -> dict[str, Any] | None:
    """Return the sizes of stored images at these indices; None if none can be read.

    Only their headers are decoded. An image smaller than data.image_size is enlarged.
    """

    def size(index: int) -> tuple[int, int] | None:
        try:
            return source.size(index)
        except UnreadableImage:
            return None

    with (
        concurrent.futures.ThreadPoolExecutor(_THREADS) as threads,
        progress_bar(len(indices), "image", desc="sizes") as bar,
    ):
        sizes = []
        for found in threads.map(size, indices):
            bar.update()
            sizes += [found] if found else []
    if not sizes:
        return None
    widths, heights = np.array(sizes).T
    return {
        "images": len(sizes),
        "width": _least_median_most(widths),
        "height": _least_median_most(heights),
        "smaller_than_image_size": int((np.min(sizes, axis=1) < source.image_size).sum()),
    }


def _least_median_most(values: np.ndarray) -> list[int]:
    return [int(values.min()), int(np.median(values)), int(values.max())]


def _reason(source: Source, index: int) -> str:
    """Return why a record cannot be read."""
    try:
        source.read(index)
    except UserError as error:
        return str(error)
    return f"record {index} could not be read at first, and then could"


def _sums(batch: Record, readable: np.ndarray) -> ChannelSums:
    """Return the sums of the readable rows of a batch."""
    if "image" in batch:
        return statistics.of_pixels(batch["image"][readable])
    scale_bc, shift_bc = batch["scale"][readable], batch["shift"][readable]
    return statistics.of_latents(batch["moments"][readable], scale_bc[0], shift_bc[0])


def _statistics(source: Source, sums: ChannelSums) -> dict[str, Any]:
    """Return the mean and spread of each channel, and for latents what their scale promises."""
    values: dict[str, Any] = {
        "of": "pixels, 0 to 255",
        "mean": _rounded(sums.mean_c),
        "std": _rounded(sums.std_c),
    }
    if not isinstance(source, LatentSource):
        return values
    plan = source.manifest.plan
    values["of"] = "x = scale * (z - shift), for a draw z from each posterior"
    mean, std = sums.mean_and_std
    values |= {"mean_of_all": round(mean, 4), "std_of_all": round(std, 4)}
    is_by_channel = len({*zip(plan.scale, plan.shift, strict=True)}) > 1
    if is_by_channel:
        promise = f"each channel: mean 0, std 1, within {_TOLERANCE}"
        pairs = [
            (f"channel {number}", *pair)
            for number, pair in enumerate(zip(values["mean"], values["std"], strict=True))
        ]
    else:
        promise = f"all channels together: std 1, within {_TOLERANCE}"
        pairs = [("all channels", 0.0, std)]
    off = [
        f"{name}: mean {mean:.3g}, std {std:.3g}"
        for name, mean, std in pairs
        if abs(mean) > _TOLERANCE or abs(std - 1) > _TOLERANCE
    ]
    return values | {"promise": promise, "off": off}


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]


def changed_shards(source: LatentSource) -> list[str]:
    """Return a line for each shard whose checksum is not that of the manifest."""
    shards = source.manifest.shards[jax.process_index() :: jax.process_count()]
    changed = []
    total = sum(shard.bytes for shard in shards)
    with progress_bar(total, "B", desc="checksums", unit_scale=True) as bar:
        for shard in shards:
            try:
                latent_cache.check_sha256(epath.Path(source.folder) / shard.name, shard.sha256)
            except (UserError, OSError) as error:
                changed.append(str(error))
            bar.update(shard.bytes)
    return sorted(line for lines in hosts.gather(changed) for line in lines)


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Read all records and write workdir/data/NAME/{data.json, data.png}; print a summary."""
    setup = set_up(config)
    source = hosts.run_on_all(lambda: open_source(setup))
    settings = {"data": record_settings(config.data, source)}
    with open_results(flags, workdir, "data", config.data.source, settings) as results:
        contents = read_all(setup, source)
        card = describe_data(setup, source, contents.counts)
        card |= {"unreadable": contents.unreadable}
        if isinstance(source, EncodedImages):
            drawn = sorted(draw(setup, source, min(len(source), _SIZED)))
            card["sizes"] = hosts.broadcast_from_first(lambda: _sizes(source, drawn))
        if contents.sums:
            card["statistics"] = _statistics(source, contents.sums)
        decode: Decode | str = ""
        if isinstance(source, LatentSource):
            card["changed_shards"] = changed_shards(source)
            decode = _decoder(setup)
        sheet, card["sheet"] = _sheet(setup, source, decode)
        results.write_bytes(_PICTURE, sheet)
        results.write_text(CARD, json.dumps(card, indent=2) + "\n")
        for line in summary(card):
            print(line)
        print(f"card: {results.folder / CARD}, {_PICTURE}")


def summary(card: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that the job prints of a complete card."""
    counts = card["classes"]
    small, large = min(counts, key=counts.get), max(counts, key=counts.get)
    yield (
        f"images of a class: {counts[small]:,} ({small!r}) to {counts[large]:,} ({large!r}), "
        f"{sum(counts.values()):,} in all"
    )
    yield f"unreadable: {len(card['unreadable']):,}"
    yield from _first_lines(card["unreadable"])
    if sizes := card.get("sizes"):
        width, height = ("{}, {}, {}".format(*sizes[side]) for side in ("width", "height"))
        yield (
            f"sizes of {sizes['images']:,} images (least, median, most): width {width}; height "
            f"{height}; {sizes['smaller_than_image_size']:,} are smaller than data.image_size"
        )
    if "statistics" in card:
        values = card["statistics"]
        yield f"{values['of']}: mean {_listed(values['mean'])}, std {_listed(values['std'])}"
        if "promise" in values:
            off = f"OFF: {'; '.join(values['off'])}" if values["off"] else "kept"
            yield f"promise of the scale ({values['promise']}): {off}"
    if "changed_shards" in card:
        yield f"shards with another checksum: {len(card['changed_shards']):,} of {card['shards']:,}"
        yield from _first_lines(card["changed_shards"])


def _first_lines(lines: Sequence[str]) -> Iterator[str]:
    yield from (f"  {line}" for line in lines[:_LISTED])
    if len(lines) > _LISTED:
        yield f"  and {len(lines) - _LISTED:,} more, all in {CARD}"


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


JOB = Job(
    run,
    "read every record: what the data hold, what cannot be read, mean and spread",
    memory="data.max_pixels or data.workers",
    flags=(OUT,),
    uses=("data.", "latents.", "mesh.", *SHEET),
)
