"""Every kernel computes the same attention as the einsums, and each platform has its kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.models import attention


@pytest.mark.parametrize(
    ("platform", "dtype", "tokens", "head_width", "kernel"),
    [
        ("cpu", "bfloat16", 1024, 72, "einsum"),
        ("cpu", "float32", 256, 72, "late_softmax"),
        ("tpu", "bfloat16", 256, 72, "einsum"),
        ("tpu", "bfloat16", 1024, 72, "splash"),
        ("tpu", "bfloat16", 1025, 72, "einsum"),
        ("tpu", "float32", 1024, 72, "einsum"),
        ("gpu", "bfloat16", 256, 72, "cudnn"),
        ("gpu", "float32", 256, 72, "einsum"),
        # cuDNN refuses heads of other widths.
        ("gpu", "bfloat16", 256, 12, "einsum"),
        ("gpu", "bfloat16", 256, 128, "cudnn"),
        ("gpu", "bfloat16", 256, 136, "einsum"),
    ],
)
def test_each_platform_gets_its_kernel(platform, dtype, tokens, head_width, kernel):
    assert attention.choose(platform, dtype, tokens, head_width) == kernel


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


@pytest.mark.parametrize("scale", [1.0, 5.0])  # 5: weights of almost 0 and 1
def test_the_cpu_form_is_attention_in_both_modes_of_differentiation(scale):
    keys = jax.random.split(jax.random.key(0), 7)
    q, k, v, cotangent, *tangents = (
        jax.random.normal(key, (2, 3, 20, 8), jnp.float32) for key in keys
    )
    q, k = scale * q, scale * k

    def all_ways(attend):
        out, pull = jax.vjp(attend, q, k, v)
        return [out, *pull(cotangent), jax.jvp(attend, (q, k, v), tuple(tangents))[1]]

    for ours, theirs in zip(
        all_ways(attention.late_softmax), all_ways(attention.einsum), strict=True
    ):
        assert np.abs(ours - theirs).max() <= 2e-6 * scale**2 * np.abs(theirs).max()


def test_the_cpu_form_has_second_derivatives():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 1, 5, 4), jnp.float32)

    def second(attend):
        return jax.grad(lambda q: jax.grad(lambda q: (attend(q, k, v) ** 2).sum())(q).sum())(q)

    ours, theirs = second(attention.late_softmax), second(attention.einsum)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_the_backward_pass_of_the_cpu_form_has_five_batched_products_that_recompute_no_output():
    x = jnp.zeros((2, 3, 20, 8))
    _, pull = jax.vjp(attention.late_softmax, x, x, x)
    products = str(jax.make_jaxpr(pull)(x)).count("dot_general[")
    # dv, the change of the weights, dq and dk; the logits are residuals unless remat drops them.
    assert products == 4
    recomputed = jax.vjp(jax.checkpoint(attention.late_softmax), x, x, x)[1]
    assert str(jax.make_jaxpr(recomputed)(x)).count("dot_general[") == 5
