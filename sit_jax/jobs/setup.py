"""From a config to the objects that every job is made of."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sit_jax import hosts, optimizer, rng, sharding, train_state
from sit_jax.errors import check
from sit_jax.latents import open_codec
from sit_jax.latents.codec import Codec
from sit_jax.models import attention
from sit_jax.models.sit import SiT, identity
from sit_jax.models.sizes import Size, forward_flops, size_by_name, tokens
from sit_jax.settings import Config
from sit_jax.train_state import TrainState
from sit_jax.train_step import Objective
from sit_jax.transport.interval import train_interval
from sit_jax.transport.paths import Path, path_by_name


@dataclasses.dataclass(frozen=True)
class Setup:
    """A config and what follows from it on this machine's devices. Making one allocates nothing."""

    config: Config
    mesh: Mesh

    @functools.cached_property
    def size(self) -> Size:
        model = self.config.model
        return size_by_name(
            model.name, depth=model.depth, width=model.width, heads=model.heads, patch=model.patch
        )

    @functools.cached_property
    def codec(self) -> Codec:
        return open_codec(
            **dataclasses.asdict(self.config.latents), per_device=sharding.per_device(self.mesh)
        )

    @functools.cached_property
    def codec_params(self) -> Any:
        """The codec's weights, read at the first call; whole on every device."""
        return sharding.put_replicated(self.mesh, hosts.run_on_all(self.codec.load))

    @property
    def path(self) -> Path:
        return path_by_name(self.config.transport.path)

    @property
    def null_label(self) -> int:
        return self.config.data.classes

    @functools.cached_property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what the network sees."""
        data = self.config.data
        return self.codec.shape((data.image_size, data.image_size, data.channels))

    @functools.cached_property
    def model(self) -> SiT:
        model, dtype = self.config.model, jnp.dtype(self.config.precision.compute)
        height, _, channels = self.input_shape
        return SiT(
            size=self.size,
            input_size=height,
            channels=channels,
            classes=self.config.data.classes,
            learn_sigma=model.learn_sigma,
            qk_norm=model.qk_norm,
            remat=model.remat,
            dtype=dtype,
            attend=self.attend,
            **sharding.model_hooks(self.mesh, dtype, jnp.dtype(self.config.precision.grad_reduce)),
        )

    @functools.cached_property
    def attend(self) -> Callable:
        """The attention that is best on the mesh's devices: (q, k, v) [b, heads, tokens, head width] -> like q."""
        platform = self.mesh.devices.flat[0].platform
        height, _, _ = self.input_shape
        found = attention.choose(
            platform, self.config.precision.compute, tokens(height, self.size.patch)
        )
        name = found if self.config.model.attention == "auto" else "einsum"
        function = attention.KERNELS[name]
        return function if name == "einsum" else sharding.on_each_device(self.mesh, function)

    def init_params(self) -> Any:
        """Fresh parameters, a function of the seed alone."""
        x, one = jnp.zeros((1, *self.input_shape)), jnp.zeros((1,))
        # One example cannot be split over devices.
        plain = self.model.clone(
            shard=identity, split=identity, broadcast=identity, attend=attention.einsum
        )
        return plain.init(rng.key(self.config.seed, "params"), x, one, one.astype(jnp.int32))[
            "params"
        ]

    def network(self, params: Any, x_bhwc: jax.Array, t_b: jax.Array, y_b: jax.Array) -> jax.Array:
        return self.model.apply(
            {"params": sharding.gather_ends(self.mesh, params)}, x_bhwc, t_b, y_b
        )

    @property
    def objective(self) -> Objective:
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
            null_label=self.null_label,
        )

    @property
    def schedule(self) -> optax.Schedule:
        o = self.config.optimizer
        return optimizer.learning_rate(
            o.schedule, o.learning_rate, o.warmup_steps, self.config.train.steps
        )

    @property
    def optimizer(self) -> optax.GradientTransformation:
        o = self.config.optimizer
        return optimizer.adamw(
            self.schedule,
            b1=o.b1,
            b2=o.b2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            clip_norm=o.clip_norm,
        )

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of what training carries."""
        return train_state.abstract(self.init_params, self.optimizer, self.mesh)

    def create_state(self) -> TrainState:
        """What training carries before the first step."""
        return train_state.create(self.init_params, self.optimizer, self.abstract_state)

    @property
    def train_flops(self) -> int:
        """Model FLOPs of one image in a training step: forward, and twice that backward."""
        height, _, channels = self.input_shape
        return 3 * forward_flops(self.size, height, channels, self.config.model.learn_sigma)


def set_up(config: Config, devices: Sequence[jax.Device] | None = None) -> Setup:
    """`UserError` if the config does not fit the devices (without any given, this machine's), or its images not the
    codec and the model.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    check_batch(
        mesh, "train.batch / train.accumulation", config.train.batch // config.train.accumulation
    )
    check_batch(mesh, "sample.batch", config.sample.batch)
    setup = Setup(config, mesh)
    for axis, size, what in (
        ("tensor", setup.size.heads, "heads, which it splits"),
        (
            "fsdp",
            setup.size.width,
            "channels of width: every device would hold all parameters whole",
        ),
    ):
        check(
            size % mesh.shape[axis] == 0,
            f"mesh.{axis} = {mesh.shape[axis]} does not divide the model's {size} {what}; "
            f"take one of {', '.join(map(str, sharding.divisors(size)))}, and mesh.data or mesh.tensor for the rest",
        )
    tokens(setup.input_shape[0], setup.size.patch)
    return setup


def check_batch(mesh: Mesh, key: str, size: int) -> None:
    """`UserError` unless the devices can share a batch of this size."""
    shards = sharding.batch_shards(mesh)
    check(
        size % shards == 0,
        f"{key} = {size} is not divisible by the {shards} devices it is split over; make it a multiple of {shards}",
    )


def jit_for_batches(setup: Setup, function: Callable, out_shardings: Any) -> Callable:
    """`function(params, codec_params, *batch)` jitted, matmuls "highest" unless configured.

    A float32 matmul is a few bfloat16 passes on a TPU otherwise: enough for training, not for what is measured.
    """

    def in_precision(*arguments):
        with jax.default_matmul_precision(setup.config.precision.matmul or "highest"):
            return function(*arguments)

    return jax.jit(in_precision, out_shardings=out_shardings)


def call_with_batches(setup: Setup, compiled: Callable) -> Callable:
    """What `jit_for_batches` gives as a function of (params, *batch in NumPy).

    The batch, whole in every process, is spread over the devices.
    """
    return lambda params, *batch: compiled(
        params, setup.codec_params, *sharding.shard_global_batch(setup.mesh, batch)
    )
