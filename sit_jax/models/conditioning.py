"""A network's condition: its input besides the noisy image and the time.

A condition is a pytree of arrays [b, ...]. Samplers and guidance hand it on without looking inside;
only the model's embedder does. Class labels are the only kind of condition.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Condition = Any  # a pytree of arrays [b, ...]


@dataclasses.dataclass(frozen=True)
class ClassLabels:
    """Conditions that are int32 labels [b].

    The null label, `classes` itself, stands for "no label".
    """

    classes: int

    def from_records(self, records: Mapping[str, Any]) -> Condition:
        """Return the condition of a batch of records."""
        return records["label"]

    def null_like(self, condition: Condition) -> Condition:
        """Return the null label for every example."""
        return jnp.full_like(condition, self.classes)

    def drop(self, key: jax.Array, condition: Condition, rate: float) -> Condition:
        """Replace each label by the null label with probability `rate`.

        A network that is trained with and without labels can be guided without a classifier
        (Ho & Salimans, arXiv 2207.12598).
        """
        dropped_b = jax.random.uniform(key, condition.shape, jnp.float32) < rate
        return jnp.where(dropped_b, self.classes, condition)
