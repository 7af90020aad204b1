"""`--mode encode`: store the latents of a data set, so that training need not encode images."""

import argparse
import collections
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sit_jax import hosts, sharding
from sit_jax.data import pipeline
from sit_jax.data.latent_cache import CacheWriter, Example, Moments, Plan, read_manifest
from sit_jax.data.source import Source
from sit_jax.errors import check
from sit_jax.jobs.data import open_source, read_in_order, record_settings
from sit_jax.jobs.job import Job
from sit_jax.jobs.results import OUT, progress_bar
from sit_jax.jobs.setup import Setup
from sit_jax.jobs.workdir import open_for_writing
from sit_jax.record import Record
from sit_jax.settings import Config

_IN_FLIGHT = 2  # batches on the devices, so that they do not wait for the host


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Write the moments of every image, and with data.flip of its mirror image, into the workdir.

    The shards are divided among the processes, each of which encodes on its own devices. Shards
    that are already complete are kept.
    """
    # A mesh of this process only, since processes finish at different times.
    mesh = sharding.make_mesh(-1, 1, 1, jax.local_devices())
    setup = Setup(config, mesh, sharers=hosts.sharers_of_cores())
    check(
        setup.codec.moments,
        f"latents.codec is {config.latents.codec!r}, which has no latents to store; set it to "
        "sd-vae",
    )
    check(
        "image" in setup.record_spec,
        f"data.source is {config.data.source!r}, whose latents are already stored; give images",
    )
    _ = setup.input_shape  # raises UserError for images that the autoencoder cannot encode
    source = hosts.run_on_all(lambda: open_source(setup))
    folder = epath.Path(flags.out or workdir)
    check(
        not hosts.broadcast_from_first((folder / "checkpoints").exists),
        f"{str(folder)!r} holds a run; give another folder for the latents",
    )
    plan = make_plan(setup, source)
    with open_for_writing(folder):
        writer = CacheWriter(folder, plan)
        hosts.broadcast_from_first(writer.begin)
        # Process 0 decides, as the others may see a shared folder with a delay.
        names = hosts.broadcast_from_first(lambda: [name for name, _ in writer.missing()])
        _print_plan(writer, len(names))
        own = set(names[jax.process_index() :: jax.process_count()])
        shards = [(name, numbers) for name, numbers in plan.shards if name in own]
        hosts.run_on_all(lambda: _write_shards(setup, source, writer, shards))
        hosts.broadcast_from_first(lambda: writer.finish() and None)
    if hosts.is_first():
        _print_result(folder)


def make_plan(setup: Setup, source: Source) -> Plan:
    """Return what the folder is to hold: latents of all images of the source."""
    config = setup.config
    height, width, channels = setup.input_shape
    images = record_settings(config.data, source)
    for key in ("subset_seed", "stratified"):  # nothing is drawn
        images.pop(key, None)
    # So that shards of other images, or of images in another order, do not count as complete.
    images["fingerprint"] = hosts.broadcast_from_first(source.fingerprint)
    return Plan(
        moments=Moments(
            (height, width, channels), config.encode.dtype, mirrored=config.data.flip, variance=True
        ),
        scale=(setup.codec.scale,) * channels,
        shift=(0.0,) * channels,
        autoencoder={
            "name": config.latents.codec,
            "repo": config.latents.repo,
            "revision": config.latents.revision,
            "dtype": config.latents.dtype,
            "matmul": config.latents.matmul,
            "encoder": setup.encoder_digest,
        },
        image_size=config.data.image_size,
        class_names=source.class_names,
        examples=len(source),
        shard_records=config.encode.shard,
        source=images | {"crop": "ADM's centre crop"},
    )


def _print_plan(writer: CacheWriter, missing: int) -> None:
    plan = writer.plan
    height, width, channels = plan.moments.shape
    views = "and their mirror images " if plan.moments.mirrored else ""
    total = len(plan.shards)
    print(
        f"encoding {plan.examples:,} images {views}to {height}x{width}x{channels} "
        f"{plan.moments.dtype}, mean and log variance, into {writer.folder}: "
        f"{plan.total_bytes / 1e9:,.2f} GB in {total} shards, {total - missing} of them complete",
        flush=True,
    )


def _print_result(folder: epath.Path) -> None:
    manifest = read_manifest(folder)
    left_out = len(manifest.left_out)
    beside = f"; {left_out:,} images that cannot be read are left out" if left_out else ""
    print(f"{manifest.records:,} records of {len(manifest.plan.class_names)} classes{beside}")
    height, _, channels = manifest.plan.moments.shape
    settings = {
        "source": "latents",
        "path": folder,
        "image_size": height,
        "channels": channels,
        "classes": len(manifest.plan.class_names),
        "flip": manifest.plan.moments.mirrored,
    }
    overrides = " ".join(f"--config.data.{key}={value}" for key, value in settings.items())
    print(
        "train from them with: python -m sit_jax.main --config configs/latents.py --workdir "
        f"WORKDIR {overrides}"
    )


def _write_shards(
    setup: Setup, source: Source, writer: CacheWriter, shards: list[tuple[str, range]]
) -> None:
    numbers = [number for _, shard in shards for number in shard]
    with progress_bar(len(numbers), "image", desc="encoding") as bar:
        stream = _examples(setup, source, numbers)
        for name, shard in shards:
            examples = itertools.islice(stream, len(shard))
            writer.write_shard(name, shard, _readable(examples, bar.update))


def _readable(
    examples: Iterator[Example | None], on_example: Callable[[], Any]
) -> Iterator[Example]:
    for example in examples:
        on_example()
        if example is not None:
            yield example


def _examples(setup: Setup, source: Source, numbers: list[int]) -> Iterator[Example | None]:
    """Yield what to store of each image, in this order; None for one that cannot be read."""
    size = setup.config.latents.batch * setup.mesh.size
    encode = make_encoder(setup)
    skip = setup.config.data.skip_unreadable
    in_flight: collections.deque[tuple[Record, jax.Array]] = collections.deque()
    for batch in read_in_order(setup, source, numbers, size, skip_unreadable=skip):
        in_flight.append((batch, encode(pipeline.pad(batch, size)["image"])))
        if len(in_flight) > _IN_FLIGHT:
            yield from _to_examples(*in_flight.popleft())
    while in_flight:
        yield from _to_examples(*in_flight.popleft())


def _to_examples(batch: Record, moments_bvhwm: jax.Array) -> Iterator[Example | None]:
    moments = np.asarray(jax.device_get(moments_bvhwm))
    for row, index in enumerate(batch["index"]):
        is_read = not batch["skipped"][row]
        yield Example(int(index), int(batch["label"][row]), moments[row]) if is_read else None


def make_encoder(setup: Setup) -> Callable[[np.ndarray], jax.Array]:
    """Return a compiled function from uint8 images [b, h, w, c] to moments [b, v, h, w, m].

    v is 2 with data.flip: the image and its mirror image, since the mirror image of a latent is not
    the latent of the mirror image.
    """
    assert setup.codec.moments is not None

    def encode(params: Any, images_bhwc: jax.Array) -> jax.Array:
        assert setup.codec.moments is not None
        views = [images_bhwc, images_bhwc[:, :, ::-1]] if setup.config.data.flip else [images_bhwc]
        moments = [setup.codec.moments(params, {"image": view_bhwc}) for view_bhwc in views]
        return jnp.stack(moments, axis=1)

    split = sharding.batch_sharding(setup.mesh)
    compiled = jax.jit(encode, out_shardings=split)
    return lambda images_bhwc: compiled(setup.codec_params, jax.device_put(images_bhwc, split))


JOB = Job(
    run,
    "store the latents of a data set, for data.source=latents",
    memory="latents.batch",
    uses=("data.", "latents.", "encode."),
    flags=(OUT,),
)
