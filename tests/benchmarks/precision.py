"""Compare what the precision of products changes in images with the solver's own error.

    python tests/benchmarks/precision.py            # on a CPU: TF32 and bfloat16 passes emulated
    python tests/benchmarks/precision.py --device   # on a GPU or TPU: its own "high"

Takes about 3 minutes on two CPU cores, and less than one on a GPU. It needs no download: the
networks are that of tests/golden, and a digits run that is trained here on the CPU.

"high" is TF32 on NVIDIA GPUs and three bfloat16 passes on TPUs. TF32 rounds the operands of a
product to 10 bits of mantissa. Three passes split each operand into two bfloat16 parts of 7 bits,
and leave out the product of the two small parts. Every product of the network is emulated so; the
sums are float32 in either case.

Each figure is the RMS difference of images, relative to the RMS of the images: of a precision from
"highest"; of the solver's steps from much finer ones, both in "highest"; of images from themselves
in 8 bits. Exits with 1 if "high" changes images by more than the larger of the solver's own error
and sample.rtol, 1e-3, which is the error that the default sampler is allowed.
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

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from sit_jax import config as config_lib
from sit_jax.jobs.render import markdown_table
from sit_jax.jobs.sampler import labels_of, make_sampler
from sit_jax.jobs.setup import set_up
from sit_jax.jobs.workdir import restore_weights
from sit_jax.latents.pixels import BIN
from sit_jax.settings import Config, Data, Model, Precision, Sample
from tests import goldens

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = "configs/digits.py"
# (a, b) -> pairs whose products add up to that of a and b
Split = Callable[[jax.Array, jax.Array], Sequence[tuple[jax.Array, jax.Array]]]
COUNT = 64
FINER = 16  # times as many fixed steps


class Case(NamedTuple):
    """A network and its sampler."""

    name: str
    config: Config
    params: Any

    def with_sample(self, **changes: Any) -> "Case":
        """Return the case with other settings of the sampler."""
        sample = dataclasses.replace(self.config.sample, **changes)
        return self._replace(config=dataclasses.replace(self.config, sample=sample))

    def finer(self) -> "Case":
        """Return the case with a sampler that solves the same equation much better."""
        steps = self.config.sample.steps
        if steps is None:
            return self.with_sample(rtol=1e-6, atol=1e-7)
        return self.with_sample(steps=FINER * steps)


def golden_case() -> Case:
    """Return the golden network with the default sampler, guided as the published demonstration."""
    config = Config(
        model=Model(name="SiT-S/2", learn_sigma=True, **vars(goldens.SIZE)),
        data=Data(image_size=8, channels=4, classes=goldens.CLASSES),
        sample=Sample(cfg_scale=4.0, count=COUNT, batch=COUNT),
    )
    return Case("golden network, dopri5", config, goldens.bare()[1])


def digits_case(workdir: str) -> Case:
    """Return the digits run of a workdir with its sampler."""
    config = config_lib.load(
        str(ROOT / DIGITS), [("sample.count", str(COUNT)), ("sample.batch", str(COUNT))]
    )
    params = restore_weights(set_up(config), epath.Path(workdir), "ema").params
    return Case(f"digits, heun with {config.sample.steps} steps", config, params)


def start_training(workdir: str, steps: int) -> subprocess.Popen:
    """Start to train digits on the CPU."""
    command = [sys.executable, "-m", "sit_jax.main", "--config", DIGITS, "--workdir", workdir]
    command += [f"--config.train.steps={steps}", "--config.log.sheet_every=0"]
    cpu = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=cpu, cwd=ROOT, stdout=subprocess.DEVNULL)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield the golden network and digits; on a CPU, where compiling is cheap, in two samplers."""
    with tempfile.TemporaryDirectory() as workdir:
        training = start_training(workdir, options.steps)
        golden = golden_case()
        yield golden
        if not options.device:
            heun = golden.with_sample(solver="heun", steps=25)
            yield heun._replace(name="golden network, heun with 25 steps")
        if training.wait():
            sys.exit("error: the digits run failed; its message is above")
        digits = digits_case(workdir)
        yield digits
        if not options.device:
            dopri5 = digits.with_sample(solver="dopri5", steps=None)
            yield dopri5._replace(name="digits, dopri5")


def images_of(
    case: Case,
    *,
    matmul: str | None = "highest",
    compute: str = "float32",
    split: Split | None = None,
) -> np.ndarray:
    """Return images [n, h, w, c] in this precision; products are emulated with `split`."""
    precision = Precision(compute=compute, matmul=matmul)
    config = dataclasses.replace(case.config, precision=precision)
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


def compare(case: Case, variants: dict[str, dict]) -> tuple[float, float, dict[str, float]]:
    """Return the solver's own error, that of 8 bits, and by variant the change from "highest"."""
    exact = images_of(case)
    error = rms_difference(exact, images_of(case.finer()))
    rounded = rms_difference(np.round((exact + 1) / BIN) * BIN - 1, exact)
    changes = {
        name: rms_difference(images_of(case, **options), exact)
        for name, options in variants.items()
    }
    return error, rounded, changes


def main() -> None:
    """Print the table; exit with 1 if "high" changes images by more than is allowed."""
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
    device = jax.devices()[0]
    if options.device and device.platform == "cpu":
        sys.exit('error: --device compares "high" of a GPU or TPU, and jax sees only CPUs')
    began = time.perf_counter()
    high = ON_DEVICE if options.device else EMULATED
    header = ["images of", "the solver's own error", "8 bits", *high, *BFLOAT16]
    rows = []
    passed = True
    for case in cases(options):
        error, rounded, changes = compare(case, {**high, **BFLOAT16})
        figures = (error, rounded, *changes.values())
        rows.append([case.name, *(f"{figure:.1e}" for figure in figures)])
        print(*rows[-1], sep=" | ", flush=True)
        allowed = max(error, case.config.sample.rtol)
        passed &= all(changes[name] < allowed for name in high)
    print(f"\n{markdown_table(header, rows)}")
    seconds = time.perf_counter() - began
    print(f"{device.device_kind}, jax {jax.__version__}, {seconds:.0f} s")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
