"""The optimizer and its learning-rate schedules.

AdamW (Loshchilov & Hutter, arXiv 1711.05101), as the PyTorch reference uses it.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import optax

from sit_jax.errors import unknown_name


class Options(Protocol):
    """The fields of `settings.Optimizer`."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def b1(self) -> float: ...
    @property
    def b2(self) -> float: ...
    @property
    def eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip_norm(self) -> float | None: ...


# (peak learning rate, number of steps after the warm-up) -> the schedule of those steps
SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
}


def make_schedule(options: Options, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    It rises linearly from 0 to the peak over `warmup_steps`. Then "constant" stays at the peak, and
    "cosine" falls along half a cosine to 0 at `total_steps`. Raises UserError for an unknown name.
    """
    if options.schedule not in SCHEDULES:
        raise unknown_name("optimizer.schedule", options.schedule, SCHEDULES)
    peak = options.learning_rate
    warmup_steps = options.warmup_steps
    schedule = SCHEDULES[options.schedule](peak, max(total_steps - warmup_steps, 1))
    if not warmup_steps:
        return schedule
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, schedule], [warmup_steps])


def make_optimizer(options: Options, total_steps: int) -> optax.GradientTransformation:
    """Return AdamW, after a clip of the global gradient norm if `clip_norm` is given.

    The fixed position embedding is never decayed.
    """

    def is_decayed(params: Any) -> Any:
        """Return a tree of bools like `params`."""
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "pos_embed", params)

    adamw = optax.adamw(
        make_schedule(options, total_steps),
        options.b1,
        options.b2,
        options.eps,
        weight_decay=options.weight_decay,
        mask=is_decayed,
    )
    if options.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), adamw)


def with_clipping(opt_state: Any, was_clipped: bool, is_clipped: bool) -> Any:
    """Return a state of `make_optimizer` after `clip_norm` was set or unset: the same moments."""
    adamw = opt_state[1] if was_clipped else opt_state
    return (optax.EmptyState(), adamw) if is_clipped else adamw


def update_count(opt_state: Any) -> Any:
    """Return the number of updates made, at which the next one reads the schedule."""
    return optax.tree.get(opt_state, "ScaleByScheduleState").count
