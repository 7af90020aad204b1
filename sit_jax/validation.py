"""Checks that need more than one setting: values that contradict each other."""

from collections.abc import Callable

from sit_jax import sharding
from sit_jax.errors import brief, check
from sit_jax.latents import CODECS
from sit_jax.laws import declared
from sit_jax.models.sizes import size_by_name
from sit_jax.sampling import ode, sde
from sit_jax.settings import Config, Latents, Model, Sample, Sweep, get
from sit_jax.transport import losses


def validate(config: Config) -> None:
    """Raise `UserError` for a value that breaks its law or contradicts another value."""
    check(
        config.likelihood.solver not in sde.SOLVERS,
        f"likelihood.solver {config.likelihood.solver!r} solves an SDE, which gives no log p; "
        f"expected one of an ODE: {', '.join(ode.SOLVERS)}",
    )
    for label in config.sample.labels:
        check(
            0 <= label < config.data.classes,
            f"sample.labels holds {brief(label)}; expected 0 to {config.data.classes - 1} "
            "(data.classes)",
        )
    for entry in declared(Config):
        entry.law.check(entry.key, get(config, entry.key))
    _check_model(config.model)
    check(
        config.data.name is None or config.data.source == "tfds",
        f"data.name is {brief(config.data.name)}, but data.source {config.data.source!r} has no "
        "named data sets; set data.name=none, or data.source=tfds",
    )
    losses.check_weight(config.transport.loss_weight, config.transport.prediction)
    _check_training(config)
    _check_latents(config.latents)
    _check_sampler(config.sample)
    _check_likelihood(config)
    _check_sweep(config.sweep)
    sharding.check_axes(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def _check_model(model: Model) -> None:
    depth = size_by_name(
        model.name, depth=model.depth, width=model.width, heads=model.heads, patch=model.patch
    ).depth
    check(
        model.unroll is None or depth % model.unroll == 0,
        f"model.unroll {model.unroll} does not divide the model's {depth} layers; take one of "
        + ", ".join(map(str, sharding.divisors(depth))),
    )


def _check_training(config: Config) -> None:
    train = config.train
    check(
        train.steps is None or train.epochs is None,
        f"train.steps {train.steps} and train.epochs {brief(train.epochs)} are both given; set "
        "train.steps=none to train for epochs, or train.epochs=none",
    )
    check(
        train.steps is not None or train.epochs is not None,
        "train.steps and train.epochs are both none; set one of them, such as train.epochs=80",
    )
    check(
        train.batch % train.accumulation == 0,
        f"train.batch {train.batch} is not divisible by train.accumulation {train.accumulation}; "
        "change one of them",
    )
    check(
        config.precision.grad_reduce in ("float32", config.precision.compute),
        "precision.grad_reduce is 'bfloat16', but gradients are computed in float32; set it to "
        "float32, or precision.compute to bfloat16 as well",
    )


def check_null_label(config: Config, uses: Callable[[str], bool]) -> None:
    """Raise `UserError` if a job wants a null label that label dropout never trained.

    `uses` says whether the job uses a setting, by its key.
    """
    guided = [("sample.cfg_scale", config.sample.cfg_scale)]
    guided += [("sweep.cfg_scales", scale) for scale in config.sweep.cfg_scales]
    wanted = [
        f"{key} {scale:g} guides away from it; set {key}=1, or sample.guide to a weaker run"
        for key, scale in guided
        if uses(key) and scale > 1 and config.sample.guide is None
    ]
    if uses("likelihood.labels") and config.likelihood.labels == "null":
        wanted.append("likelihood.labels 'null' evaluates it; set likelihood.labels=data")
    if uses("excess.labels") and config.excess.labels == "null":
        wanted.append("excess.labels 'null' evaluates it; set excess.labels=data")
    check(
        config.train.label_dropout > 0 or not wanted,
        "train.label_dropout is 0, so that no null label is trained, but "
        f"{''.join(wanted[:1])}; or train with a label_dropout such as 0.1",
    )


def _check_latents(latents: Latents) -> None:
    check(
        latents.path is None or latents.repo is None,
        f"latents.path {latents.path!r} and latents.repo {latents.repo!r} are both given; set one "
        "of them to none",
    )


def _check_sampler(sample: Sample) -> None:
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
        sample.guide is None or sample.cfg_scale > 1,
        f"sample.guide is {sample.guide!r}, but sample.cfg_scale is {sample.cfg_scale:g}, which "
        "turns guidance off; set it above 1",
    )
    for key, value, remedy in (
        ("labels", sample.labels, "()"),
        ("label_draw", sample.label_draw == "random", "balanced"),
    ):
        check(
            sample.labels_file is None or not value,
            f"sample.labels_file is {brief(sample.labels_file)}, which gives every sample its "
            f"label, but sample.{key} is {brief(getattr(sample, key))}; set sample.{key}={remedy}, "
            "or sample.labels_file=none",
        )
    low_high = sample.cfg_interval
    check(
        len(low_high) == 2 and 0 <= low_high[0] < low_high[1] <= 1,
        f"sample.cfg_interval is {low_high}; expected two times with 0 <= first < last <= 1",
    )


def _check_likelihood(config: Config) -> None:
    likelihood = config.likelihood
    ode.check_solver(likelihood.solver, likelihood.steps, "likelihood")
    check(
        likelihood.dequantisation is None or CODECS[config.latents.codec].quantised,
        f"likelihood.dequantisation is {likelihood.dequantisation!r}, but latents.codec "
        f"{config.latents.codec!r} gives latents, which are continuous; set it to none",
    )


def _check_sweep(sweep: Sweep) -> None:
    for key in ("solvers", "steps", "cfg_scales"):
        check(getattr(sweep, key), f"sweep.{key} is empty; give one or more")
    times = sweep.cfg_intervals
    check(
        len(times) % 2 == 0
        and all(low < high for low, high in zip(times[::2], times[1::2], strict=True)),
        f"sweep.cfg_intervals is {times}; expected pairs of times with first < last, such as "
        "0,1,0.1,0.9",
    )
    check(
        sweep.forms or not set(sweep.solvers) & set(sde.SOLVERS),
        "sweep.forms is empty, but sweep.solvers has SDE solvers; give a form, such as SBDM",
    )
