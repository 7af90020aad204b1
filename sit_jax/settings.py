"""Every setting there is, with its default, and what it may be.

`sit_jax.config` reads them from a config file and the command line, each as a flag: --config.train.steps=1000.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from sit_jax import sharding
from sit_jax.data import dequantise, sources
from sit_jax.errors import check, unknown_name
from sit_jax.latents import CODECS
from sit_jax.models import sit, sizes
from sit_jax.optimizer import SCHEDULES
from sit_jax.sampling import density, ode, sde
from sit_jax.sampling.guidance import check_scale
from sit_jax.transport import diffusion, interval, losses, paths, prediction, times


@dataclasses.dataclass(frozen=True)
class Model:
    name: str = (
        "SiT-S/2"  # one of the twelve published sizes; the next four replace its fields where given
    )
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    patch: int | None = None
    qk_norm: bool = (
        False  # RMSNorm of queries and keys: steadier in bfloat16; the published weights have none
    )
    learn_sigma: bool = (
        False  # twice the output channels, half of them unused: the published weights are so
    )
    attention: str = (
        "auto"  # auto: what is best on the devices; einsum: plain products, which alone have a jvp
    )
    remat: str = (
        "dots"  # what the backward pass keeps: none: all; dots: the matmuls' outputs; full: nothing
    )


@dataclasses.dataclass(frozen=True)
class Transport:
    path: str = "Linear"  # Linear | GVP | VP
    prediction: str = "velocity"  # velocity | score | noise
    loss_weight: str = "none"  # none | velocity | likelihood (score and noise only)
    train_eps: float | None = (
        None  # distance from singular times, inside (0, 0.5); None: the path's default
    )
    sample_eps: float | None = None
    times: str = "uniform"  # uniform | logit-normal
    times_mean: float = 0.0  # of the logit
    times_std: float = 1.0


@dataclasses.dataclass(frozen=True)
class Data:
    source: str = "digits"  # digits | folder
    path: str | None = None  # folder: the folder of class folders
    split: str = "all"  # digits: train | test | all; folder: all
    image_size: int = 8
    channels: int = 1
    classes: int = 10
    flip: bool = False  # random horizontal flip
    skip_unreadable: bool = (
        False  # pass over images that cannot be read (counted and reported) instead of stopping
    )
    workers: int = (
        0  # reader processes; 0 reads in threads, which suits in-memory and small sources
    )


@dataclasses.dataclass(frozen=True)
class Latents:
    codec: str = "pixels"  # what the network sees of an image: pixels | sd-vae
    # The rest is of sd-vae.
    path: str | None = (
        None  # folder with config.json and diffusion_pytorch_model.safetensors; None: from the repo
    )
    repo: str | None = (
        None  # on Hugging Face; None: stabilityai/sd-vae-ft-ema; sd-vae-ft-mse has the same latents
    )
    revision: str | None = (
        None  # commit of the repo; None: the one that is known here, of these two
    )
    dtype: str = "float32"  # float32 | bfloat16: its activations and matmuls
    scale: float = 0.18215  # what the encoder gives is multiplied by it
    batch: int = 8  # images that go through it at once on each device


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 400_000
    batch: int = 256  # images per step, over all devices and accumulated microbatches
    accumulation: int = 1  # microbatches per step
    label_dropout: float = 0.1  # share of labels replaced by the null label
    skip_nonfinite: int = (
        0  # updates with a NaN or infinite loss or gradient to pass over before the run stops
    )
    ema_decay: float = 0.9999


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-4
    schedule: str = "constant"  # constant | cosine, after the warm-up
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None  # global gradient norm


@dataclasses.dataclass(frozen=True)
class Sample:
    weights: str = "ema"  # ema | raw
    solver: str = "dopri5"  # ODE: euler midpoint heun ralston bosh3 tsit5 dopri5 dopri8
    #                         SDE: euler-maruyama reference-heun sra1 shark
    steps: int | None = (
        None  # fixed steps; None: bosh3, tsit5, dopri5 and dopri8 choose theirs by atol and rtol
    )
    times: tuple[
        float, ...
    ] = ()  # in place of steps: fractions of the way from noise to data, rising from 0 to 1
    time_shift: float = (
        1.0  # s of t' = s t / (1 + (s - 1) t) for fixed steps; above 1: more of them near data
    )
    atol: float = 1e-6
    rtol: float = 1e-3
    error_norm: str = "sample"  # sample: every sample has its own steps | batch: one error for all, as torchdiffeq
    diffusion_form: str = (
        "SBDM"  # constant | SBDM | sigma | linear | decreasing | increasing-decreasing, for an SDE
    )
    diffusion_norm: float = 1.0
    last_step: str = "mean"  # none | mean | tweedie | euler: noiseless, after an SDE's steps
    last_step_size: float = 0.04
    cfg_scale: float = 1.0  # classifier-free guidance; 1 is none
    cfg_channels: int | None = (
        3  # guide the first channels only, as published numbers do; None: all
    )
    cfg_interval: tuple[float, ...] = (0.0, 1.0)  # guide at these times only
    guide: str | None = (
        None  # workdir of a weaker run, which guidance leads away from in place of the null label
    )
    count: int = 64
    batch: int = 64
    labels: tuple[int, ...] = ()  # repeated in turn to `count`; empty: balanced over the classes
    seed: int = 0
    frames: int | None = (
        None  # also write each image at so many times of its way from noise, as one strip
    )
    columns: int = 10  # of the sheet
    scale: int = 1  # of the sheet: enlargement by whole pixels

    @property
    def grid(self) -> int | tuple[float, ...] | None:
        """The number of fixed steps, or their times, or None."""
        return self.times or self.steps


@dataclasses.dataclass(frozen=True)
class Likelihood:
    weights: str = "ema"  # ema | raw
    split: str | None = None  # of the data source; None: data.split
    count: int | None = None  # the first images of the split; None: all
    batch: int = 64
    labels: str = "data"  # data: each image's own | null: the null label for all
    solver: str = "dopri5"  # euler midpoint heun ralston bosh3 tsit5 dopri5 dopri8: of an ODE alone, without guidance
    steps: int | None = (
        None  # fixed steps; None: bosh3, tsit5, dopri5 and dopri8 choose theirs by atol and rtol
    )
    atol: float = 1e-5
    rtol: float = 1e-5
    trace: str = "hutchinson"  # hutchinson | exact: as many derivatives as there are dimensions, for small ones
    probe: str = "rademacher"  # rademacher | gaussian: of Hutchinson's trace
    probes: int = 1  # averaged, the same ones along a trajectory
    dequantisation: str | None = (
        None  # of pixels: uniform | gaussian; None: uniform. Latents are continuous: None
    )
    seed: int = 0  # of probes and dequantisation


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The samplers that --mode sweep compares; all else of them is as in `sample`."""

    solvers: tuple[str, ...] = ("euler", "heun", "dopri5", "euler-maruyama", "sra1", "shark")
    steps: tuple[int, ...] = (5, 10, 25, 50, 100)
    rtols: tuple[float, ...] = (
        1e-1,
        1e-2,
        1e-3,
    )  # by which adaptive solvers choose their steps; atol is a tenth
    forms: tuple[str, ...] = ("SBDM",)  # of an SDE's diffusion
    cfg_scales: tuple[float, ...] = (1.0,)
    count: int = 1000  # images of each sampler
    reference_count: int = 10_000  # real images that they are compared with, at most
    components: int = 64  # principal components of the Frechet distance


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 50_000  # steps
    keep_last: int = 2
    keep_every: int | None = None  # also keep, for ever, those at multiples of this


@dataclasses.dataclass(frozen=True)
class Log:
    every: int = 100  # steps
    sheet_every: int = 10_000  # steps between EMA sample sheets; 0: none
    sheet_count: int = 64  # images on a sheet
    tensorboard: bool = True
    wandb_project: str | None = None  # log to Weights & Biases under this project


@dataclasses.dataclass(frozen=True)
class Precision:
    compute: str = "float32"  # float32 | bfloat16: activations and matmuls; parameters, norms, softmax and loss stay float32
    matmul: str | None = None  # default | high | highest; None: default when training, else highest
    grad_reduce: str = (
        "float32"  # float32 | bfloat16: in what devices add up the gradients of the layers
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = -1  # devices along each axis; -1 takes what the others leave
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
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


def fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every setting."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.type


def get(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def validate(config: Config) -> None:
    """`UserError` for a name that is in no table or a value that cannot be."""
    model, transport, data, latents = config.model, config.transport, config.data, config.latents
    train, sample = config.train, config.sample
    for key in _POSITIVE:
        value = get(config, key)
        check(value is None or value > 0, f"{key} is {value}; expected more than 0")
    for key in _NOT_NEGATIVE:
        check(get(config, key) >= 0, f"{key} is {get(config, key)}; expected 0 or more")
    sizes.size_by_name(
        model.name, depth=model.depth, width=model.width, heads=model.heads, patch=model.patch
    )
    _one_of("model.attention", model.attention, ("auto", "einsum"))
    _one_of("model.remat", model.remat, sit.REMAT_POLICIES)
    paths.path_by_name(transport.path)
    prediction.check_prediction(transport.prediction)
    losses.check_weight(transport.loss_weight, transport.prediction)
    interval.check_eps("transport.train_eps", transport.train_eps)
    interval.check_eps("transport.sample_eps", transport.sample_eps)
    _one_of("transport.times", transport.times, times.DISTRIBUTIONS)
    _one_of("data.source", data.source, sources.SOURCES)
    _one_of("latents.codec", latents.codec, CODECS)
    _one_of("latents.dtype", latents.dtype, ("float32", "bfloat16"))
    check(
        latents.path is None or latents.repo is None,
        f"latents.path {latents.path!r} and latents.repo {latents.repo!r} are both given; set one of them to none",
    )
    _one_of("optimizer.schedule", config.optimizer.schedule, SCHEDULES)
    _one_of("sample.weights", sample.weights, ("ema", "raw"))
    _check_sampler(sample)
    _check_likelihood(config)
    _check_sweep(config.sweep)
    for key in ("compute", "grad_reduce"):
        _one_of(f"precision.{key}", getattr(config.precision, key), ("float32", "bfloat16"))
    check(
        config.precision.grad_reduce in ("float32", config.precision.compute),
        "precision.grad_reduce is 'bfloat16', but gradients are computed in float32; set it to float32, or "
        "precision.compute to bfloat16 as well",
    )
    if config.precision.matmul is not None:
        _one_of("precision.matmul", config.precision.matmul, ("default", "high", "highest"))
    for key in ("seed", "sample.seed", "likelihood.seed"):
        check(get(config, key) < 2**32, f"{key} is {get(config, key)}; expected less than 2**32")
    for key in ("train.label_dropout", "train.ema_decay", "optimizer.b1", "optimizer.b2"):
        check(
            0 <= get(config, key) <= 1,
            f"{key} is {get(config, key)}; expected a number from 0 to 1",
        )
    check(
        train.batch % train.accumulation == 0,
        f"train.batch {train.batch} is not divisible by train.accumulation {train.accumulation}; change either",
    )
    for label in sample.labels:
        check(
            0 <= label < data.classes,
            f"sample.labels holds {label}; expected 0 to {data.classes - 1} (data.classes)",
        )
    sharding.check_axes(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def _check_sampler(sample: Sample) -> None:
    _one_of("sample.solver", sample.solver, [*ode.SOLVERS, *sde.SOLVERS])
    check(
        not (sample.times and sample.steps),
        "sample.times and sample.steps are both given; set sample.steps=none",
    )
    if sample.times:
        ode.check_times("sample.times", sample.times)
    if sample.solver in sde.SOLVERS:
        check(
            sample.grid is not None,
            f"sample.solver {sample.solver!r} needs sample.steps, such as 250",
        )
    else:
        ode.check_solver(sample.solver, sample.grid)
    check(
        sample.frames is None or sample.frames > 1,
        f"sample.frames is {sample.frames}; expected 2 or more, or none",
    )
    _one_of("sample.error_norm", sample.error_norm, ode.ERROR_NORMS)
    _one_of("sample.diffusion_form", sample.diffusion_form, diffusion.FORMS)
    _one_of("sample.last_step", sample.last_step, sde.LAST_STEPS)
    size = sample.last_step_size
    check(
        0 < size < 1,
        f"sample.last_step_size is {size}; expected a number inside (0, 1), or sample.last_step=none",
    )
    check_scale(sample.cfg_scale)
    check(
        sample.guide is None or sample.cfg_scale > 1,
        f"sample.guide is {sample.guide!r}, but sample.cfg_scale is {sample.cfg_scale:g}, which guides by nothing; "
        "set it above 1",
    )
    low_high = sample.cfg_interval
    check(
        len(low_high) == 2 and 0 <= low_high[0] < low_high[1] <= 1,
        f"sample.cfg_interval is {low_high}; expected two times with 0 <= first < last <= 1",
    )


def _check_likelihood(config: Config) -> None:
    likelihood = config.likelihood
    _one_of("likelihood.weights", likelihood.weights, ("ema", "raw"))
    _one_of("likelihood.labels", likelihood.labels, ("data", "null"))
    check(
        likelihood.solver not in sde.SOLVERS,
        f"likelihood.solver {likelihood.solver!r} solves an SDE, which gives no log p; expected one of an ODE: "
        f"{', '.join(ode.SOLVERS)}",
    )
    _one_of("likelihood.solver", likelihood.solver, ode.SOLVERS)
    ode.check_solver(likelihood.solver, likelihood.steps, "likelihood")
    _one_of("likelihood.trace", likelihood.trace, ("hutchinson", "exact"))
    _one_of("likelihood.probe", likelihood.probe, density.PROBES)
    if likelihood.dequantisation is not None:
        _one_of("likelihood.dequantisation", likelihood.dequantisation, dequantise.KINDS)
        check(
            config.latents.codec == "pixels",
            f"likelihood.dequantisation is {likelihood.dequantisation!r}, but latents.codec {config.latents.codec!r} "
            "gives latents, which are continuous; set it to none",
        )


def _check_sweep(sweep: Sweep) -> None:
    for key in ("solvers", "steps", "cfg_scales"):
        check(getattr(sweep, key), f"sweep.{key} is empty; give one or more")
    for solver in sweep.solvers:
        _one_of("sweep.solvers", solver, [*ode.SOLVERS, *sde.SOLVERS])
    for form in sweep.forms:
        _one_of("sweep.forms", form, diffusion.FORMS)
    check(
        sweep.forms or not set(sweep.solvers) & set(sde.SOLVERS),
        "sweep.forms is empty, but an SDE needs one",
    )
    for key in ("steps", "rtols"):
        for value in getattr(sweep, key):
            check(value > 0, f"sweep.{key} holds {value}; expected more than 0")
    for scale in sweep.cfg_scales:
        check_scale(scale)
    check(sweep.count >= 2, f"sweep.count is {sweep.count}; a Frechet distance needs 2 or more")


_POSITIVE = [
    "data.image_size",
    "data.channels",
    "data.classes",
    "latents.scale",
    "latents.batch",
    "train.steps",
    "train.batch",
    "train.accumulation",
    "optimizer.learning_rate",
    "optimizer.eps",
    "optimizer.clip_norm",
    "transport.times_std",
    "sample.steps",
    "sample.time_shift",
    "sample.atol",
    "sample.rtol",
    "sample.diffusion_norm",
    "sample.cfg_channels",
    "sample.count",
    "sample.batch",
    "sample.columns",
    "sample.scale",
    "likelihood.count",
    "likelihood.batch",
    "likelihood.steps",
    "likelihood.atol",
    "likelihood.rtol",
    "likelihood.probes",
    "sweep.count",
    "sweep.reference_count",
    "sweep.components",
    "checkpoint.every",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "log.every",
    "log.sheet_count",
]
_NOT_NEGATIVE = [
    "seed",
    "data.workers",
    "train.skip_nonfinite",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "sample.seed",
    "likelihood.seed",
    "log.sheet_every",
]


def _one_of(key: str, value: str, known) -> None:
    if value not in known:
        raise unknown_name(key, value, known)
