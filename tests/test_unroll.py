"""The loop over layers computes the same unrolled; the setup decides how it is compiled."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax import config as config_lib
from sit_jax.errors import UserError
from sit_jax.jobs import train
from sit_jax.jobs.data import abstract_batch
from sit_jax.jobs.setup import Setup, check_unroll, set_up
from sit_jax.models.sit import SiT, in_compute_dtype
from sit_jax.models.sizes import Size

SMALL = {
    "model.depth": "4", "model.width": "32", "model.heads": "2", "train.batch": "4",
    "data.image_size": "8",
}  # fmt: skip


def load(**settings):
    return config_lib.load("configs/digits.py", [*SMALL.items(), *settings.items()])


def on(platform, **settings):
    """Return a training setup that takes its devices for those of the platform."""
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device], object))
    return Setup(load(**settings), mesh, is_training=True)


def stepped(unroll):
    """Return parameters and loss after one step from random parameters."""
    setup = set_up(load(**{"model.unroll": unroll}), jax.devices()[:1])
    state = setup.create_state()
    leaves, tree = jax.tree.flatten(state.params)
    draw = np.random.default_rng(0)
    leaves = [jnp.asarray(0.1 * draw.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
    batch = {
        name: jnp.asarray(draw.integers(0, 2, spec.shape), spec.dtype)
        for name, spec in abstract_batch(setup).items()
    }
    state = state.replace(params=jax.tree.unflatten(tree, leaves))
    state, scalars = train.make_train_step(setup)(state, batch, setup.codec_params)
    # Attention does not depend on the bias of k. Its gradient is rounding error, of either sign,
    # which Adam scales up.
    qkv = state.params["blocks"]["attn"]["qkv"]
    qkv["bias"] = qkv["bias"].at[:, 1].set(0)
    return state.params, scalars


@pytest.mark.slow
def test_unrolled_layers_compute_the_same():
    params, scalars = stepped("1")
    for unroll in ("2", "4"):
        others, other_scalars = stepped(unroll)
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(scalars[name], other_scalars[name], rtol=1e-5)
        # Adam's first step is the learning rate times the sign, whatever the size of a gradient.
        for a, b in zip(*map(jax.tree.leaves, (params, others)), strict=True):
            assert np.mean(np.abs(a - b) > 1e-6) < 1e-3


@pytest.mark.parametrize("unroll", ["3", "8"])
def test_an_unroll_that_does_not_divide_the_layers_is_refused(unroll):
    with pytest.raises(UserError, match=f"model.unroll {unroll} does not .* 4 layers; .* 1, 2, 4"):
        load(**{"model.unroll": unroll})


BFLOAT16 = {"precision.compute": "bfloat16"}


@pytest.mark.parametrize(
    ("platform", "settings", "unroll", "repeatable"),
    [
        ("gpu", {}, 4, True),
        ("gpu", BFLOAT16, 4, False),
        ("gpu", BFLOAT16 | {"precision.deterministic": "true"}, 1, True),
        ("gpu", {"precision.deterministic": "true"}, 4, True),
        ("gpu", {"precision.deterministic": "true", "model.unroll": "2"}, 2, True),
        ("cuda", BFLOAT16 | {"model.unroll": "1"}, 1, True),
        ("gpu", BFLOAT16 | {"model.attention": "einsum"}, 4, True),
        ("cpu", BFLOAT16, 1, None),
        ("tpu", BFLOAT16, 1, None),
        ("tpu", {"model.unroll": "2"}, 2, None),
    ],
)
def test_the_setup_unrolls_on_gpus_and_asks_for_repeatable_kernels(
    platform, settings, unroll, repeatable
):
    setup = on(platform, **settings)
    assert setup.unroll == unroll
    assert setup.compiler_options.get("xla_gpu_exclude_nondeterministic_ops") == repeatable
    sampling = dataclasses.replace(setup, is_training=False)
    assert sampling.unroll == 1
    repeats = sampling.compiler_options.get("xla_gpu_exclude_nondeterministic_ops")
    assert repeats == (True if platform in ("gpu", "cuda") else None)


def test_repeatable_kernels_exclude_unrolled_layers_with_cudnn():
    settings = BFLOAT16 | {"model.unroll": "2", "precision.deterministic": "true"}
    with pytest.raises(UserError, match=r"model.unroll is 2, but with cuDNN's attention"):
        check_unroll(on("gpu", **settings))
    check_unroll(on("gpu", **settings | {"model.unroll": "1"}))
    check_unroll(on("cpu", **settings))
    assert on("cpu", **settings).unroll == 2


def test_this_xla_knows_the_options_for_gpus():
    options = on("gpu").compiler_options
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(Exception, match="no_such_option"):
        jax.jit(lambda x: x + 2, compiler_options={"no_such_option": True})(1)


def test_unrolled_layers_are_still_recomputed():
    """Without a barrier, XLA would take the recomputed values for those of the forward pass."""

    def barriers(unroll):
        model = SiT(Size(4, 32, 2, 2), 8, 4, 10, remat="dots", unroll=unroll)
        x, t, y = jnp.zeros((2, 8, 8, 4)), jnp.zeros(2), jnp.zeros(2, int)
        params = model.init(jax.random.key(0), x, t, y)
        gradient = jax.grad(lambda params: model.apply(params, x, t, y).sum())
        return jax.jit(gradient).lower(params).as_text().count("optimization_barrier")

    assert barriers(1) == 0
    assert barriers(4) >= 1  # in the function of a layer


@pytest.mark.slow
def test_parameters_converted_once_give_the_same_output():
    config = load(**BFLOAT16, **{"model.qk_norm": "true"})
    setup = set_up(config, jax.devices()[:1])
    params = jax.tree.map(
        lambda leaf: leaf + 0.01 * jnp.arange(leaf.size).reshape(leaf.shape) % 0.1,
        setup.init_params(),
    )
    converted = in_compute_dtype(params, setup.model.dtype)
    assert converted["blocks"]["attn"]["qkv"]["kernel"].dtype == jnp.bfloat16
    assert converted["blocks"]["attn"]["q_norm"]["scale"].dtype == jnp.float32
    assert converted["t_embedder"]["fc1"]["kernel"].dtype == jnp.float32
    assert converted["y_embedder"]["embedding"].dtype == jnp.float32
    x = jax.random.normal(jax.random.key(1), (2, *setup.input_shape))
    arguments = x, jnp.array([0.2, 0.7]), jnp.array([1, 2])
    network = jax.jit(setup.network)
    np.testing.assert_array_equal(network(params, *arguments), network(converted, *arguments))
