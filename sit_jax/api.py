"""A trained run from Python, a thin layer over the jobs.

    import sit_jax

    run = sit_jax.load("runs/digits")
    images = run.sample(labels=[3, 1, 4], cfg_scale=4)  # uint8 NumPy [3, 8, 8, 1]

Arrays in and out are NumPy. x is the network's input [n, h, w, c]: pixels in [-1, 1], or latents.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from sit_jax import config as config_lib
from sit_jax import hosts, runtime, sharding, storage
from sit_jax.data import pipeline
from sit_jax.errors import UserError, brief, check, unknown_name
from sit_jax.jobs import likelihood, sampler
from sit_jax.jobs.setup import Setup, call_with_batches, jit_for_batches
from sit_jax.jobs.workdir import Weights, restore_weights
from sit_jax.laws import in_group
from sit_jax.settings import WEIGHTS, Config, Likelihood, Sample
from sit_jax.transport.prediction import velocity_field
from sit_jax.validation import check_null_label

Labels = Sequence[int] | np.ndarray | int | None


def load(workdir: epath.PathLike, weights: str = "ema") -> "Run":
    """Return the newest complete checkpoint of a workdir, on all devices of this process.

    `weights` is "ema", or "raw" for the parameters themselves. Raises
    `UserError` if the folder is not a workdir, has no complete checkpoint, or holds a different
    model from the one in its config.
    """
    changed = runtime.changed_numerics()
    check(
        not changed,
        f"jax's options {', '.join(map(str.upper, changed))} would give other numbers than the "
        f"command line does; set them back: "
        + ", ".join(f"jax.config.update({name!r}, {value!r})" for name, value in changed.items()),
    )
    check(
        isinstance(workdir, str | os.PathLike),
        f"workdir is {brief(workdir)}; expected the path of a trained run",
    )
    path = storage.expand("workdir", os.fspath(workdir))
    storage.check_reachable("workdir", path)
    folder = epath.Path(path)
    recorded = folder / "config.json"
    check(
        recorded.exists(),
        f"{str(folder)!r} is not a workdir: it has no config.json; give the workdir of a run",
    )
    if weights not in tuple(WEIGHTS):
        raise unknown_name("weights", weights, WEIGHTS)
    config = config_lib.load(str(recorded))
    # Data-parallel over the devices here, however the run was trained.
    setup = Setup(config, sharding.make_mesh(-1, 1, 1))
    restored = restore_weights(setup, folder, weights)
    return Run(setup, restored)


class Run:
    """A trained run: its config, its step and parameters, and what can be computed with them."""

    def __init__(self, setup: Setup, weights: Weights):
        self.config: Config = setup.config
        self.step = weights.step
        self.params = weights.params
        self._note = weights.note
        self._setup = setup
        self._samplers: dict[tuple[Sample, bool], Callable] = {}
        self._log_probs: dict[Likelihood, Callable] = {}
        self._tokens: dict[int, Callable] = {}

    def __repr__(self) -> str:
        return f"<sit_jax.Run of {self.config.model.name} at step {self.step}>"

    def sample(
        self, labels: Labels = None, *, noise: np.ndarray | None = None, **options: Any
    ) -> np.ndarray:
        """Return samples, uint8 [n, h, w, c], or [n, frames, h, w, c] with `frames`.

        With latents.codec "stored" they are float32 latents, in the units of the autoencoder.
        `options` are settings of the section `sample`, such as cfg_scale=4, solver="heun", steps=25
        or seed=1; others are as in the run's config. n is the number of `labels`, or of rows in
        `noise`, or `count`. Sample i is the image that `--mode sample` writes for index i and this
        label. `noise` [n, h, w, c], standard normal, replaces the noise that the seed gives. New
        options compile a new program at their first use; so does a new count below sample.batch.
        Other labels do not.

        Raises `UserError` for an unknown option, an invalid value or a label out of range.
        """
        count = options.get("count")
        if labels is not None:
            labels_n = _whole_numbers(labels)
            options |= {"labels": tuple(labels_n.tolist()), "count": len(labels_n)}
            options = {"label_draw": "balanced", "labels_file": None} | options
        if noise is not None:
            noise = _checked("noise", noise, self._setup.input_shape, np.float32)
            options["count"] = len(noise)
            check(
                labels is None or len(labels_n) in (1, len(noise)),
                f"{len(noise)} rows of noise, but {0 if labels is None else len(labels_n)} labels; "
                "give one label, or as many as rows",
            )
        check(
            count in (None, options.get("count")),
            f"count is {brief(count)}, but labels or noise are given for {options.get('count')} "
            "samples; leave count out",
        )
        setup = self._with("sample", options, without=("columns", "scale", "format"))
        size = min(setup.config.sample.count, setup.sample_batch)
        padded = self._padded_size(size)
        batch = dataclasses.replace(setup.config.sample, batch=padded, microbatch=None)
        setup = dataclasses.replace(setup, config=dataclasses.replace(setup.config, sample=batch))
        draw = self._sampler(setup, from_noise=noise is not None)

        def draw_batch(params: Any, indices: np.ndarray, condition: Any) -> Any:
            if noise is None:
                return draw(params, indices, condition)
            return draw(params, noise[indices], indices, condition)

        indices = np.arange(setup.config.sample.count)
        batches = sampler.sample_images(setup, draw_batch, self.params, indices)
        if setup.codec.has_decoder:
            samples_nfhwc = np.concatenate([batch.images_bfhwc for batch in batches])
        else:
            x_nfhwc = np.concatenate([batch.x_bfhwc for batch in batches])
            samples_nfhwc = sampler.to_latents(self._note, x_nfhwc)
        return samples_nfhwc if setup.config.sample.frames else samples_nfhwc[:, 0]

    def velocity(self, x: np.ndarray, t: np.ndarray | float, labels: Labels = None) -> np.ndarray:
        """Return the drift of the probability-flow ODE at x [n, h, w, c] and time t, like x.

        t is one time or [n], from 0 (noise) to 1 (data). No labels: the null label. No guidance.
        """
        return self._apply(self._velocity, x, t, labels)

    @functools.cached_property
    def _velocity(self) -> Callable:
        setup = self._setup

        def velocity(params: Any, _: Any, x: jax.Array, t_n: jax.Array, condition: Any) -> Any:
            def predict(x: jax.Array, t_b: jax.Array) -> jax.Array:
                return setup.network_for("measurement")(params, x, t_b, condition)

            return velocity_field(predict, setup.path, setup.objective.prediction)(x, t_n)

        return jit_for_batches(setup, velocity, sharding.batch_sharding(setup.mesh))

    def tokens(
        self, x: np.ndarray, t: np.ndarray | float, labels: Labels = None, *, layer: int
    ) -> np.ndarray:
        """Return the tokens after `layer` blocks of the network, [n, tokens, width].

        The other arguments are as for `velocity`. Raises `UserError` if the layer does not exist.
        """
        check(
            isinstance(layer, int | np.integer),
            f"layer is {layer!r}; expected a whole number from 1 to the model's depth",
        )
        if layer not in self._tokens:
            setup = self._setup

            def tokens(params: Any, _: Any, x: jax.Array, t_n: jax.Array, condition: Any) -> Any:
                network = setup.network_for("measurement")
                _, by_layer = network(params, x, t_n, condition, layers=(layer,))
                return by_layer[layer]

            out_sharding = sharding.batch_sharding(setup.mesh)
            self._tokens[layer] = jit_for_batches(setup, tokens, out_sharding)
        return self._apply(self._tokens[layer], x, t, labels)

    def log_prob(self, images: np.ndarray, labels: Labels = None, **options: Any) -> np.ndarray:
        """Return log p of uint8 images [n, h, w, c] in nats, float [n].

        `options` are settings of the section `likelihood`. No labels: the null label. Bits per
        dimension are -log_prob / (dimensions * log 2).
        """
        images = _array("images", images)
        check(
            self._setup.encodes_images,
            "this run was trained on stored latents, which log_prob cannot take; --mode likelihood "
            "evaluates them",
        )
        check(
            images.dtype == np.uint8,
            f"images are {images.dtype}; expected uint8, as sample() returns them",
        )
        images = _checked("images", images, self.config.data.image_shape, np.uint8)
        options |= {"labels": "data"}  # `labels` holds the null label where none are given
        config = self._with("likelihood", options, without=("split", "count")).config
        # As `--mode likelihood` does: the divergence needs attention with forward-mode derivatives.
        setup = Setup(likelihood.with_einsum_attention(config), self._setup.mesh)
        if setup.config.likelihood not in self._log_probs:
            self._log_probs[setup.config.likelihood] = likelihood.make_log_prob(setup)
        log_prob = self._log_probs[setup.config.likelihood]
        labels_n = self._labels(labels, len(images))
        size = self._padded_size(min(len(images), setup.config.likelihood.batch))
        parts = []
        for start in range(0, len(images), size):
            rows = slice(start, start + size)
            records = {
                "index": np.arange(len(images), dtype=np.int32)[rows],
                "image": images[rows],
                "label": labels_n[rows],
            }
            padded = pipeline.pad(records, size)
            condition = setup.conditioning.from_records(padded)
            outputs = log_prob(self.params, padded["index"], padded, condition)
            parts.append(hosts.to_host(outputs)[0][: len(records["index"])])
        log_prob_n = np.concatenate(parts)
        bad = np.flatnonzero(~np.isfinite(log_prob_n))
        check(
            not len(bad),
            f"log p of images {bad[:8].tolist()} is not finite; use more steps or looser "
            "tolerances, or check whether training diverged",
        )
        return log_prob_n

    def _with(self, section: str, options: dict[str, Any], without: Sequence[str]) -> Setup:
        """Return the setup with these settings of one section changed, after checking them.

        `without` names the settings of the section that have no meaning here.
        """
        check(
            "weights" not in options,
            f"weights is {options.get('weights')!r}, but this run has its weights already; choose "
            "them in sit_jax.load(workdir, weights=...)",
        )
        options = {  # NumPy's scalars as Python's, which settings are
            name: value.tolist() if isinstance(value, np.generic | np.ndarray) else value
            for name, value in options.items()
        }
        names = [field.name for field in dataclasses.fields(getattr(self.config, section))]
        keys = [name for name in names if name not in ("weights", *without)]
        for name in options:
            if name not in keys:
                raise unknown_name(f"setting of {section}", name, keys)
        values = dataclasses.asdict(self.config)
        values[section] |= options
        config = config_lib.from_values(values)
        check_null_label(config, lambda key: in_group(key, (f"{section}.",)))
        return Setup(config, self._setup.mesh)

    def _apply(self, compiled: Callable, x: np.ndarray, t: Any, labels: Labels) -> np.ndarray:
        """Call a compiled function of (x, t_n, condition) on a batch padded for the devices."""
        x = _checked("x", x, self._setup.input_shape, np.float32)
        expected = f"expected one time, or {len(x)}, from 0 (noise) to 1 (data)"
        t_n = _array("t", t)
        check(t_n.dtype.kind in "fiu", f"t is {brief(t)}; {expected}")
        t_n = t_n.astype(np.float32)
        check(t_n.shape in ((), (len(x),)), f"t has shape {t_n.shape}; {expected}")
        check(((t_n >= 0) & (t_n <= 1)).all(), f"t is {t_n.tolist()}; {expected}")
        records = {
            "x": x,
            "t": np.broadcast_to(t_n, (len(x),)),
            "label": self._labels(labels, len(x)),
        }
        padded = pipeline.pad(records, self._padded_size(len(x)))
        condition = self._setup.conditioning.from_records(padded)
        call = call_with_batches(self._setup, compiled)
        return hosts.to_host(call(self.params, padded["x"], padded["t"], condition))[: len(x)]

    def _labels(self, labels: Labels, count: int) -> np.ndarray:
        """Return `count` labels, int32. None stands for the null label, one label for all."""
        classes = self.config.data.classes
        if labels is None:
            check(
                self.config.train.label_dropout > 0,
                "labels are None, which is the null label, but train.label_dropout is 0, so that "
                f"no null label is trained; give labels from 0 to {classes - 1}",
            )
            return np.full(count, classes, np.int32)
        labels_n = _whole_numbers(labels)
        check(
            len(labels_n) in (1, count),
            f"{len(labels_n)} labels for {count} examples; give one, or as many as examples",
        )
        bad = labels_n[(labels_n < 0) | (labels_n >= classes)]
        check(
            not len(bad),
            f"labels hold {bad[:4].tolist()}; expected 0 to {classes - 1} (data.classes)",
        )
        return np.broadcast_to(labels_n, (count,)).astype(np.int32)

    def _padded_size(self, count: int) -> int:
        """Return the next multiple of the number of devices that share a batch."""
        shards = sharding.batch_shards(self._setup.mesh)
        return -(-count // shards) * shards

    def _sampler(self, setup: Setup, from_noise: bool) -> Callable:
        """Return the compiled sampler for these options, compiled at their first use."""
        # The compiled program does not depend on labels, count or the layout of sheets.
        key = dataclasses.replace(
            setup.config.sample,
            labels=(),
            label_draw="balanced",
            labels_file=None,
            count=1,
            columns=1,
            scale=1,
        )
        if (key, from_noise) not in self._samplers:
            guide = sampler.open_guide(setup.config)
            make = sampler.make_sampler_from_noise if from_noise else sampler.make_sampler
            self._samplers[key, from_noise] = make(setup, guide)
        return self._samplers[key, from_noise]


def _array(name: str, value: Any) -> np.ndarray:
    """Return the value as an array. Raises `UserError` for lists of unequal lengths."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise UserError(
            f"{name} is {brief(value)}; expected an array, or lists of equal lengths"
        ) from error


def _whole_numbers(labels: Any) -> np.ndarray:
    """Return labels as an array [n]. Raises `UserError` unless they are whole numbers."""
    array = np.atleast_1d(_array("labels", labels))
    check(
        array.dtype.kind in "iu" and array.ndim == 1 and len(array),
        f"labels are {brief(labels)}; expected one whole number, or a list of them",
    )
    return array


def _checked(name: str, array: Any, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return a non-empty batch [n, *shape] of finite numbers. Raises `UserError` for any other."""
    array = _array(name, array)
    check(
        array.ndim == len(shape) + 1 and array.shape[1:] == shape and len(array),
        f"{name} has shape {array.shape}; expected [n, {', '.join(map(str, shape))}] with n > 0",
    )
    numbers = array.dtype.kind in "fiu"
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which is refused below
        array = array.astype(dtype) if numbers else array
    check(
        numbers and np.isfinite(array).all(),
        f"{name} holds NaN, values beyond {np.dtype(dtype).name} or no numbers; expected finite "
        "numbers",
    )
    return array
