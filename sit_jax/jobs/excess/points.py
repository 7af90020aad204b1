"""A data set as the network sees it, in memory: the points that an optimum knows by heart.

Shape suffixes: n points, d dimensions of the network's input.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sit_jax import hosts, sharding
from sit_jax.data import pipeline
from sit_jax.data.source import Source
from sit_jax.errors import check
from sit_jax.jobs.data import read_in_order
from sit_jax.jobs.results import progress_bar
from sit_jax.jobs.setup import Setup, call_with_batches, jit_for_batches
from sit_jax.latents import posterior
from sit_jax.transport.optimal import PADDING, Points

_BLOCK_ELEMENTS = 2**24  # of the means of a block of points, 64 MiB
_LARGEST_MATRIX = 8192  # rows of a covariance whose eigenvalues take minutes, not hours


@dataclasses.dataclass(frozen=True)
class DataPoints:
    """Points in the order in which they were read; with data.flip, then their mirror images."""

    mean_nd: np.ndarray  # float32
    std_nd: np.ndarray | None  # float32, of stored posteriors; None: all 0
    labels_n: np.ndarray  # int32
    unreadable: int  # images that were left out

    def __len__(self) -> int:
        return len(self.labels_n)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with any of the points."""
        result = hashlib.sha256()
        for array in (self.mean_nd, self.std_nd, self.labels_n):
            if array is not None:
                result.update(np.ascontiguousarray(array).data)
        return result.hexdigest()[:16]

    @property
    def mean_square(self) -> float:
        """The mean of x1^2 over points and dimensions."""
        arrays = [array for array in (self.mean_nd, self.std_nd) if array is not None]
        # einsum converts small parts to float64, not a complete copy.
        sums = [np.einsum("nd,nd->", array, array, dtype=np.float64) for array in arrays]
        return float(sum(sums) / self.mean_nd.size)

    def of_class(self, label: int) -> "DataPoints":
        """Return the points of a class."""
        rows = self.labels_n == label
        std_nd = None if self.std_nd is None else self.std_nd[rows]
        return DataPoints(self.mean_nd[rows], std_nd, self.labels_n[rows], 0)

    def blocks(self) -> list[Points]:
        """Return the points sorted by label, in blocks of equal size, the last one padded."""
        order = np.argsort(self.labels_n, kind="stable")
        size = min(len(self), max(1, _BLOCK_ELEMENTS // self.mean_nd.shape[1]))
        return [
            self._block(order[start : start + size], max(0, start + size - len(self)))
            for start in range(0, len(self), size)
        ]

    def _block(self, rows: np.ndarray, padding: int) -> Points:
        def take(array: np.ndarray, value: float = 0) -> np.ndarray:
            widths = [(0, padding)] + [(0, 0)] * (array.ndim - 1)
            return np.pad(array[rows], widths, constant_values=value)

        return Points(
            take(self.mean_nd),
            None if self.std_nd is None else take(self.std_nd),
            take(self.labels_n, PADDING),
        )


def read_points(setup: Setup, source: Source, indices: Sequence[int]) -> DataPoints:
    """Read the images at these indices, and their mirror images with data.flip.

    Images that cannot be read are left out with data.skip_unreadable. Raises `UserError` if this
    machine has too little memory.
    """
    data = setup.config.data
    pipeline.check_flip(source.can_mirror, data.flip)
    shape = (len(indices) * (1 + data.flip), math.prod(setup.input_shape))
    has_std = setup.codec.moments is not None or "moments" in setup.record_spec
    _check_memory(shape, 1 + has_std)
    mean_nd = np.empty(shape, np.float32)
    std_nd = np.zeros(shape, np.float32) if has_std else None
    labels_n = np.empty(shape[0], np.int32)
    count = 0
    for mean_bd, std_bd, labels_b in _batches(setup, source, indices):
        rows = slice(count, count + len(labels_b))
        mean_nd[rows] = mean_bd
        labels_n[rows] = labels_b
        if std_nd is not None:
            std_nd[rows] = std_bd
        count = rows.stop
    check(count, f"none of the {len(indices):,} images can be read; check data.path")
    if std_nd is not None and not std_nd[:count].any():  # latents stored without their variance
        std_nd = None
    return DataPoints(
        mean_nd[:count],
        None if std_nd is None else std_nd[:count],
        labels_n[:count],
        (shape[0] - count) // (1 + data.flip),
    )


def _batches(setup: Setup, source: Source, indices: Sequence[int]) -> Iterator[tuple]:
    """Yield (means, standard deviations or None, labels) of the images that can be read."""

    def encode(params: None, codec_params: Any, records: Any) -> tuple:
        return posterior.input_distribution(setup.codec, codec_params, records)

    compiled = jit_for_batches(encode, sharding.batch_sharding(setup.mesh))
    call = call_with_batches(setup, compiled)
    size = setup.config.excess.batch
    mirrors = (False, True) if setup.config.data.flip else (False,)
    with progress_bar(len(indices) * len(mirrors), "image", desc="data", leave=False) as bar:
        for mirrored in mirrors:
            for batch in read_in_order(
                setup,
                source,
                indices,
                size,
                skip_unreadable=setup.config.data.skip_unreadable,
                mirrored=mirrored,
            ):
                mean, std = hosts.to_host(call(None, pipeline.pad(batch, size)))
                rows = np.flatnonzero(batch["skipped"] == 0)
                mean_bd, std_bd = (
                    None if x is None else x.reshape(size, -1)[rows] for x in (mean, std)
                )
                yield mean_bd, std_bd, batch["label"][rows]
                bar.update(len(batch["label"]))


def _check_memory(shape: tuple[int, int], arrays: int) -> None:
    size = math.prod(shape) * 4 * arrays
    check(
        size < hosts.memory(),
        f"the {shape[0]:,} images of {shape[1]:,} numbers take {size / 2**30:,.0f} GiB, and this "
        f"machine has {hosts.memory() / 2**30:,.0f} GiB: all of them must be in memory; use a "
        "larger machine, or train on latents",
    )


def covariance_eigenvalues(points: DataPoints) -> np.ndarray | None:
    """Return the eigenvalues of the points' covariance (over n), float64; None if it is too large.

    With fewer points than dimensions they are those of the points' Gram matrix, and zeros.
    """
    n, d = points.mean_nd.shape
    # The variance of posteriors adds a diagonal, which the Gram matrix cannot hold.
    use_gram = n < d and points.std_nd is None
    if (n if use_gram else d) > _LARGEST_MATRIX:
        return None
    mean_d = points.mean_nd.mean(axis=0, dtype=np.float64)
    if use_gram:
        centred_nd = points.mean_nd - mean_d
        values = np.linalg.eigvalsh(centred_nd @ centred_nd.T / n)
        return np.concatenate([np.zeros(d - n), values])
    covariance_dd = np.zeros((d, d))
    rows = max(1, _BLOCK_ELEMENTS // d)
    for start in range(0, n, rows):
        centred_rd = points.mean_nd[start : start + rows] - mean_d
        covariance_dd += centred_rd.T @ centred_rd / n
    if points.std_nd is not None:
        variance_d = np.einsum("nd,nd->d", points.std_nd, points.std_nd, dtype=np.float64) / n
        covariance_dd += np.diag(variance_d)
    return np.linalg.eigvalsh(covariance_dd)
