"""Every setting: its default, its law and its help, each in one place.

`sit_jax.config` reads the values from a config file and the command line, where each is a flag:
--config.train.steps=1000. `python -m sit_jax.main --help-config SECTION` prints what stands here.
"""

import dataclasses
from typing import Any

from sit_jax.data import sources
from sit_jax.latents import CODECS, dequantise
from sit_jax.latents.sd_vae import VaeOptions
from sit_jax.laws import (
    Law,
    anything,
    choice,
    from_0_to_1,
    not_negative,
    positive,
    seed_range,
    setting,
)
from sit_jax.models.sit import REMAT_POLICIES
from sit_jax.models.sizes import SIZES
from sit_jax.optimizer import SCHEDULES
from sit_jax.sampling import density, ode, sde
from sit_jax.sampling.ode import OdeOptions
from sit_jax.sampling.sde import SdeOptions
from sit_jax.transport import diffusion, losses, paths, prediction, times

WEIGHTS = {"ema": "ema", "raw": "params"}  # a name in a config -> the item of a checkpoint
DTYPES = ("float32", "bfloat16")
MATMUL_PRECISIONS = ("default", "high", "highest")

_time_margin = Law(
    lambda eps: 0 < eps < 0.5,
    "a number inside (0, 0.5): give one, or none for the path's default",
)
_cfg_scale = Law(lambda scale: scale >= 1, "1 (no guidance) or more")
_frechet_count = Law(lambda count: count >= 2, "2 or more, as a Frechet distance needs")
_frames = Law(lambda frames: frames >= 2, "2 or more, or none")
_axis = Law(lambda size: size == -1 or size >= 1, "1 or more, or -1 for the remaining devices")
_last_step_size = Law(lambda size: 0 < size < 1, "a number inside (0, 1), or sample.last_step=none")


@dataclasses.dataclass(frozen=True)
class Model:
    """The network."""

    name: str = choice("SiT-S/2", SIZES, "a published size; the next four replace parts of it")
    depth: int | None = setting(None, positive, "transformer blocks")
    width: int | None = setting(None, positive, "channels of the residual stream")
    heads: int | None = setting(None, positive, "attention heads")
    patch: int | None = setting(
        None, positive, "pixels, or latent cells, along one side of a token"
    )
    qk_norm: bool = setting(
        False,
        anything,
        "RMSNorm of queries and keys: more stable in bfloat16; the published weights have none",
    )
    learn_sigma: bool = setting(
        False,
        anything,
        "twice the output channels, half of them unused, as in the published weights",
    )
    attention: str = choice(
        "auto",
        ("auto", "einsum"),
        "auto: the fastest kernel for the devices; einsum: plain products, the only kind with "
        "forward-mode derivatives",
    )
    remat: str = choice(
        "dots",
        REMAT_POLICIES,
        "activations kept for the backward pass: none: all; dots: outputs of matmuls; full: none "
        "of them",
    )


@dataclasses.dataclass(frozen=True)
class Transport:
    """The interpolant and the training objective."""

    path: str = choice(
        "Linear", paths.PATHS, "x_t = alpha_t x1 + sigma_t x0 between noise and data"
    )
    prediction: str = choice(
        "velocity", prediction.PREDICTIONS, "the quantity the network predicts"
    )
    loss_weight: str = choice(
        "none", losses.WEIGHTS, "weight of the loss over time, for score and noise only"
    )
    train_eps: float | None = setting(
        None, _time_margin, "distance of training times from singular ends"
    )
    sample_eps: float | None = setting(
        None, _time_margin, "distance of sampling times from singular ends"
    )
    times: str = choice("uniform", times.DISTRIBUTIONS, "distribution of training times")
    times_mean: float = setting(0.0, anything, "mean of the logit, for logit-normal times")
    times_std: float = setting(
        1.0, positive, "standard deviation of the logit, for logit-normal times"
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """The images and their labels."""

    source: str = choice("digits", sources.SOURCES, "kind of data set")
    path: str | None = setting(None, anything, "folder of class folders, for source folder")
    split: str = setting("all", anything, "digits: train, test or all; folder: all")
    image_size: int = setting(8, positive, "height and width of the images in pixels")
    channels: int = setting(1, positive, "channels of the images")
    classes: int = setting(10, positive, "number of classes")
    flip: bool = setting(
        False,
        anything,
        "mirror each image left to right with probability 1/2; not for digits or text",
    )
    skip_unreadable: bool = setting(
        False,
        anything,
        "skip images that cannot be read, counted and reported, instead of stopping",
    )
    workers: int = setting(
        0, not_negative, "reader processes; 0 reads in threads, which suits small sources"
    )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        return self.image_size, self.image_size, self.channels


@dataclasses.dataclass(frozen=True)
class Latents:
    """What the network sees of an image. All settings but `codec` belong to sd-vae."""

    codec: str = choice("pixels", CODECS, "pixels, or latents of Stable Diffusion's autoencoder")
    path: str | None = setting(
        None,
        anything,
        "folder with config.json and diffusion_pytorch_model.safetensors; none: use the repository",
    )
    repo: str | None = setting(
        None,
        anything,
        "Hugging Face repository; none: stabilityai/sd-vae-ft-ema (-mse has equal latents)",
    )
    revision: str | None = setting(
        None, anything, "commit of the repository; may be omitted for these two, which are pinned"
    )
    dtype: str = choice("float32", DTYPES, "type of its activations and matmuls")
    scale: float = setting(0.18215, positive, "factor applied to the encoder's output")
    batch: int = setting(8, positive, "images that each device encodes or decodes at once")

    @property
    def vae(self) -> VaeOptions:
        """The options of the autoencoder."""
        return VaeOptions(self.path, self.repo, self.revision, self.dtype, self.scale, self.batch)


@dataclasses.dataclass(frozen=True)
class Train:
    """The training run."""

    steps: int = setting(400_000, positive, "optimizer steps")
    batch: int = setting(
        256, positive, "images per step, over all devices and accumulated microbatches"
    )
    accumulation: int = setting(1, positive, "microbatches per step")
    label_dropout: float = setting(
        0.1, from_0_to_1, "probability of replacing a label by the null label"
    )
    skip_nonfinite: int = setting(
        0,
        not_negative,
        "updates with a NaN or infinite loss or gradient to skip before the run stops",
    )
    ema_decay: float = setting(
        0.9999, from_0_to_1, "decay of the exponential moving average of the parameters"
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW and its learning rate."""

    learning_rate: float = setting(1e-4, positive, "peak learning rate")
    schedule: str = choice("constant", SCHEDULES, "learning rate after the warm-up")
    warmup_steps: int = setting(0, not_negative, "steps of linear warm-up from 0")
    b1: float = setting(0.9, from_0_to_1, "decay of the first moment")
    b2: float = setting(0.999, from_0_to_1, "decay of the second moment")
    eps: float = setting(1e-8, positive, "added to the root of the second moment")
    weight_decay: float = setting(0.0, not_negative, "decoupled weight decay")
    clip_norm: float | None = setting(
        None, positive, "largest global gradient norm; none: no clipping"
    )


@dataclasses.dataclass(frozen=True)
class Sample:
    """The sampler, for --mode sample, invert, sweep and quality, and for sheets during training."""

    weights: str = choice("ema", WEIGHTS, "weights to sample with")
    solver: str = choice(
        "dopri5",
        (*ode.SOLVERS, *sde.SOLVERS),
        f"of an ODE: {', '.join(ode.SOLVERS)}; of an SDE: {', '.join(sde.SOLVERS)}",
    )
    steps: int | None = setting(
        None,
        positive,
        f"fixed steps; none: {', '.join(ode.ADAPTIVE)} choose theirs by atol and rtol",
    )
    times: tuple[float, ...] = setting(
        (),
        anything,
        "instead of steps: fractions of the way from noise to data, rising from 0 to 1",
    )
    time_shift: float = setting(
        1.0,
        positive,
        "s of t' = s t / (1 + (s - 1) t) for fixed steps; above 1: more of them near data",
    )
    atol: float = setting(1e-6, positive, "absolute tolerance of adaptive steps")
    rtol: float = setting(1e-3, positive, "relative tolerance of adaptive steps")
    error_norm: str = choice(
        "sample",
        ode.ERROR_NORMS,
        "sample: each sample has its own steps; batch: one error for all, as in torchdiffeq",
    )
    diffusion_form: str = choice(
        "SBDM", diffusion.FORMS, "diffusion coefficient of an SDE over time"
    )
    diffusion_norm: float = setting(1.0, positive, "scale of the diffusion coefficient")
    last_step: str = choice("mean", sde.LAST_STEPS, "noiseless step after an SDE's steps")
    last_step_size: float = setting(0.04, _last_step_size, "size of that step")
    cfg_scale: float = setting(1.0, _cfg_scale, "scale of classifier-free guidance; 1: none")
    cfg_channels: int | None = setting(
        3, positive, "guide the first channels only, as published numbers do; none: all"
    )
    cfg_interval: tuple[float, ...] = setting(
        (0.0, 1.0), anything, "first and last time at which to guide"
    )
    guide: str | None = setting(
        None, anything, "workdir of a weaker run to guide away from, instead of the null label"
    )
    count: int = setting(64, positive, "number of samples")
    batch: int = setting(64, positive, "samples drawn at once, over all devices")
    labels: tuple[int, ...] = setting(
        (), anything, "labels, repeated in turn up to count; empty: balanced over the classes"
    )
    seed: int = setting(0, seed_range, "seed of the samples")
    frames: int | None = setting(
        None,
        _frames,
        "also write each sample at this many times of its trajectory, as one strip; none: do not",
    )
    columns: int = setting(10, positive, "columns of the sheet")
    scale: int = setting(1, positive, "enlargement of the sheet by whole pixels")

    @property
    def grid(self) -> int | tuple[float, ...] | None:
        """The number of fixed steps, or their times, or None for adaptive steps."""
        return self.times or self.steps

    @property
    def ode(self) -> OdeOptions:
        """The options of an ODE solver."""
        return OdeOptions(
            solver=self.solver,
            steps=self.grid,
            shift=self.time_shift,
            atol=self.atol,
            rtol=self.rtol,
            error_norm=self.error_norm,
        )

    @property
    def sde(self) -> SdeOptions:
        """The options of an SDE solver."""
        assert self.grid is not None, "validate refuses an SDE without steps"
        return SdeOptions(
            solver=self.solver,
            steps=self.grid,
            shift=self.time_shift,
            form=self.diffusion_form,
            norm=self.diffusion_norm,
            last_step=self.last_step,
            last_step_size=self.last_step_size,
        )


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """--mode likelihood: log p of the data under the ODE flow, without guidance."""

    weights: str = choice("ema", WEIGHTS, "weights to evaluate")
    split: str | None = setting(None, anything, "split of the data source; none: data.split")
    count: int | None = setting(None, positive, "the first images of the split; none: all")
    batch: int = setting(64, positive, "images evaluated at once, over all devices")
    labels: str = choice(
        "data", ("data", "null"), "data: each image's own label; null: the null label for all"
    )
    solver: str = choice("dopri5", ode.SOLVERS, "ODE solver")
    steps: int | None = setting(
        None,
        positive,
        f"fixed steps; none: {', '.join(ode.ADAPTIVE)} choose theirs by atol and rtol",
    )
    atol: float = setting(1e-5, positive, "absolute tolerance of adaptive steps")
    rtol: float = setting(1e-5, positive, "relative tolerance of adaptive steps")
    trace: str = choice(
        "hutchinson",
        ("hutchinson", "exact"),
        "divergence of the flow: estimated, or exact with one derivative per dimension",
    )
    probe: str = choice("rademacher", density.PROBES, "distribution of Hutchinson's probes")
    probes: int = setting(1, positive, "probes to average over, fixed along a trajectory")
    dequantisation: str | None = choice(
        None, dequantise.KINDS, "of pixels; none: uniform. Latents are continuous and need none"
    )
    seed: int = setting(0, seed_range, "seed of probes and dequantisation")

    @property
    def ode(self) -> OdeOptions:
        """The options of the ODE solver."""
        return OdeOptions(solver=self.solver, steps=self.steps, atol=self.atol, rtol=self.rtol)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """--mode sweep: the samplers to compare; everything else of them is as in sample."""

    solvers: tuple[str, ...] = choice(
        ("euler", "heun", "dopri5", "euler-maruyama", "sra1", "shark"),
        (*ode.SOLVERS, *sde.SOLVERS),
        "solvers",
    )
    steps: tuple[int, ...] = setting((5, 10, 25, 50, 100), positive, "numbers of fixed steps")
    rtols: tuple[float, ...] = setting(
        (1e-1, 1e-2, 1e-3),
        positive,
        "relative tolerances of adaptive solvers; atol is a tenth of each",
    )
    forms: tuple[str, ...] = choice(("SBDM",), diffusion.FORMS, "diffusion forms of SDE solvers")
    cfg_scales: tuple[float, ...] = setting((1.0,), _cfg_scale, "guidance scales")
    count: int = setting(1000, _frechet_count, "samples drawn by each sampler")
    reference_count: int = setting(10_000, positive, "real images to compare with, at most")
    components: int = setting(64, positive, "principal components of the Frechet distance")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save, and what to keep."""

    every: int = setting(50_000, positive, "steps between checkpoints")
    keep_last: int = setting(2, positive, "newest checkpoints to keep")
    keep_every: int | None = setting(
        None, positive, "also keep, for good, checkpoints at multiples of this step"
    )


@dataclasses.dataclass(frozen=True)
class Log:
    """Logs of a training run."""

    every: int = setting(100, positive, "steps between log lines")
    sheet_every: int = setting(10_000, not_negative, "steps between sheets of EMA samples; 0: none")
    sheet_count: int = setting(64, positive, "samples on a sheet")
    tensorboard: bool = setting(True, anything, "write TensorBoard event files")
    wandb_project: str | None = setting(
        None, anything, "log to Weights & Biases under this project"
    )


@dataclasses.dataclass(frozen=True)
class Precision:
    """Number formats."""

    compute: str = choice(
        "float32",
        DTYPES,
        "activations and matmuls; parameters, norms, softmax and loss stay float32",
    )
    matmul: str | None = choice(
        None,
        MATMUL_PRECISIONS,
        "precision of float32 matmuls; none: default in training, highest elsewhere",
    )
    grad_reduce: str = choice(
        "float32", DTYPES, "type in which devices sum the gradients of the layers"
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis of the mesh."""

    data: int = setting(-1, _axis, "copies of the parameters that share the batch")
    fsdp: int = setting(1, _axis, "devices that share the batch and each hold a part of the state")
    tensor: int = setting(1, _axis, "devices that share the heads and hidden features of a layer")


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings."""

    seed: int = setting(
        0,
        seed_range,
        "seed of the run: initial weights, data order, noise, times and label dropout",
    )
    model: Model = Model()
    transport: Transport = Transport()
    data: Data = Data()
    latents: Latents = Latents()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    sample: Sample = Sample()
    likelihood: Likelihood = Likelihood()
    sweep: Sweep = Sweep()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    precision: Precision = Precision()
    mesh: Mesh = Mesh()


def get(config: Config, key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
