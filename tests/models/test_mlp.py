"""The MLP of a layer: its values and derivatives, what is kept of it, and GELU within its product.

The branch for NVIDIA GPUs takes GELU from another form of the same value. It cannot run on a CPU;
here `affine` is given such a form, and the programs for GPUs are read.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals

from sit_jax.models.linear import affine
from sit_jax.models.sit import REMAT_POLICIES, Mlp

WIDTH, HIDDEN, ROWS = 16, 64, 6
X = jax.random.normal(jax.random.key(0), (2, 3, WIDTH))
PARAMS = jax.tree.map(lambda p: p + 0.1, Mlp(4, jnp.float32).init(jax.random.key(1), X))
COTANGENT = jax.random.normal(jax.random.key(2), X.shape)
# (dtype, roundings of the largest value)
DTYPES = [(jnp.float32, 3e-6), (jnp.bfloat16, 3e-2)]


def ours(dtype, remat="dots"):
    """Return the MLP as a function of (parameters, x), recomputed as in a layer."""
    mlp = Mlp(4, dtype, keep_activated=remat == "operands")
    apply = jax.checkpoint(mlp.apply, policy=REMAT_POLICIES[remat])
    return lambda params, x: apply(params, x.astype(dtype)).astype(jnp.float32)


def plain(params, x):
    fc1, fc2 = params["params"]["fc1"], params["params"]["fc2"]
    hidden = nn.gelu(x @ fc1["kernel"] + fc1["bias"], approximate=True)
    return hidden @ fc2["kernel"] + fc2["bias"]


def assert_close(got, want, tolerance):
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_values_and_derivatives_are_those_of_the_plain_form(remat, dtype, tolerance):
    mlp = ours(dtype, remat)
    for derivatives in (
        lambda f: jax.jvp(lambda x: f(PARAMS, x), (X,), (COTANGENT,)),
        lambda f: jax.vjp(f, PARAMS, X)[1](COTANGENT),
    ):
        assert_close(derivatives(mlp), derivatives(plain), tolerance)


def test_second_derivatives_are_those_of_the_plain_form():
    """The gradient of a likelihood would take them: its divergence is a first derivative."""

    def curvature(mlp):
        return jax.grad(lambda x: jnp.vdot(jax.grad(lambda x: mlp(PARAMS, x).sum())(x), X))(X)

    for dtype, tolerance in DTYPES:
        assert_close(curvature(ours(dtype)), curvature(plain), tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_of_the_hidden_values_fc1s_output_is_kept_and_under_operands_its_gelu(dtype):
    def hidden(remat):
        kept = saved_residuals(ours(dtype, remat), PARAMS, X)
        return [(aval.shape, aval.dtype) for aval, _ in kept if aval.size == ROWS * HIDDEN]

    assert hidden("dots") == [((ROWS, HIDDEN), dtype)]
    assert hidden("operands") == 2 * [((ROWS, HIDDEN), dtype)]
    assert hidden("full") == []


def test_a_product_may_take_another_form_of_its_input():
    """The output is that of the form; every derivative is that of the input itself."""
    kernel = jax.random.normal(jax.random.key(3), (WIDTH, 8))
    bias = jnp.ones(8)
    x = X.reshape(ROWS, WIDTH).astype(jnp.bfloat16)
    form = 2 * x
    np.testing.assert_array_equal(affine(x, kernel, bias, form), affine(form, kernel, bias))
    cotangent = jnp.ones((ROWS, 8), jnp.bfloat16)
    with_form, without = (
        jax.vjp(lambda *inputs, given=given: affine(*inputs, *given), x, kernel, bias)[1](cotangent)
        for given in ((form,), ())
    )
    jax.tree.map(np.testing.assert_array_equal, with_form, without)
    # With x in float32 too, the gradient of W comes from the product itself, whose input must be x.
    x = x.astype(jnp.float32)
    np.testing.assert_array_equal(affine(x, kernel, bias, 2 * x), affine(x, kernel, bias))


def gradients(params, x):
    y, pull = jax.vjp(ours(jnp.bfloat16), params, x)
    return pull(y)


@pytest.mark.parametrize(("platform", "count"), [("cuda", 1), ("cpu", 0), ("tpu", 0)])
def test_only_nvidias_forward_pass_computes_gelu_by_its_tanh(platform, count):
    """XLA finds it within a product by that; the derivative uses the logistic function."""
    lowered = jax.jit(gradients).trace(PARAMS, X).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("stablehlo.tanh") == count


def test_that_gelu_is_of_the_product_before_jax_rounds_it():
    makers = {
        output: equation
        for equation in jax.make_jaxpr(gradients)(PARAMS, X).jaxpr.eqns
        for output in equation.outvars
    }
    (choice,) = (e for e in makers.values() if e.primitive.name == "cond")
    _, product, activated = (makers[variable] for variable in choice.invars)

    def maker_names(equation):
        """Return the names of the equations on the way back to a product, by first inputs."""
        while equation.primitive.name != "dot_general":
            yield equation.primitive.name
            equation = makers[equation.invars[0]]

    assert "reduce_precision" in set(maker_names(activated))
    # The bias, and the zeros that bring the gradients of the parameters.
    assert list(maker_names(product)) == ["stop_gradient", "add", "add"]
