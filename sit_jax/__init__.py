"""Scalable Interpolant Transformers in JAX/Flax. `sit_jax.load(workdir)` opens a trained run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sit_jax.api import Run, load

__all__ = ["Run", "load"]


def __getattr__(name: str) -> Any:
    # Imported at the first use: config files and reader processes import this package too.
    if name in __all__:
        from sit_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
