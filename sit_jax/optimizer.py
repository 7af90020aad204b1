"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) as the PyTorch reference uses it, and its learning-rate schedules."""

import jax
import optax

from sit_jax.errors import unknown_name

SCHEDULES = ("constant", "cosine")


def learning_rate(name: str, peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then the peak for good, or half a cosine to 0 at `total_steps`."""
    if name not in SCHEDULES:
        raise unknown_name("optimizer.schedule", name, SCHEDULES)
    after = optax.constant_schedule(peak)
    if name == "cosine":
        after = optax.cosine_decay_schedule(peak, max(total_steps - warmup_steps, 1))
    if not warmup_steps:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps]
    )


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
) -> optax.GradientTransformation:
    """AdamW with an optional clip of the global gradient norm before it.

    The fixed position embedding is never decayed.
    """

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "pos_embed", params)

    step = optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay, mask=decayed)
    return step if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), step)
