"""Measure time and memory of nearest neighbours, and what float32 alone would decide wrongly.

    python tests/benchmarks/neighbours.py [--rows 50000] [--columns 10000]

The features are random, 2048 wide and not negative, as Inception's pool features are; their
variances decay. The first 100 rows are copies. Prints seconds, peak memory, the rows that the
device's candidates left to float64, and the largest distance that float32 gives to a copy.
"""

import argparse
import pathlib
import resource
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from sit_jax.metrics import neighbours

WIDTH = 2048
COPIES = 100


def features(n: int, seed: int) -> np.ndarray:
    mixing = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32) / WIDTH**0.5
    scales = np.arange(1, WIDTH + 1, dtype=np.float32) ** np.float32(-0.6)
    draw = np.random.default_rng(seed)
    rows = np.empty((n, WIDTH), np.float32)
    for start in range(0, n, 1000):
        part = rows[start : start + 1000]
        noise = draw.standard_normal(part.shape, np.float32)
        part[:] = np.maximum(6 * (noise * scales) @ mixing + np.float32(0.3), 0)
    return rows


def main(n: int, m: int) -> None:
    a, b = features(n, 1), features(m, 2)
    a[:COPIES] = b[:COPIES]
    print(f"features: {(a.nbytes + b.nbytes) / 2**30:.2f} GiB", flush=True)
    start, busy = time.perf_counter(), time.process_time()
    distance, _ = neighbours.nearest(a, b)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"nearest: {seconds:.0f} s, {busy:.0f} s of one core; peak {peak:.2f} GiB", flush=True)
    few = a[: min(n, 4096)]
    bounds, _ = neighbours._candidates(few, b, np.zeros(m), 6, skip_self=False)
    left = np.sum(bounds[:, -1] < distance[: len(few)] ** 2)
    print(f"left to float64 entirely: {left} of {len(few):,} rows")
    copies = a[:COPIES]
    norms = np.sum(copies**2, axis=1)
    float32 = np.sqrt(np.abs(np.diag(norms[:, None] + norms - 2 * copies @ copies.T)).max())
    print(f"copies: distance {distance[:COPIES].max()}; up to {float32:.1e} by float32 products")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--columns", type=int, default=10_000)
    options = parser.parse_args()
    main(options.rows, options.columns)
