"""The files that samples are written to: images, their frames, and samples.npz."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sit_jax import hosts, storage
from sit_jax.image_io import ImageWriter, sheet, to_uint8
from sit_jax.jobs.parts import Parts
from sit_jax.jobs.results import Results
from sit_jax.jobs.sampler import Samples, from_latents, labels_of, to_latents
from sit_jax.jobs.setup import Setup


class SampleFiles:
    """The samples of a folder of results, in the files that sample.format asks for.

    samples.npz holds images, `arr_0` [n, h, w, 3] uint8 with grey ones in RGB and the labels
    `arr_1` [n], as ADM's evaluation reads them. A codec without a decoder always has a samples.npz:
    of latents `arr_0` [n, h, w, c], and `labels` [n]. All processes call every method.
    """

    def __init__(self, setup: Setup, results: Results, note: Mapping[str, Any]):
        self._setup = setup
        self._results = results
        self._note = note  # of the checkpoint
        self._options = setup.config.sample
        self._has_pngs = self._options.format != "npz"
        self._holds_latents = not setup.codec.has_decoder
        self._has_npz = self._options.format != "png" or self._holds_latents
        if self._holds_latents:
            self._arrays = Parts(results.folder, setup.input_shape, np.float32)
        else:
            self._arrays = Parts(results.folder, setup.image_shape, np.uint8)
        self._frames = None
        if self._options.frames:
            self._frames = ImageWriter(results.folder / "frames")
            hosts.broadcast_from_first(lambda: storage.clean_up(results.folder / "frames"))

    def missing(self) -> np.ndarray:
        """Return the indices of the samples that no intact file holds, ascending.

        PNGs that are missing are written if samples.npz or a part of it has their images.
        """
        indices = hosts.broadcast_from_first(lambda: sorted(self._missing()))
        return np.asarray(indices, np.int64)

    def _missing(self) -> set[int]:
        count = self._options.count
        without_array = set(range(count)) - self._held()
        without_png = self._without_png() if self._reads_pngs() else set(range(count))
        missing = without_array if self._holds_latents else without_array & without_png
        if self._frames:
            missing |= set(self._frames.missing(count))
        if self._has_pngs:
            self._export(sorted(without_png - without_array))
        if self._has_npz:
            self._arrays.check_room(count, len(missing) if self._fills_parts else 0)
        return missing

    def _held(self) -> set[int]:
        held, damaged = self._arrays.survey()
        for path in damaged:
            print(f"{path} is damaged; its samples are drawn again")
        return set(held[held < self._options.count].tolist())

    def _reads_pngs(self) -> bool:
        return self._has_pngs or (self._results.folder / "images").exists()

    def _without_png(self) -> set[int]:
        shape = None if self._holds_latents else self._setup.image_shape
        return self._results.survey_images(self._options.count, shape)

    @property
    def _fills_parts(self) -> bool:
        return self._holds_latents or not self._has_pngs

    def _export(self, indices: list[int]) -> None:
        images = map(self._to_image, self._arrays.read(indices))
        self._results.images.write_all(zip(indices, images, strict=True))

    def _to_image(self, array_hwc: np.ndarray) -> np.ndarray:
        if not self._holds_latents:
            return array_hwc
        x_bhwc = jnp.asarray(from_latents(self._note, array_hwc[None]))
        return to_uint8(np.asarray(self._setup.codec.decode({}, x_bhwc)))[0]

    def write(self, batch: Samples, is_missing_b: np.ndarray) -> None:
        """Write the samples of a batch that are missing; each process some of them."""
        rows = [row for row in self._results.own_rows(len(batch.indices)) if is_missing_b[row]]
        indices = [int(batch.indices[row]) for row in rows]
        if self._frames:  # before the sample's own image
            strips = (batch.images_bfhwc[row] for row in rows)
            self._frames.write_all(zip(indices, map(self._strip, strips), strict=True))
        if self._fills_parts:
            for index, row in zip(indices, rows, strict=True):
                self._arrays.add(index, self._array(batch, row))
            self._arrays.flush_if_due()
        if self._has_pngs:
            images = (batch.images_bfhwc[row, -1] for row in rows)
            self._results.images.write_all(zip(indices, images, strict=True))

    def _strip(self, strip_fhwc: np.ndarray) -> np.ndarray:
        return sheet(strip_fhwc, len(strip_fhwc), scale=self._options.scale)

    def _array(self, batch: Samples, row: int) -> np.ndarray:
        if batch.x_bfhwc is None:
            return batch.images_bfhwc[row, -1]
        return to_latents(self._note, batch.x_bfhwc[row, -1])

    def finish(self, drawn: int) -> None:
        """Write samples.npz and sheet.png, once all processes have written their samples."""
        self._arrays.flush()
        hosts.gather(None)
        hosts.broadcast_from_first(lambda: self._finish(drawn))

    def _finish(self, drawn: int) -> None:
        count = self._options.count
        if not self._has_npz:
            self._arrays.remove_below(count)  # whose images are in PNGs now
        elif drawn or not self._arrays.is_joined(count):
            labels = labels_of(self._setup, np.arange(count))
            name = "labels" if self._holds_latents else "arr_1"
            kept = self._arrays.join(self._all_arrays(count), count, **{name: labels})
            if kept:
                print(f"samples.npz held more samples, and is kept as {kept}")
        self._results.write_sheet(self._setup.config, self._first_images())

    def _all_arrays(self, count: int) -> Iterator[np.ndarray]:
        """Yield what samples.npz is to hold: from parts and an older one, otherwise from PNGs."""
        held = np.zeros(count, bool)
        if self._fills_parts:
            indices = self._arrays.held()
            held[indices[indices < count]] = True
        arrays = self._arrays.read(np.flatnonzero(held))
        images: Iterator[np.ndarray] = iter(())
        if not held.all():
            images = self._results.images.read_all(np.flatnonzero(~held).tolist())
        for is_held in held:
            array = next(arrays) if is_held else next(images)
            yield array if self._holds_latents else as_rgb(array)

    def _first_images(self) -> np.ndarray:
        shown = range(min(self._options.count, self._setup.config.log.sheet_count))
        if self._has_pngs:
            return np.stack(list(self._results.images.read_all(shown)))
        return np.stack([self._to_image(array) for array in self._arrays.read(shown)])


def as_rgb(image_hwc: np.ndarray) -> np.ndarray:
    """Return an image with three channels; a grey one has them all equal."""
    return np.repeat(image_hwc, 3, axis=-1) if image_hwc.shape[-1] == 1 else image_hwc
