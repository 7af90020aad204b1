"""Compare what the precision of products changes in images with the solver's own error.

    python tests/benchmarks/precision.py            # on a CPU: TF32 and bfloat16 passes emulated
    python tests/benchmarks/precision.py --device   # on a GPU or TPU: its own "high"

Takes about 2 minutes on two CPU cores, and less than one on a GPU. It needs no download: the
networks are that of tests/golden, and a digits run that is trained here on the CPU.

"high" is TF32 on NVIDIA GPUs and three bfloat16 passes on TPUs. TF32 rounds the operands of a
product to 10 bits of mantissa. Three passes split each operand into two bfloat16 parts of 7 bits,
and leave out the product of the two small parts. Every product of the network is emulated so; the
sums are float32 in either case.

Each figure is the RMS difference of images, relative to the RMS of the images: of a precision from
"highest"; of the solver's default steps from much finer ones, both in "highest". Exits with 1 if
"high" changes images by more than the solver errs.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import lax

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from sit_jax import config as config_lib
from sit_jax.jobs.render import markdown_table
from sit_jax.jobs.sampler import labels_of, make_sampler
from sit_jax.jobs.setup import set_up
from sit_jax.jobs.workdir import restore_weights
from sit_jax.settings import Config, Data, Model, Precision, Sample
from tests import goldens

# (a, b) -> pairs whose products add up to that of a and b
Split = Callable[[jax.Array, jax.Array], Sequence[tuple[jax.Array, jax.Array]]]
COUNT = 64
FINER = 16  # times as many fixed steps


class Case(NamedTuple):
    """A network, and a sampler with a finer one that solves the same equation."""

    name: str
    config: Config
    params: Any
    finer: Sample


def golden_cases() -> list[Case]:
    """Return the golden network with the default sampler and with Heun's, guided as published."""
    config = Config(
        model=Model(name="SiT-S/2", learn_sigma=True, **vars(goldens.SIZE)),
        data=Data(image_size=8, channels=4, classes=goldens.CLASSES),
        sample=Sample(cfg_scale=4.0, count=COUNT, batch=COUNT),
    )
    _, params = goldens.bare()
    heun = dataclasses.replace(config.sample, solver="heun", steps=25)
    return [
        _case("golden network, dopri5", config, params),
        _case("golden network, heun", dataclasses.replace(config, sample=heun), params),
    ]


def _case(name: str, config: Config, params: Any) -> Case:
    sample = config.sample
    if sample.steps is None:
        finer = dataclasses.replace(sample, rtol=1e-6, atol=1e-7)
        return Case(f"{name}, rtol {sample.rtol:g}", config, params, finer)
    finer = dataclasses.replace(sample, steps=FINER * sample.steps)
    return Case(f"{name}, {sample.steps} steps", config, params, finer)


def digits_case(steps: int) -> Case:
    """Return configs/digits.py after so many steps of training on the CPU, with its sampler."""
    config = config_lib.load(
        str(ROOT / "configs" / "digits.py"),
        [("sample.count", str(COUNT)), ("sample.batch", str(COUNT))],
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sit_jax.main", "--workdir", folder]
        command += ["--config", "configs/digits.py", f"--config.train.steps={steps}"]
        command += ["--config.log.sheet_every=0"]
        subprocess.run(
            command,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        params = restore_weights(set_up(config), epath.Path(folder), "ema").params
    return _case("digits, heun", config, params)


def images_of(
    case: Case,
    *,
    matmul: str | None = "highest",
    compute: str = "float32",
    split: Split | None = None,
    sample: Sample | None = None,
) -> np.ndarray:
    """Return images [n, h, w, c] in this precision; products are emulated with `split`."""
    config = dataclasses.replace(
        case.config,
        precision=Precision(compute=compute, matmul=matmul),
        sample=sample or case.config.sample,
    )
    setup = set_up(config)
    indices = np.arange(config.sample.count, dtype=np.int32)
    with emulated(split) if split else contextlib.nullcontext():
        images_bfhwc, _, _ = make_sampler(setup)(case.params, indices, labels_of(setup, indices))
    return np.asarray(images_bfhwc[:, -1], np.float64)


def tf32(a: jax.Array, b: jax.Array) -> Sequence[tuple[jax.Array, jax.Array]]:
    """Return operands that are rounded as in TF32: 8 bits of exponent, 10 of mantissa."""
    return [(lax.reduce_precision(a, 8, 10), lax.reduce_precision(b, 8, 10))]


def three_passes(a: jax.Array, b: jax.Array) -> Sequence[tuple[jax.Array, jax.Array]]:
    """Return the operands of three bfloat16 products, the smallest first."""
    (a_high, a_low), (b_high, b_low) = map(_parts, (a, b))
    return [(a_low, b_high), (a_high, b_low), (a_high, b_high)]


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = lax.reduce_precision(x, 8, 7)
    return high, lax.reduce_precision(x - high, 8, 7)


@contextlib.contextmanager
def emulated(split: Split) -> Iterator[None]:
    """Compute the products that are traced meanwhile from the operands that `split` returns.

    They are the network's: of linear.py and attention.py. Those inside jax and diffrax, such as
    the sums of a solver's stages, go through jax's private names.
    """
    dot_general, einsum = lax.dot_general, jnp.einsum

    def split_dot(a: jax.Array, b: jax.Array, *options: Any) -> Any:
        return sum(dot_general(x, y, *options) for x, y in split(a, b))

    def split_einsum(equation: str, a: jax.Array, b: jax.Array, **options: Any) -> Any:
        return sum(einsum(equation, x, y, **options) for x, y in split(a, b))

    with (
        mock.patch.object(lax, "dot_general", split_dot),
        mock.patch.object(jnp, "einsum", split_einsum),
    ):
        yield


EMULATED = {
    "TF32, emulated": {"split": tf32},
    "three bfloat16 passes, emulated": {"split": three_passes},
}
ON_DEVICE = {"high": {"matmul": "high"}}
BFLOAT16 = {"bfloat16 compute": {"compute": "bfloat16"}}


def rms_difference(images: np.ndarray, exact: np.ndarray) -> float:
    """Return the RMS of the difference, relative to that of `exact`."""
    return float(np.sqrt(np.mean((images - exact) ** 2) / np.mean(exact**2)))


def compare(case: Case, variants: dict[str, dict]) -> tuple[float, dict[str, float]]:
    """Return the solver's own error, and by variant the difference from "highest"."""
    highest = images_of(case)
    error = rms_difference(highest, images_of(case, sample=case.finer))
    return error, {
        name: rms_difference(images_of(case, **options), highest)
        for name, options in variants.items()
    }


def main() -> None:
    """Print the table; exit with 1 if a difference of "high" is larger than the solver's error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", action="store_true", help='compare the device\'s own "high" instead'
    )
    parser.add_argument(
        "--steps", type=int, default=300, help="training steps of digits (default: %(default)s)"
    )
    options = parser.parse_args()
    platform = jax.devices()[0].platform
    if options.device and platform == "cpu":
        sys.exit('error: --device compares "high" of a GPU or TPU, and jax sees only CPUs')
    began = time.perf_counter()
    high = ON_DEVICE if options.device else EMULATED
    header = ["images of", "the solver's own error", *high, *BFLOAT16]
    rows = []
    passed = True
    for case in [*golden_cases(), digits_case(options.steps)]:
        error, differences = compare(case, {**high, **BFLOAT16})
        rows.append([case.name, f"{error:.1e}", *(f"{d:.1e}" for d in differences.values())])
        print(*rows[-1], sep=" | ", flush=True)
        passed &= all(differences[name] < error for name in high)
    print(
        f"\n{markdown_table(header, rows)}\n{jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    print(f"{time.perf_counter() - began:.0f} s")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
