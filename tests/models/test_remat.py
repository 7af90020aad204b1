"""What the backward pass of a layer recomputes under each policy, counted in jax's own program.

A layer has seven products: five linear layers, and two in attention. Nothing here runs, so a CPU
can trace cuDNN's attention. jax's private names that `attention.KEPT` relies on, and a jax that
ignores our policies (as its coming jax_remat3 does inside a custom_vjp), fail these tests.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from sit_jax import sharding
from sit_jax.errors import UserError
from sit_jax.models import attention
from sit_jax.models.sit import SiT, remat_policy
from sit_jax.models.sizes import Size

SIZE = Size(depth=1, width=128, heads=2, patch=2)
X, T, Y = jnp.zeros((3, 8, 8, 4)), jnp.zeros(3), jnp.zeros(3, int)
TOKENS = 16


@pytest.fixture(autouse=True)
def cudnn_is_said_to_be_here(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90800)


def equations(jaxpr):
    """Yield all equations of a jaxpr, those inside other equations too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@functools.cache
def gradient(remat, kernel, on_mesh=False):
    """Return the equations of the gradient of a one-layer network in bfloat16."""
    attend = attention.KERNELS[kernel]
    if on_mesh:
        attend = sharding.on_each_device(sharding.make_mesh(1, 1, 1, jax.devices()[:1]), attend)
    hooks = {"kernel": kernel, "attend": attend}
    model = SiT(SIZE, 8, 4, 10, remat=remat, dtype=jnp.bfloat16, **hooks)
    plain = model.clone(attend=attention.einsum)
    params = jax.eval_shape(plain.init, jax.random.key(0), X, T, Y)
    loss = jax.grad(lambda params: model.apply(params, X, T, Y).sum())
    return list(equations(jax.make_jaxpr(loss)(params).jaxpr))


def count(name, *case):
    return sum(equation.primitive.name == name for equation in gradient(*case))


def kept(*case):
    """Return the number of elements that the forward scan over layers returns.

    They are its last tokens, and what is kept for the backward pass.
    """
    scan = next(equation for equation in gradient(*case) if equation.primitive.name == "scan")
    return sum(math.prod(variable.aval.shape) for variable in scan.outvars)


def recomputed(remat, kernel):
    """Return how many products the gradient computes beyond those without recomputation."""
    return count("dot_general", remat, kernel) - count("dot_general", "none", kernel)


def test_each_policy_recomputes_its_products():
    assert recomputed("full", "einsum") == 9
    assert recomputed("dots", "einsum") == 1  # the logits
    assert recomputed("full", "cudnn") == 7
    assert recomputed("dots", "cudnn") == 0
    assert recomputed("operands", "einsum") == 1
    assert recomputed("operands", "cudnn") == 0
    amounts = [kept(remat, "einsum") for remat in ("full", "dots", "operands", "none")]
    assert amounts == sorted(set(amounts))


@pytest.mark.parametrize("on_mesh", [False, True])
def test_cudnns_forward_kernel_runs_again_only_under_full(on_mesh):
    for remat, runs in (("none", 1), ("operands", 1), ("dots", 1), ("full", 2)):
        case = (remat, "cudnn", on_mesh)
        assert count("dot_product_attention_fwd_wrapper", *case) == runs, remat
        assert count("dot_product_attention_bwd_wrapper", *case) == 1, remat


def test_cudnns_output_is_kept_once_with_the_statistics():
    statistics = len(X) * SIZE.heads * TOKENS
    for on_mesh in (False, True):
        assert kept("dots", "cudnn", on_mesh) == kept("dots", "einsum") + statistics


def test_operands_also_keeps_what_products_and_norms_take():
    """Both normalised inputs, the tokens between the branches, and GELU of four times the width."""
    tokens = len(X) * TOKENS * SIZE.width
    for kernel in ("einsum", "cudnn"):
        assert kept("operands", kernel) == kept("dots", kernel) + (3 + 4) * tokens


def test_every_kernel_says_what_is_kept_of_it():
    assert attention.KEPT.keys() == attention.KERNELS.keys()
    with pytest.raises(UserError, match=r"unknown remat policy 'dot'; .*dots"):
        remat_policy("dot", "einsum")
