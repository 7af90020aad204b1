"""Measure how fast data is read: photographs against torchvision, and stored latents.

    python tests/benchmarks/data.py                # photographs, at 1 and at 2 workers
    python tests/benchmarks/data.py --latents      # records a second on one core

Takes about 6 minutes on 2 idle cores, and 1 minute with --latents. The first needs PyTorch,
torchvision and scikit-image: pip install -e ".[benchmark]".

Photographs of 500x375 pixels, parts of those of scikit-learn and scikit-image as JPEG files, are
decoded, cropped to 256 pixels and mirrored at random, in batches of 64. The other side is
torchvision's ImageFolder with the transform of the PyTorch reference in a DataLoader with as many
workers. Every turn reads what was read ahead before its time starts. A ratio is torchvision's time
over ours in one pair of turns, and its lower quartile must reach the target. Before that, the crops
of both sides are compared: every pixel must be equal.

Latents are of 32x32x4 in float16 with their mirror images. They are read by number in training's
order, batched, and put onto the device. The time is the processor's, of all threads together, so
that other programs matter less.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests.benchmarks import sides

TARGETS = {"1 worker": 1.3, "2 workers": 1.3}
RECORDS_PER_SECOND = 15_000
SIZE = 256
BATCH = 64
READ_AHEAD = 24  # batches, more than either side holds
TIMED = 8  # batches of a turn
LATENTS = 8192
LATENT_BATCH = 256


def make_photographs(folder: pathlib.Path, count: int) -> None:
    """Write JPEG files of 500x375 pixels into four class folders, as ImageNet's are."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    photographs = [
        *load_sample_images().images,
        skimage.data.astronaut(),
        skimage.data.chelsea(),
        skimage.data.coffee(),
    ]
    draw = np.random.default_rng(0)
    for number in range(count):
        image = Image.fromarray(photographs[number % len(photographs)])
        scale = draw.uniform(0.6, 1.0) * min(image.width / 500, image.height / 375)
        width, height = round(500 * scale), round(375 * scale)
        left = draw.integers(0, image.width - width + 1)
        top = draw.integers(0, image.height - height + 1)
        part = image.crop((left, top, left + width, top + height))
        path = folder / f"class{number % 4}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)


def open_ours(folder: str):
    """Open the folder as sit_jax's source."""
    from sit_jax.data.folder import open_folder
    from sit_jax.data.source import SourceOptions
    from sit_jax.data.transforms import Decoding

    return open_folder(SourceOptions(folder, None, "all", SIZE, 3, Decoding(2**26, False)))


def ours(options: argparse.Namespace) -> sides.Calls:
    """Read with sit_jax."""
    from absl import flags

    from sit_jax.data import pipeline, readers

    flags.FLAGS.mark_as_parsed()
    dataset = pipeline.batches(
        open_ours(options.folder), seed=0, batch_size=BATCH, flip=True, skip_unreadable=False
    )

    def call(workers: int) -> Callable[[], object]:
        batches = readers.iterate(dataset, 0, workers=workers, batch_bytes=BATCH * SIZE * SIZE * 3)
        return sides.Turn(
            prepare=lambda: skip(batches, READ_AHEAD), work=lambda: skip(batches, TIMED)
        )

    return {"1 worker": call(1), "2 workers": call(2)}


def torchvision_side(options: argparse.Namespace) -> sides.Calls:
    """Read with torchvision, as the PyTorch reference does."""
    import torch
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    transform = transforms.Compose(
        [
            transforms.Lambda(lambda image: reference_crop(image, SIZE)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.5] * 3, std=[0.5] * 3, inplace=True),
        ]
    )
    dataset = ImageFolder(options.folder, transform=transform)

    def call(workers: int) -> Callable[[], object]:
        loader = torch.utils.data.DataLoader(
            dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True,
            persistent_workers=True,
        )  # fmt: skip
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        return sides.Turn(
            prepare=lambda: skip(batches, READ_AHEAD), work=lambda: skip(batches, TIMED)
        )

    return {"1 worker": call(1), "2 workers": call(2)}


def skip(batches: Iterator, count: int) -> None:
    """Read batches and drop them."""
    for _ in itertools.islice(batches, count):
        pass


def reference_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop as ADM does: halve with a box filter, then bicubic, then the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    pixels = np.array(image)
    top = (pixels.shape[0] - size) // 2
    left = (pixels.shape[1] - size) // 2
    return Image.fromarray(pixels[top : top + size, left : left + size])


def check_pixels(folder: str) -> None:
    """Exit unless the crops of both sides are equal in every pixel."""
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(folder)
    source = open_ours(folder)
    for index in range(len(source)):
        image, label = dataset[index]
        record = source.read(index)
        if label != record["label"] or not np.array_equal(
            np.asarray(reference_crop(image, SIZE)), record["image"]
        ):
            sys.exit(f"error: record {index} differs from torchvision's")
    print(f"{len(source)} crops are equal in every pixel")


def measure_latents(repeats: int) -> bool:
    """Print records a second on one core; return True if the target is met."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from sit_jax.data import latent_cache, pipeline, readers
    from sit_jax.data.latents import open_latents
    from sit_jax.data.source import SourceOptions

    moments = latent_cache.Moments((32, 32, 4), "float16", mirrored=True, variance=True)
    plan = latent_cache.Plan(
        moments, (0.18215,) * 4, (0.0,) * 4, {"name": "sd-vae"}, 256,
        tuple(map(str, range(1000))), LATENTS, 4096, {},
    )  # fmt: skip
    noise = np.random.default_rng(0).standard_normal(moments.shape_vhwm, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        writer = latent_cache.CacheWriter(folder, plan)
        for name, numbers in writer.missing():
            examples = (latent_cache.Example(n, n % 1000, noise) for n in numbers)
            writer.write_shard(name, numbers, examples)
        writer.finish()
        source = open_latents(SourceOptions(folder, None, "all", 32, 4, None))
        dataset = pipeline.batches(
            source, seed=0, batch_size=LATENT_BATCH, flip=True, skip_unreadable=False
        )
        rates = []
        with contextlib.closing(readers.iterate(dataset, 0, workers=0, batch_bytes=0)) as batches:
            on_device = pipeline.prefetch_to_device(batches, jax.device_put)
            for _ in range(repeats):
                skip(on_device, READ_AHEAD)
                began = time.process_time()
                for batch in itertools.islice(on_device, TIMED):
                    jax.block_until_ready(batch)
                rates.append(TIMED * LATENT_BATCH / (time.process_time() - began))
    low, middle, high = np.percentile(rates, [25, 50, 75])
    met = low >= RECORDS_PER_SECOND
    print(
        f"latents: {middle:,.0f} ({low:,.0f}..{high:,.0f}) records/s of one core, target "
        f"{RECORDS_PER_SECOND:,} {'met' if met else 'missed'}"
    )
    return met


def main() -> None:
    """Run the part that the flags name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", action="store_true", help="measure stored latents")
    parser.add_argument("--images", type=int, default=512, help="photographs (default: 512)")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options, _ = parser.parse_known_args()
    if options.latents:
        sys.exit(0 if measure_latents(repeats=25) else 1)
    if options.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            make_photographs(pathlib.Path(folder), options.images)
            check_pixels(folder)
            sys.argv += ["--folder", folder]
            compare(parser)
    else:
        compare(parser)


def compare(parser: argparse.ArgumentParser) -> None:
    """Compare the two sides in turns."""
    sides.run(parser, {"torchvision": torchvision_side, "sit_jax": ours}, TARGETS, memory=False)


if __name__ == "__main__":
    main()
