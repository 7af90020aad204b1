"""Builds the objects that every job needs from a config."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sit_jax import hosts, optimizer, precision, rng, sharding, train_state
from sit_jax.data.sources import SOURCES
from sit_jax.errors import check
from sit_jax.jobs.labels import read_labels
from sit_jax.latents import CODECS
from sit_jax.latents.codec import Codec
from sit_jax.models import attention
from sit_jax.models.conditioning import ClassLabels
from sit_jax.models.sit import SiT, identity
from sit_jax.models.sizes import Size, forward_flops, size_by_name, tokens
from sit_jax.record import RecordSpec
from sit_jax.settings import Config
from sit_jax.train_state import TrainState
from sit_jax.train_step import Objective
from sit_jax.transport.interval import train_interval
from sit_jax.transport.paths import Path, path_by_name


@dataclasses.dataclass(frozen=True)
class Setup:
    """A config and the objects derived from it for a mesh of devices.

    Creating it allocates no arrays.
    """

    config: Config
    mesh: Mesh
    images: int | None = None  # in the data set, once a training run has opened it
    sharers: int = 1  # processes of the run that use the cores of this one, itself included
    # Whether the network runs inside `sharding.solve_per_device`, on the rows of one device.
    is_per_device: bool = False
    is_training: bool = False  # whether the network is that of the training step

    @property
    def knows_steps(self) -> bool:
        """Whether the number of training steps is known; of train.epochs, only with the data."""
        return self.config.train.steps is not None or self.images is not None

    @property
    def steps(self) -> int:
        """The number of training steps."""
        assert self.knows_steps, "train.epochs is a number of steps only once the data are open"
        return self.config.train.total_steps(self.images or 0)

    @functools.cached_property
    def size(self) -> Size:
        """The network's dimensions."""
        model = self.config.model
        return size_by_name(
            model.name, depth=model.depth, width=model.width, heads=model.heads, patch=model.patch
        )

    @property
    def record_spec(self) -> RecordSpec:
        """The spec of a record of the data source, known without opening it."""
        data = self.config.data
        return SOURCES[data.source].spec(data.image_shape)

    @functools.cached_property
    def codec(self) -> Codec:
        """The codec, which maps records to the network's input and back."""
        latents = self.config.latents
        return CODECS[latents.codec].open(latents.vae, sharding.per_device(self.mesh))

    @property
    def encodes_images(self) -> bool:
        """Whether the training step applies the codec's weights; not to stored latents."""
        return "image" in self.record_spec

    @functools.cached_property
    def codec_params(self) -> Any:
        """The codec's weights, read at the first access; a complete copy on every device."""
        return sharding.put_replicated(self.mesh, hosts.run_on_all(self.codec.load))

    @property
    def encoder_digest(self) -> str:
        """A name for the weights that the moments of latents depend on: 16 hexadecimal digits."""
        return _digest(self.codec.encoder(self.codec_params))

    def codec_settings(self) -> dict[str, Any]:
        """Return what images depend on besides the network: {} for a codec without weights."""
        if not self.codec.abstract_params:
            return {}
        settings = dataclasses.asdict(self.config.latents) | {"batch": None}
        if settings["matmul"] == "highest":  # as earlier versions, which had no such setting
            del settings["matmul"]
        return {"latents": settings | {"weights": _digest(self.codec_params)}}

    @functools.cached_property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the network's input."""
        return self.codec.shape(self.record_spec)

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image that the codec decodes."""
        x = jax.ShapeDtypeStruct((sharding.batch_shards(self.mesh), *self.input_shape), jnp.float32)
        decoded = jax.eval_shape(self.codec.decode, self.codec.abstract_params, x)
        return decoded.shape[1:]

    @functools.cached_property
    def sample_labels(self) -> np.ndarray:
        """The labels to draw samples of, int32 [k]."""
        sample, classes = self.config.sample, self.config.data.classes
        if sample.labels_file is not None:
            return read_labels(sample.labels_file, classes)
        return np.asarray(sample.labels or range(classes), np.int32)

    @property
    def sample_batch(self) -> int:
        """The number of samples drawn at a time, over all devices."""
        sample = self.config.sample
        if sample.microbatch is None:
            return sample.batch
        return sample.microbatch * sharding.batch_shards(self.mesh)

    def matmul(self, use: precision.Use) -> str:
        """Return the precision of the network's float32 products."""
        return precision.matmul(use, self.config.precision.matmul)

    @property
    def path(self) -> Path:
        """The interpolant."""
        return path_by_name(self.config.transport.path)

    @property
    def conditioning(self) -> ClassLabels:
        """The kind of condition that the network takes."""
        return ClassLabels(self.config.data.classes)

    @functools.cached_property
    def model(self) -> SiT:
        """The network on the mesh."""
        model = self.config.model
        dtype = jnp.dtype(self.config.precision.compute)
        grad_dtype = jnp.dtype(self.config.precision.grad_reduce)
        height, _, channels = self.input_shape
        if self.is_per_device:
            hooks = sharding.local_hooks(dtype, grad_dtype)
        else:
            hooks = sharding.model_hooks(self.mesh, dtype, grad_dtype)
        return SiT(
            size=self.size,
            input_size=height,
            channels=channels,
            classes=self.config.data.classes,
            learn_sigma=model.learn_sigma,
            qk_norm=model.qk_norm,
            remat=model.remat,
            unroll=self.unroll,
            dtype=dtype,
            kernel=self.kernel,
            attend=self.attend,
            **hooks._asdict(),
        )

    @property
    def platform(self) -> str:
        """The kind of the devices: cpu, gpu or tpu."""
        platform = self.mesh.devices.flat[0].platform
        return "gpu" if platform == "cuda" else platform  # cuda: a GPU that is absent

    @property
    def unroll(self) -> int:
        """Layers in each iteration of the loop over layers.

        On a GPU a loop copies all that it keeps for the backward pass: 12 % of XL/2's step. A
        network without a backward pass gains 2 % at most, for three times the time to compile.
        """
        if not self.is_training:
            return 1
        if self.config.model.unroll is not None:
            return self.config.model.unroll
        return self.size.depth if self.platform == "gpu" and not self.needs_loop else 1

    @property
    def needs_loop(self) -> bool:
        """Whether kernels that repeat rule out unrolled layers; see `compiler_options`."""
        return self.config.precision.deterministic and self.kernel == "cudnn"

    @property
    def compiler_options(self) -> dict[str, bool]:
        """XLA's options for the programs of this setup."""
        if self.platform != "gpu":
            return {}
        # XLA compiles equal calls of cuDNN's backward pass once, and with repeatable kernels it
        # then does not find the others (an IndexError, seen with jax 0.11.2).
        is_repeatable = self.kernel != "cudnn" or self.unroll == 1
        return {
            "xla_gpu_exclude_nondeterministic_ops": is_repeatable,
            # cuBLAS adds the bias and applies GELU within the product, Triton's products do not.
            "xla_gpu_enable_triton_gemm": False,
        }

    @property
    def kernel(self) -> str:
        """The name of the attention kernel in `attention.KERNELS`."""
        if self.config.model.attention != "auto":
            return "einsum"
        count = tokens(self.input_shape[0], self.size.patch)
        head_width = self.size.width // self.size.heads
        return attention.choose(self.platform, self.config.precision.compute, count, head_width)

    @functools.cached_property
    def attend(self) -> Callable:
        """Attention with that kernel: (q, k, v) [b, heads, tokens, head width] -> like q."""
        attend = attention.KERNELS[self.kernel]
        is_local = self.kernel in attention.SPLITTABLE or self.is_per_device
        return attend if is_local else sharding.on_each_device(self.mesh, attend)

    def init_params(self) -> Any:
        """Return fresh parameters, a function of the seed only."""
        x = jnp.zeros((1, *self.input_shape))
        t = jnp.zeros((1,))
        label = jnp.zeros((1,), jnp.int32)
        # A batch of one example cannot be split over devices.
        plain = self.model.clone(
            shard=identity, split=identity, broadcast=identity, attend=attention.einsum, unroll=1
        )
        return plain.init(rng.key(self.config.seed, "params"), x, t, label)["params"]

    def network(
        self,
        params: Any,
        x_bhwc: jax.Array,
        t_b: jax.Array,
        condition: Any,
        layers: Sequence[int] = (),
    ) -> Any:
        """Apply the network: like x, or with `layers` as `SiT` returns it.

        Its products have the precision of the caller's context; see `network_for`.
        """
        complete = params if self.is_per_device else sharding.gather_ends(self.mesh, params)
        variables = {"params": complete}
        return self.model.apply(variables, x_bhwc, t_b, condition, layers=layers)

    def network_for(self, use: precision.Use) -> Callable:
        """Return `network` with products of the precision for this use, whatever the context."""
        return in_precision(self.network, self.matmul(use))

    @property
    def objective(self) -> Objective:
        """The function to learn."""
        transport = self.config.transport
        return Objective(
            path=self.path,
            prediction=transport.prediction,
            weight=transport.loss_weight,
            interval=train_interval(self.path, transport.prediction, transport.train_eps),
            times=transport.times,
            times_mean=transport.times_mean,
            times_std=transport.times_std,
            label_dropout=self.config.train.label_dropout,
            conditioning=self.conditioning,
        )

    @property
    def schedule(self) -> optax.Schedule:
        """The learning rate by step."""
        return optimizer.make_schedule(self.config.optimizer, self._schedule_steps)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer with its schedule."""
        return optimizer.make_optimizer(self.config.optimizer, self._schedule_steps)

    @property
    def _schedule_steps(self) -> int:
        # Before the data are open any number will do: shapes and costs do not depend on it.
        return self.steps if self.knows_steps else 1

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the training state."""
        return train_state.abstract(self.init_params, self.optimizer, self.mesh)

    def create_state(self) -> TrainState:
        """Return the training state before the first step."""
        return train_state.create(self.init_params, self.optimizer, self.abstract_state)

    @property
    def train_flops(self) -> int:
        """Model FLOPs of one image in a training step: forward, and twice that backward."""
        height, _, channels = self.input_shape
        return 3 * forward_flops(self.size, height, channels, self.config.model.learn_sigma)


def _digest(weights: Any) -> str:
    result = hashlib.sha256()
    for leaf in jax.tree.leaves(hosts.to_host(weights)):
        result.update(np.asarray(leaf).tobytes())
    return result.hexdigest()[:16]


def set_up(config: Config, devices: Sequence[jax.Device] | None = None) -> Setup:
    """Return the setup of a config on `devices`, by default all that jax has.

    Raises `UserError` if the mesh or the model does not fit the devices, or the images do not fit
    the codec or the model. A job checks the batches that it uses.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    setup = Setup(config, mesh, sharers=hosts.sharers_of_cores())
    for axis, size, dimension in (
        ("tensor", setup.size.heads, "heads, which it splits"),
        (
            "fsdp",
            setup.size.width,
            "channels of width: every device would hold a complete copy of all parameters",
        ),
    ):
        divisors = ", ".join(map(str, sharding.divisors(size)))
        check(
            size % mesh.shape[axis] == 0,
            f"mesh.{axis} = {mesh.shape[axis]} does not divide the model's {size} {dimension}; "
            f"take one of {divisors}, and mesh.data or mesh.tensor for the rest",
        )
    tokens(setup.input_shape[0], setup.size.patch)
    check_unroll(setup)
    return setup


def check_unroll(setup: Setup) -> None:
    """Raise `UserError` if the layers are to be unrolled where kernels that repeat forbid it."""
    unroll = setup.config.model.unroll
    check(
        not setup.needs_loop or unroll in (None, 1),
        f"model.unroll is {unroll}, but with cuDNN's attention precision.deterministic=true needs "
        "a loop over single layers; set model.unroll=none, or precision.deterministic=false",
    )


def check_train_batch(setup: Setup) -> None:
    """Raise `UserError` unless a microbatch divides evenly over the devices."""
    train = setup.config.train
    microbatch = train.batch // train.accumulation
    check_batch(setup.mesh, "train.batch / train.accumulation", microbatch)


def check_sample_batch(setup: Setup) -> None:
    """Raise `UserError` unless sample.batch divides evenly over the devices."""
    check_batch(setup.mesh, "sample.batch", setup.sample_batch)


def check_batch(mesh: Mesh, key: str, size: int) -> None:
    """Raise `UserError` unless a batch of this size divides evenly over the devices."""
    shards = sharding.batch_shards(mesh)
    check(
        size % shards == 0,
        f"{key} = {size} is not divisible by the {shards} devices it is split over; make it a "
        f"multiple of {shards}",
    )


def in_precision(function: Callable, matmul: str) -> Callable:
    """Return the function with matmuls of this precision. It keeps its name in profiles and HLO."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        with jax.default_matmul_precision(matmul):
            return function(*arguments, **named)

    return wrapped


def jit_for_batches(setup: Setup, function: Callable, out_shardings: Any) -> Callable:
    """Return `function(params, codec_params, *batch)` jitted, with "highest" matmuls.

    These are the products of solvers (diffrax sums the stages of a step with one) and of codecs.
    There are few, and their rounding would add up over the steps. The network's products have the
    precision that `Setup.network_for` gives them.
    """
    return jax.jit(
        in_precision(function, "highest"),
        out_shardings=out_shardings,
        compiler_options=setup.compiler_options,
    )


def call_with_batches(setup: Setup, compiled: Callable) -> Callable:
    """Return the result of `jit_for_batches` as a function of (params, *batch).

    The batch is in NumPy, complete in every process, and is split over the devices here.
    """

    def call(params: Any, *batch: Any) -> Any:
        on_devices = sharding.shard_global_batch(setup.mesh, batch)
        return compiled(params, setup.codec_params, *on_devices)

    return call
