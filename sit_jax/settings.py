"""Every setting, declared once with its default, its law and its help.

`sit_jax.config` reads the values from a config file and the command line, where each is a flag:
--config.train.steps=1000. `python -m sit_jax.main --help-config SECTION` prints the help texts.
"""

import dataclasses
import math
from fractions import Fraction
from typing import Any

from sit_jax.data import latent_cache, sources
from sit_jax.data.source import SourceOptions
from sit_jax.data.transforms import PIXEL_LIMIT, Decoding
from sit_jax.errors import check
from sit_jax.latents import CODECS, dequantise
from sit_jax.latents.sd_vae import VaeOptions
from sit_jax.laws import Between, anything, choice, setting, user_path
from sit_jax.metrics.features import EXTRACTORS
from sit_jax.models.sit import REMAT_POLICIES
from sit_jax.models.sizes import SIZES
from sit_jax.optimizer import SCHEDULES
from sit_jax.sampling import density, ode, sde
from sit_jax.sampling.ode import OdeOptions
from sit_jax.sampling.sde import SdeOptions
from sit_jax.transport import diffusion, losses, paths, prediction, times

WEIGHTS = {"ema": "ema", "raw": "params"}  # a name in a config -> the item of a checkpoint
SAMPLE_FORMATS = ("png", "npz", "both")
LABEL_DRAWS = ("balanced", "random")
DTYPES = ("float32", "bfloat16")
MATMUL_PRECISIONS = ("default", "high", "highest")

# The ends of each range lie far outside the useful values, but within the devices' int32 and
# float32: a float32 much below 1e-30 becomes 0, and one much nearer to 1 than 0.999999 becomes 1.
_count = Between(1, 2**31 - 1)
_count_or_0 = Between(0, 2**31 - 1)
_batch = Between(1, 2**20)  # examples at a time
_fixed_steps = Between(1, 1_000_000)
_tolerance = Between(1e-30, 1e3)
_decay = Between(0.0, 0.999999)
_seed = Between(0, 2**32 - 1)
_time = Between(0.0, 1.0)
_time_margin = Between(1e-6, 0.499)  # with a smaller one, 1 - margin is 1
_cfg_scale = Between(1.0, 1e3)
_axis = Between(-1, 2**16)  # validation refuses 0
_pixels = Between(1, PIXEL_LIMIT)


@dataclasses.dataclass(frozen=True)
class Model:
    """The network."""

    name: str = choice(
        "SiT-S/2", SIZES, "published size; depth, width, heads and patch override parts of it"
    )
    depth: int | None = setting(
        None, Between(1, 1_000), "transformer blocks; none: those of model.name, here and below"
    )
    width: int | None = setting(None, Between(4, 2**16), "channels of the residual stream")
    heads: int | None = setting(None, Between(1, 2**12), "attention heads")
    patch: int | None = setting(
        None, Between(1, 2**10), "side of a patch (one token), in pixels or latent cells"
    )
    qk_norm: bool = setting(
        False,
        anything,
        "RMSNorm of queries and keys: steadier in bfloat16; not in the published weights",
    )
    learn_sigma: bool = setting(
        False,
        anything,
        "double the output channels and ignore the second half, as the published weights do",
    )
    attention: str = choice(
        "auto",
        ("auto", "einsum"),
        "auto: the fastest kernel for the devices; einsum: plain matmuls, which have forward-mode "
        "derivatives everywhere (--mode likelihood always uses it)",
    )
    remat: str = choice(
        "dots",
        REMAT_POLICIES,
        "activations to recompute in the backward pass, to save memory. none: keep them all; "
        "dots: keep the outputs of linear layers and attention; operands: also keep their inputs, "
        "faster if memory allows; full: keep only each block's input",
    )
    unroll: int | None = setting(
        None,
        Between(1, 1_000),
        "layers in each iteration of the training step's loop over layers, a divisor of the depth: "
        "more compile longer and may run faster. none: all on a GPU, otherwise 1",
    )


@dataclasses.dataclass(frozen=True)
class Transport:
    """The interpolant and the training objective."""

    path: str = choice(
        "Linear",
        paths.PATHS,
        "the interpolant x_t = alpha_t x1 + sigma_t x0 between noise x0 and data x1",
    )
    prediction: str = choice(
        "velocity", prediction.PREDICTIONS, "the quantity the network predicts"
    )
    loss_weight: str = choice(
        "none",
        losses.WEIGHTS,
        "weight of the loss by time, for predictions score and noise. velocity: gives the loss of "
        "the velocity; likelihood: a bound on log p",
    )
    train_eps: float | None = setting(
        None,
        _time_margin,
        "distance kept from a singular end of time in training; none: the path's default",
    )
    sample_eps: float | None = setting(
        None, _time_margin, "the same distance in sampling; none: the path's default"
    )
    times: str = choice(
        "uniform",
        times.DISTRIBUTIONS,
        "distribution of training times; logit-normal: sigmoid of a normal",
    )
    times_mean: float = setting(
        0.0, Between(-100.0, 100.0), "mean of that normal; above 0: more times near data"
    )
    times_std: float = setting(1.0, Between(1e-6, 100.0), "standard deviation of that normal")


@dataclasses.dataclass(frozen=True)
class Data:
    """The images and their labels."""

    source: str = choice(
        "digits",
        sources.SOURCES,
        "digits: of scikit-learn; folder: image files; tfds: prepared by tensorflow-datasets as "
        "ArrayRecord files; latents: stored by --mode encode or convert.latents",
    )
    path: str | None = setting(
        None,
        user_path,
        "folder: a folder with a sub-folder of images per class; tfds: the folder of prepared data "
        "sets (data_dir); latents: a folder of stored latents",
    )
    name: str | None = setting(
        None,
        anything,
        "tfds: the data set, such as imagenet2012, imagenet2012:5.1.0 (otherwise the newest "
        "version) or imagenette/320px-v2; none: data.path is the folder of a single one",
    )
    split: str = setting(
        "all",
        anything,
        "digits: train, test or all; folder and latents: only all; tfds: such as train, "
        "validation[:10%] or train+validation",
    )
    image_size: int = setting(
        8,
        Between(1, 2**13),
        "side of the images in pixels, to which folder and tfds scale and crop them; latents: side "
        "of a latent in cells",
    )
    channels: int = setting(
        1,
        Between(1, 2**10),
        "channels: 1 for digits, 3 for folder and tfds, 4 for latents of the SD-VAE",
    )
    classes: int = setting(10, Between(1, 1_000_000), "number of classes")
    flip: bool = setting(
        False, anything, "mirror images left to right with probability 1/2; not for digits or text"
    )
    skip_unreadable: bool = setting(
        False, anything, "skip and count images that cannot be read, instead of stopping"
    )
    max_pixels: int = setting(
        2**26,
        _pixels,
        "largest image file in pixels, which bounds the memory that each reader needs; a larger "
        "one counts as unreadable",
    )
    exif_orientation: bool = setting(
        False,
        anything,
        "turn photographs as their EXIF data says; false: read them as stored, like the reference",
    )
    subset_seed: int = setting(
        0,
        _seed,
        "seed of the part of the data that sweep, quality, invert, likelihood and excess draw, "
        "balanced over the classes; tfds: uniform",
    )
    workers: int | None = setting(
        None,
        Between(0, 1_024),  # the processors of the largest hosts
        "processes that read images; 0: threads of the main process; none: chosen by the source "
        "and the machine",
    )
    read_ahead: int | None = setting(
        None,
        Between(1, 1_024),
        "batches that each of these reads ahead; none: 8, or fewer where they would take more than "
        "a quarter of the memory",
    )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        return self.image_size, self.image_size, self.channels

    @property
    def options(self) -> SourceOptions:
        """What a source needs to know."""
        decoding = Decoding(self.max_pixels, self.exif_orientation)
        return SourceOptions(
            self.path, self.name, self.split, self.image_size, self.channels, decoding
        )


@dataclasses.dataclass(frozen=True)
class Latents:
    """The network's input: pixels or latents. All settings but `codec` apply to sd-vae only."""

    codec: str = choice(
        "pixels",
        CODECS,
        "pixels; sd-vae: latents of Stable Diffusion's autoencoder; stored: those of any "
        "autoencoder, without a decoder: samples are .npz files",
    )
    path: str | None = setting(
        None,
        user_path,
        "folder with config.json and diffusion_pytorch_model.safetensors; none: latents.repo",
    )
    repo: str | None = setting(
        None,
        anything,
        "Hugging Face repository; none: stabilityai/sd-vae-ft-ema. stabilityai/sd-vae-ft-mse "
        "has the same latents and decodes them more smoothly",
    )
    revision: str | None = setting(
        None,
        anything,
        "commit of latents.repo; none: the pinned one, for the two repositories above only",
    )
    dtype: str = choice("float32", DTYPES, "dtype of the autoencoder's activations and matmuls")
    matmul: str = choice(
        "highest",
        MATMUL_PRECISIONS,
        "precision of the autoencoder's float32 matmuls; default: TF32 on NVIDIA GPUs, 8 times as "
        "fast there, and as exact as latents stored in float16",
    )
    scale: float = setting(0.18215, Between(1e-6, 1e6), "factor applied to the encoder's output")
    batch: int = setting(8, _batch, "images that a device encodes or decodes at a time, at most")

    @property
    def vae(self) -> VaeOptions:
        """The options of the autoencoder."""
        return VaeOptions(
            self.path, self.repo, self.revision, self.dtype, self.scale, self.batch, self.matmul
        )


@dataclasses.dataclass(frozen=True)
class Encode:
    """--mode encode: how latents are stored."""

    dtype: str = choice("float16", latent_cache.DTYPES, "dtype of the stored moments")
    shard: int = setting(
        4096, Between(1, 2**24), "images per file; a job that was stopped redoes at most one file"
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """The training run."""

    steps: int | None = setting(
        400_000, _count, "number of optimizer steps; none: train.epochs says how many"
    )
    epochs: float | None = setting(
        None,
        Between(1e-6, 1e6),
        "passes over the data, instead of train.steps, which is then none; the last step completes "
        "them",
    )
    batch: int = setting(256, _batch, "images per step, over all devices and microbatches")
    accumulation: int = setting(1, _batch, "microbatches per step, run in turn to save memory")
    label_dropout: float = setting(
        0.1, Between(0.0, 0.99), "share of labels replaced by the null label, which guidance needs"
    )
    skip_nonfinite: int = setting(
        0,
        _count_or_0,
        "updates with a NaN or infinite loss or gradient that may be skipped before the run stops",
    )
    ema_decay: float = setting(
        0.9999, Between(0.0, 1.0), "decay of the exponential moving average of the parameters"
    )

    def total_steps(self, images: int) -> int:
        """Return the number of steps over a data set of so many images.

        Those of `epochs` are the fewest that see epochs * images images. Raises `UserError` if
        they are too many.
        """
        if self.epochs is None:
            assert self.steps is not None, "validate refuses a run without a length"
            return self.steps
        # Exact: 1.1 * 1000 / 100 is above 11 in floating point.
        total = math.ceil(Fraction(repr(self.epochs)) * images / self.batch)
        check(
            total <= _count.high,
            f"train.epochs {self.epochs:g} are {total:,} steps, more than {_count.high:,}; set "
            "fewer",
        )
        return max(total, 1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW and its learning rate."""

    learning_rate: float = setting(1e-4, Between(1e-30, 1e3), "peak learning rate")
    schedule: str = choice(
        "constant", SCHEDULES, "learning rate after the warm-up; cosine: falls to 0 at the end"
    )
    warmup_steps: int = setting(0, _count_or_0, "steps of linear warm-up from 0")
    b1: float = setting(0.9, _decay, "decay of the first moment")
    b2: float = setting(0.999, _decay, "decay of the second moment")
    eps: float = setting(1e-8, Between(1e-30, 1e3), "added to the root of the second moment")
    weight_decay: float = setting(0.0, Between(0.0, 1e3), "decoupled weight decay")
    clip_norm: float | None = setting(
        None, Between(1e-12, 1e12), "largest global gradient norm; none: no clipping"
    )


@dataclasses.dataclass(frozen=True)
class Sample:
    """The sampler, for --mode sample, invert, sweep, quality, excess, and sheets in training."""

    weights: str = choice(
        "ema", WEIGHTS, "ema: the moving average of the parameters; raw: the parameters"
    )
    checkpoint: int | None = setting(
        None, _count_or_0, "step of the checkpoint to use; none: the newest complete one"
    )
    solver: str = choice(
        "dopri5",
        (*ode.SOLVERS, *sde.SOLVERS),
        f"ODE solvers: {', '.join(ode.SOLVERS)}; SDE solvers: {', '.join(sde.SOLVERS)}",
    )
    steps: int | None = setting(
        None,
        _fixed_steps,
        f"fixed steps; none: {', '.join(ode.ADAPTIVE)} choose theirs by atol and rtol",
    )
    times: tuple[float, ...] = setting(
        (),
        _time,
        "times of fixed steps, instead of sample.steps: fractions rising from 0 (noise) to 1",
    )
    time_shift: float = setting(
        1.0,
        Between(1e-3, 1e3),
        "s of t' = s t / (1 + (s - 1) t), which moves fixed steps; above 1: more near data",
    )
    atol: float = setting(1e-6, _tolerance, "absolute tolerance of adaptive steps")
    rtol: float = setting(1e-3, _tolerance, "relative tolerance of adaptive steps")
    error_norm: str = choice(
        "sample",
        ode.ERROR_NORMS,
        "error that sets adaptive steps. sample: each sample's own; batch: the batch's, as in "
        "torchdiffeq",
    )
    diffusion_form: str = choice("SBDM", diffusion.FORMS, "SDE: diffusion coefficient over time")
    diffusion_norm: float = setting(1.0, Between(1e-6, 1e3), "SDE: scale of that coefficient")
    last_step: str = choice(
        "mean",
        sde.LAST_STEPS,
        "SDE: last step to t=1, without noise. mean: along the SDE's drift; euler: along the "
        "ODE's; tweedie: to the expected data",
    )
    last_step_size: float = setting(0.04, Between(1e-6, 0.999), "SDE: length of that step in t")
    cfg_scale: float = setting(1.0, _cfg_scale, "scale of classifier-free guidance; 1: no guidance")
    cfg_channels: int | None = setting(
        3,
        Between(1, 2**10),
        "number of channels to guide, from the first; none: all (published results: 3 of 4)",
    )
    cfg_interval: tuple[float, ...] = setting(
        (0.0, 1.0), _time, "first and last time to guide at; 0 is noise, 1 is data"
    )
    guide: str | None = setting(
        None,
        user_path,
        "workdir of a weaker run to guide away from; none: guide away from the null label",
    )
    count: int = setting(64, Between(1, 10_000_000), "number of samples")
    batch: int = setting(64, _batch, "samples drawn at a time, over all devices")
    microbatch: int | None = setting(
        None, _batch, "samples drawn at a time by each device; none: sample.batch over all devices"
    )
    format: str = choice(
        "png",
        SAMPLE_FORMATS,
        "files of --mode sample. png: one for each image; npz: only samples.npz, as ADM's "
        "evaluation reads it; both",
    )
    labels: tuple[int, ...] = setting(
        (), Between(0, 999_999), "class labels to draw samples of; (): all classes"
    )
    label_draw: str = choice(
        "balanced",
        LABEL_DRAWS,
        "which label a sample gets. balanced: each in turn; random: uniformly, by seed and index",
    )
    labels_file: str | None = setting(
        None,
        user_path,
        "file of one label for each sample: text, .npy, or .npz with arr_1 or labels; none: "
        "sample.labels",
    )
    seed: int = setting(0, _seed, "seed of the samples")
    frames: int | None = setting(
        None,
        Between(2, 10_000),
        "also write this many images along each sample's trajectory, as one strip; none: do not",
    )
    columns: int = setting(10, Between(1, 1_000), "columns of sheet.png, the grid of images")
    scale: int = setting(1, Between(1, 64), "factor by which sheet.png is enlarged")

    @property
    def grid(self) -> int | tuple[float, ...] | None:
        """The number of fixed steps, or their times; None for adaptive steps."""
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

    weights: str = choice(
        "ema", WEIGHTS, "ema: the moving average of the parameters; raw: the parameters"
    )
    split: str | None = setting(None, anything, "split of the data source; none: data.split")
    count: int | None = setting(None, _count, "images of the split to draw; none: all")
    batch: int = setting(64, _batch, "images evaluated at a time, over all devices")
    labels: str = choice(
        "data", ("data", "null"), "data: each image's own label; null: the null label for all"
    )
    solver: str = choice("dopri5", ode.SOLVERS, "ODE solver")
    steps: int | None = setting(
        None,
        _fixed_steps,
        f"fixed steps; none: {', '.join(ode.ADAPTIVE)} choose theirs by atol and rtol",
    )
    atol: float = setting(1e-5, _tolerance, "absolute tolerance of adaptive steps")
    rtol: float = setting(1e-5, _tolerance, "relative tolerance of adaptive steps")
    trace: str = choice(
        "hutchinson",
        ("hutchinson", "exact"),
        "divergence: hutchinson estimates it with random probes; exact is slow, one derivative "
        "per dimension",
    )
    probe: str = choice(
        "rademacher", density.PROBES, "distribution of the random probes of hutchinson"
    )
    probes: int = setting(
        1, Between(1, 10_000), "probes per image, over which the estimate is averaged"
    )
    dequantisation: str | None = choice(
        None,
        dequantise.KINDS,
        "noise on 8-bit pixels to make them continuous; none: uniform, and no noise on latents",
    )
    seed: int = setting(0, _seed, "seed of the probes and of the dequantisation noise")

    @property
    def ode(self) -> OdeOptions:
        """The options of the ODE solver."""
        return OdeOptions(solver=self.solver, steps=self.steps, atol=self.atol, rtol=self.rtol)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """--mode sweep: the samplers to compare; their other settings are those of `sample`."""

    solvers: tuple[str, ...] = choice(
        ("euler", "heun", "dopri5", "euler-maruyama", "sra1", "shark"),
        (*ode.SOLVERS, *sde.SOLVERS),
        "ODE and SDE solvers",
    )
    steps: tuple[int, ...] = setting((5, 10, 25, 50, 100), _fixed_steps, "numbers of fixed steps")
    rtols: tuple[float, ...] = setting(
        (1e-1, 1e-2, 1e-3),
        _tolerance,
        "relative tolerances of adaptive solvers, instead of steps; atol is a tenth of each",
    )
    forms: tuple[str, ...] = choice(
        ("SBDM",), diffusion.FORMS, "values of sample.diffusion_form, for SDE solvers"
    )
    cfg_scales: tuple[float, ...] = setting((1.0,), _cfg_scale, "values of sample.cfg_scale")
    cfg_intervals: tuple[float, ...] = setting(
        (),
        _time,
        "values of sample.cfg_interval: first, last, first, last, ...; (): only that of sample",
    )
    checkpoints: tuple[int, ...] = setting(
        (), _count_or_0, "steps of the checkpoints to compare; (): that of sample.checkpoint"
    )
    weights: tuple[str, ...] = choice(
        (), WEIGHTS, "weights to compare, ema and raw; (): those of sample.weights"
    )
    features: str = choice(
        "pixels",
        ("pixels", *EXTRACTORS),
        "pixels: their principal components, and a classifier of the labels, for small images; "
        "or a network's features, as in evaluate.features",
    )
    count: int = setting(1000, Between(2, 10_000_000), "number of samples that each sampler draws")
    reference_count: int = setting(
        10_000, _count, "real images to draw and compare with, at most; in --mode quality too"
    )
    components: int = setting(
        64, Between(1, 100_000), "principal components of the pixels that the Frechet distance uses"
    )


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """--mode evaluate and stats: the features by which images are compared."""

    features: tuple[str, ...] = choice(
        ("inception",),
        (*EXTRACTORS, "pixels"),
        "inception: FID as ADM computes it; inception-pytorch-fid: with that project's resizing; "
        "dinov2; pixels: principal components, which need no weights",
    )
    inception: str | None = setting(
        None,
        user_path,
        "Inception weights, a file of convert.inception; none: the one in the user's cache folder",
    )
    dinov2: str | None = setting(
        None, user_path, "DINOv2 weights, a file of convert.dinov2; none: as for inception"
    )
    batch: int | None = setting(
        None,
        _batch,
        "images of which a device computes the features at a time; none: 64, or 8 on a CPU",
    )
    reference: str | None = setting(
        None,
        user_path,
        "statistics or images to compare with, as --reference; none: images of the data source",
    )
    count: int | None = setting(
        None,
        _count,
        "real images to draw from the data source; none: all of them, or in training evaluate.kept",
    )
    kept: int = setting(
        10_000,
        _count,
        "real images, a random draw, that precision, recall and KID compare with",
    )


@dataclasses.dataclass(frozen=True)
class Excess:
    """--mode excess: the loss above that of the best possible prediction for the training set."""

    split: str | None = setting(
        None, anything, "split that the run was trained on; none: data.split"
    )
    test_split: str | None = setting(
        None, anything, "another split, of images that the run has not seen; none: do without"
    )
    labels: str = choice(
        "data",
        ("data", "null", "dropout"),
        "data: each image's own label; null: the null label for all; dropout: as in training, the "
        "null label with probability train.label_dropout",
    )
    strata: int = setting(
        20, Between(1, 1_000), "parts of the training times, equally probable, with a row each"
    )
    draws: int = setting(
        1000, Between(2, 2**24), "draws of an image, noise and a time in each of these parts"
    )
    batch: int = setting(256, _batch, "draws evaluated at a time, over all devices")
    samples: int = setting(
        1_000,
        Between(0, 1_000_000),
        "samples to compare with the nearest training images; 0: none",
    )
    seed: int = setting(0, _seed, "seed of these draws")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """How often to save checkpoints, and which to keep."""

    every: int = setting(50_000, _count, "steps between checkpoints")
    keep_last: int = setting(2, _count, "newest checkpoints to keep")
    keep_every: int | None = setting(
        None, _count, "also keep checkpoints at multiples of this step, for good"
    )


@dataclasses.dataclass(frozen=True)
class Log:
    """Logs of a training run."""

    every: int = setting(100, _count, "steps between log lines")
    sheet_every: int = setting(
        10_000, _count_or_0, "steps between sheets, grids of samples from the EMA; 0: never"
    )
    sheet_count: int = setting(64, Between(1, 10_000), "number of samples on a sheet")
    scores_every: int = setting(
        0,
        _count_or_0,
        "steps between scores, such as FID, of samples from the EMA (see evaluate); the checkpoint "
        "with the best score is kept; 0: never",
    )
    scores_count: int = setting(1000, Between(4, 10_000_000), "number of samples that are scored")
    tensorboard: bool = setting(True, anything, "write TensorBoard event files")
    wandb_project: str | None = setting(
        None, anything, "log to this project of Weights & Biases; none: do not"
    )


@dataclasses.dataclass(frozen=True)
class Precision:
    """Number formats."""

    compute: str = choice(
        "float32",
        DTYPES,
        "dtype of activations and matmuls; parameters, norms, softmax and loss stay float32",
    )
    matmul: str | None = choice(
        None,
        MATMUL_PRECISIONS,
        "precision of the network's float32 matmuls; none: default in training, high in sampling "
        "and inversion, highest in likelihood and excess",
    )
    grad_reduce: str = choice(
        "float32",
        DTYPES,
        "dtype in which devices sum the blocks' gradients; bfloat16 needs compute=bfloat16",
    )
    deterministic: bool = setting(
        False,
        anything,
        "train with kernels that repeat bitwise, even where they are slower: on GPUs in bfloat16",
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Number of devices along each axis of the mesh; their product is all devices. -1: the rest."""

    data: int = setting(-1, _axis, "splits the batch; each part has its own copy of the parameters")
    fsdp: int = setting(
        1, _axis, "splits the batch, and the parameters, EMA and optimizer state as well"
    )
    tensor: int = setting(
        1, _axis, "splits the attention heads and the MLP's hidden features of each layer"
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings."""

    seed: int = setting(
        0,
        _seed,
        "seed of the run: initial weights, data order, noise, times and label dropout",
    )
    model: Model = Model()
    transport: Transport = Transport()
    data: Data = Data()
    latents: Latents = Latents()
    encode: Encode = Encode()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    sample: Sample = Sample()
    likelihood: Likelihood = Likelihood()
    sweep: Sweep = Sweep()
    evaluate: Evaluate = Evaluate()
    excess: Excess = Excess()
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
