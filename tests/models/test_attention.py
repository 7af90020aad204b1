"""The TPU kernel computes the same attention as the einsums, and each platform has its kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.models import attention


@pytest.mark.parametrize(
    ("platform", "dtype", "tokens", "kernel"),
    [
        ("cpu", "bfloat16", 1024, "einsum"),
        ("tpu", "bfloat16", 256, "einsum"),
        ("tpu", "bfloat16", 1024, "splash"),
        ("tpu", "bfloat16", 1025, "einsum"),
        ("tpu", "float32", 1024, "einsum"),
        ("gpu", "bfloat16", 256, "cudnn"),
        ("gpu", "float32", 256, "einsum"),
    ],
)
def test_each_platform_gets_its_kernel(platform, dtype, tokens, kernel):
    assert attention.choose(platform, dtype, tokens) == kernel


def test_splash_is_attention():
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (jax.random.normal(key, (2, 2, 256, 72), jnp.bfloat16) for key in keys)

    def both_ways(attend):
        out, pull = jax.vjp(attend, q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *pull(cotangent))]

    splash = functools.partial(attention.splash, interpret=True)
    for ours, theirs in zip(both_ways(splash), both_ways(attention.einsum), strict=True):
        # bfloat16 has 8 bits, and the two sum and round in different orders.
        assert np.abs(ours - theirs).max() < 0.02 * np.abs(theirs).max()
