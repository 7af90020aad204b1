"""The elementwise functions and their derivatives are those of flax and jax, to rounding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.models.elementwise import gelu, modulated_norm

KEYS = jax.random.split(jax.random.key(0), 5)
X, COTANGENT = (3 * jax.random.normal(key, (2, 5, 16)) + 1 for key in KEYS[:2])
SHIFT, SCALE = (jax.random.normal(key, (2, 16)) for key in KEYS[2:4])


def flaxs_norm(x, shift, scale):
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32)
    return (norm.apply({}, x) * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


def jaxs_gelu(x):
    return nn.gelu(x, approximate=True)


def both_ways(function, *inputs):
    """Return the output, its derivative along the inputs themselves, and the gradients."""
    out, along = jax.jvp(function, inputs, inputs)
    _, pull = jax.vjp(function, *inputs)
    return [np.asarray(x, np.float32) for x in (out, along, *pull(COTANGENT.astype(out.dtype)))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 3e-6), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize(
    ("ours", "theirs", "inputs"),
    [(modulated_norm, flaxs_norm, (X, SHIFT, SCALE)), (gelu, jaxs_gelu, (X,))],
)
def test_values_and_derivatives_in_both_directions(ours, theirs, inputs, dtype, tolerance):
    """The tolerance is a few roundings of the largest value, of 24 and 8 bits."""
    inputs = [x.astype(dtype) for x in inputs]
    exact = both_ways(theirs, *(x.astype(jnp.float32) for x in inputs))
    for ours_, want in zip(both_ways(ours, *inputs), exact, strict=True):
        np.testing.assert_allclose(ours_, want, atol=tolerance * np.abs(want).max())
    assert ours(*inputs).dtype == dtype


def test_gradients_have_the_dtype_of_what_they_belong_to():
    inputs = X.astype(jnp.bfloat16), SHIFT.astype(jnp.bfloat16), SCALE.astype(jnp.bfloat16)
    _, pull = jax.vjp(modulated_norm, *inputs)
    gradients = pull(COTANGENT.astype(jnp.bfloat16))
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients)


def test_gelu_is_finite_far_from_zero():
    x = jnp.array([-1e4, -100.0, -10.0, 0.0, 10.0, 100.0, 1e4])
    np.testing.assert_allclose(gelu(x), [0, 0, 0, 0, 10, 100, 1e4], atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), [0, 0, 0, 0.5, 1, 1, 1], atol=1e-6)
    # Taken twice, as the gradient of the likelihood's divergence is.
    assert np.isfinite(jax.vmap(jax.grad(jax.grad(gelu)))(x)).all()
