"""The network against the PyTorch reference, its initial weights, and its sizes."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.names import TABLE
from sit_jax import sharding
from sit_jax.errors import UserError
from sit_jax.models import embeddings
from sit_jax.models.sit import REMAT_POLICIES, Block, SiT, identity
from sit_jax.models.sizes import SIZES, Size, forward_flops, size_by_name, tokens
from sit_jax.sampling.guidance import in_one_call, in_two_calls, with_guidance
from tests import goldens
from tests.goldens import nhwc, relative_error

# The difference from an independent float64 implementation (tests/golden/README.md).
FLOAT32 = 3e-6
X = np.random.default_rng(0).normal(size=(2, 8, 8, 4))
T = jnp.array([0.2, 0.7])
Y = jnp.array([1, 10])


def golden_network(case):
    weights = goldens.load("model")[0]["weights"][case["weights"]]
    model = goldens.model(weights["learn_sigma"])
    params = goldens.params(weights["file"], weights["entry"])
    return jax.jit(lambda x, t, y: model.apply({"params": params}, x, t, y))


@pytest.mark.parametrize("case", goldens.cases("model", "forward"), ids=lambda c: c["weights"])
def test_forward_equals_reference(case):
    arrays = goldens.load("model")[1]
    out = golden_network(case)(nhwc(arrays["x"]), arrays["t"], arrays["y"].astype(np.int32))
    assert relative_error(out, nhwc(arrays[case["out"]])) < FLOAT32


@pytest.mark.parametrize("case", goldens.cases("model", "forward_with_cfg"), ids=lambda c: c["out"])
def test_guidance_equals_reference(case):
    arrays = goldens.load("model")[1]
    network = golden_network(case)
    x, t, y = nhwc(arrays["x_cfg"]), arrays["t_cfg"], arrays["y_cfg"].astype(np.int32)
    half = len(x) // 2  # the reference doubles the batch and uses the first half of x twice

    def conditional(x, t):
        return network(x, t, y[:half])

    def unconditional(x, t):
        return network(x, t, y[half:])

    for both in (
        in_two_calls(conditional, unconditional),
        in_one_call(network, y[:half], y[half:]),
    ):
        guided = with_guidance(conditional, both, case["cfg_scale"], channels=3)
        out = guided(x[:half], t[:half])
        assert relative_error(out, nhwc(arrays[case["out"]])[:half]) < FLOAT32


def test_embeddings_equal_reference():
    arrays = goldens.load("model")[1]
    for case in goldens.cases("model", "timestep_embedding"):
        t = arrays["timestep_embedding/t"]
        error = np.abs(embeddings.time_features(t, case["dim"]) - arrays[case["out"]])
        # The angle t f is rounded to 2^-24 of itself on both sides, which for a large t (there is a
        # 999) shifts the sinusoid.
        assert (error <= 2**-23 * (1 + t[:, None])).all()
    for case in goldens.cases("model", "pos_embed"):
        ours = embeddings.position_embedding(case["dim"], case["grid"])
        np.testing.assert_allclose(ours, arrays[case["out"]].reshape(ours.shape), rtol=0, atol=1e-7)


def record_outputs(model, params, x, t, y):
    """Return the outputs of the modules outside the scan over layers, by name."""
    outputs = {}

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.module.name in ("x_embedder", "t_embedder", "y_embedder", "final_layer"):
            outputs[context.module.name] = output
        return output

    with nn.intercept_methods(record):
        model.apply({"params": params}, x, t, y)
    return outputs


def run_layers(model, params, x, t, y, record=lambda layer, name, output: None):
    """Return the tokens after each layer, with a Python loop over unstacked layers.

    `record` is called with the output of each module inside a layer.
    """
    outputs = record_outputs(model, params, x, t, y)
    x_btd = outputs["x_embedder"].reshape(len(x), -1, model.size.width) + params["pos_embed"]
    embedding_bd = nn.silu(outputs["t_embedder"] + outputs["y_embedder"])
    hooks = {"attend": model.attend, "shard": identity, "split": identity}
    block = Block(model.size.heads, model.mlp_ratio, model.qk_norm, model.dtype, **hooks)
    tokens_after = {}
    for layer in range(1, model.size.depth + 1):
        of_layer = jax.tree.map(lambda stacked, i=layer - 1: stacked[i], params["blocks"])

        def intercept(call, args, kwargs, context, layer=layer):
            output = call(*args, **kwargs)
            record(layer, context.module.name, output)
            return output

        with nn.intercept_methods(intercept):
            x_btd, _ = block.apply({"params": of_layer}, x_btd, embedding_bd)
        tokens_after[layer] = x_btd
    return tokens_after


def test_activations_equal_reference():
    """The parts of the network that its output hides: embedders, attention, mlp, layers."""
    (case,) = goldens.cases("model", "intermediates")
    arrays = goldens.load("model")[1]
    model, params = goldens.bare()
    x, t, y = nhwc(arrays["x"]), arrays["t"], arrays["y"].astype(np.int32)
    outputs = record_outputs(model, params, x, t, y)
    ours = {
        "patch_embed": outputs["x_embedder"],
        "t_embed": outputs["t_embedder"],
        "y_embed": outputs["y_embedder"],
        "final_layer": outputs["final_layer"],
    }
    _, tokens_after = model.apply({"params": params}, x, t, y, layers=(1, 2, 3))
    ours |= {f"block{layer - 1}": tokens for layer, tokens in tokens_after.items()}

    def record(layer, name, output):
        if layer == 1 and name in ("attn", "mlp"):
            ours[f"block0_{name}"] = output

    run_layers(model, params, x, t, y, record)
    assert set(ours) == set(case["out"])
    for name, key in case["out"].items():
        want = arrays[key]
        assert relative_error(ours[name].reshape(want.shape), want) < FLOAT32, name


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_layers_are_the_tokens_after_them_and_change_no_output(remat):
    model, params = goldens.bare()
    model = model.clone(remat=remat)
    apply = jax.jit(model.apply, static_argnames="layers")
    out, tokens_after = apply({"params": params}, X, T, Y, layers=(1, 3))
    np.testing.assert_array_equal(out, apply({"params": params}, X, T, Y))
    looped = run_layers(model, params, X, T, Y)
    assert set(tokens_after) == {1, 3}
    for layer, tokens_btd in tokens_after.items():
        assert relative_error(tokens_btd, looped[layer]) < FLOAT32, layer


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_a_loss_on_a_layer_has_no_gradient_beyond_it(remat):
    model, params = goldens.bare()
    model = model.clone(remat=remat)

    def loss(params):
        return (model.apply({"params": params}, X, T, Y, layers=(2,))[1][2] ** 2).mean()

    gradients = jax.jit(jax.grad(loss))(params)
    kernel = gradients["blocks"]["mlp"]["fc1"]["kernel"]
    assert (kernel[:2] != 0).any(axis=(1, 2)).all() and (kernel[2] == 0).all()
    assert not jnp.any(gradients["final_layer"]["linear"]["kernel"])


def test_layers_pass_through_the_hooks_of_a_mesh():
    model, params = goldens.bare()
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    on_mesh = model.clone(**sharding.model_hooks(mesh, jnp.float32, jnp.float32)._asdict())
    apply = jax.jit(on_mesh.apply, static_argnames="layers")
    _, tokens_after = apply({"params": params}, X, T, Y, layers=(2,))
    assert relative_error(tokens_after[2], run_layers(model, params, X, T, Y)[2]) < FLOAT32


def test_the_program_stacks_no_tokens_unless_asked():
    model, params = goldens.bare()

    def stacked(layers):
        lowered = jax.jit(lambda p, x: model.apply({"params": p}, x, T, Y, layers)).lower(params, X)
        return "tensor<3x2x16x48xf32>" in lowered.as_text()  # [depth, b, t, d]

    assert stacked((2,)) and not stacked(())


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_layer_that_does_not_exist_is_named(layer):
    model, params = goldens.bare()
    message = f"layer {layer} does not exist; expected 1 to 3, the model's depth"
    with pytest.raises(UserError, match=re.escape(message)):
        model.apply({"params": params}, X, T, Y, layers=(1, layer))


def test_fresh_weights_follow_the_reference():
    expected = goldens.load("model")[0]["fresh_init"]
    model = goldens.model(True)
    x, one = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1)
    params = model.init(jax.random.key(0), x, one, one.astype(int))["params"]
    flat = {
        jax.tree_util.keystr(k, simple=True, separator="/"): v
        for k, v in jax.tree_util.tree_leaves_with_path(params)
    }
    assert {path for path, _ in TABLE.values()} == set(flat)
    for name, (path, _) in TABLE.items():
        want = expected[name.replace(".N.", ".0.")]
        value = flat[path][0] if ".N." in name else flat[path]
        assert value.size == np.prod(want["shape"]), name
        assert bool((value == 0).all()) == want["all_zero"], name
        # A spread estimated from n values is off by about 1/sqrt(2n) on either side; five of those.
        assert abs(value.std() - want["std"]) <= 5 * want["std"] / np.sqrt(value.size), name
        if "uniform" in name or "qkv" in name:
            assert value.max() <= np.sqrt(3) * want["std"] * 1.1


@pytest.mark.parametrize(
    "name, millions", [("S", 32.96), ("B", 130.51), ("L", 458.10), ("XL", 675.13)]
)
def test_parameter_counts(name, millions):
    model = SiT(SIZES[f"SiT-{name}/2"], 32, 4, 1000, learn_sigma=True)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, int)
    )
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 2) == millions


def test_forward_flops_of_xl_are_the_published_ones():
    assert forward_flops(SIZES["SiT-XL/2"], 32, 4, learn_sigma=True) / 2 == pytest.approx(
        118.62e9, rel=1e-4
    )


def test_twelve_sizes():
    assert len(SIZES) == 12
    assert size_by_name("SiT-XL/2") == Size(28, 1152, 16, 2)
    assert size_by_name("SiT-B/8", depth=3) == Size(3, 768, 12, 8)


@pytest.mark.parametrize("shape, patch", [((8, 8, 1), 4), ((12, 12, 3), 2), ((16, 16, 4), 8)])
def test_any_input_size_and_channels(shape, patch):
    model = SiT(Size(2, 16, 2, patch), shape[0], shape[2], classes=3)
    x, t, y = jnp.zeros((2, *shape)), jnp.zeros(2), jnp.array([0, 3])
    out = jax.eval_shape(lambda: model.apply(model.init(jax.random.key(0), x, t, y), x, t, y))
    assert out.shape == x.shape and out.dtype == jnp.float32


def test_patches_round_trip():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    np.testing.assert_array_equal(embeddings.unpatchify(embeddings.patchify(x, 2), 2, 3), x)


@pytest.mark.parametrize("remat", ["dots", "operands", "full"])
def test_remat_changes_no_gradient(remat):
    model, params = goldens.bare()

    def gradient(model):
        return jax.jit(jax.grad(lambda p: (model.apply({"params": p}, X, T, Y) ** 2).sum()))(params)

    gradients = gradient(model), gradient(model.clone(remat=remat))
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        # Recomputed sums may be in a different order.
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 1e-3)


def test_bfloat16_keeps_parameters_and_output_in_float32():
    model, params = goldens.bare()
    out = model.clone(dtype=jnp.bfloat16).apply({"params": params}, X, T, Y)
    exact = model.apply({"params": params}, X, T, Y)
    assert out.dtype == jnp.float32
    assert 1e-5 < relative_error(out, exact) < 0.05  # eight bits of mantissa, through three layers


def test_compile_size_does_not_grow_with_depth():
    def text(depth):
        model = SiT(Size(depth, 16, 2, 4), 8, 1, classes=3)
        x, t = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)
        params = jax.eval_shape(model.init, jax.random.key(0), x, t, t.astype(int))
        return jax.jit(model.apply).lower(params, x, t, t.astype(int)).as_text()

    assert len(text(24)) < 1.02 * len(text(2))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: size_by_name("SiT-XXL/2"), ["unknown model 'SiT-XXL/2'", "'SiT-XL/2'"]),
        (lambda: size_by_name("SiT-S/2", heads=5), ["384", "5 heads"]),
        (lambda: size_by_name("SiT-S/2", depth=0), ["depth is 0", "at least 1"]),
        (lambda: tokens(9, 2), ["9", "patch size 2"]),
    ],
)
def test_bad_sizes(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_qk_norm_bounds_the_logits_and_adds_two_scales():
    model = goldens.model(True).clone(qk_norm=True)
    params = model.init(jax.random.key(1), X, T, Y)["params"]
    extra = {name: params["blocks"]["attn"].pop(name) for name in ("q_norm", "k_norm")}
    shapes = {name: scale["scale"].shape for name, scale in extra.items()}
    assert shapes == {"q_norm": (3, 12), "k_norm": (3, 12)}

    def output(factor):
        """Return the output with queries and keys scaled by a factor."""
        params = jax.tree.map(jnp.asarray, goldens.params("sit_bare.pt", None))
        attention = params["blocks"]["attn"]
        attention["qkv"] = jax.tree.map(
            lambda w: w.at[..., :2, :, :].multiply(factor), attention["qkv"]
        )
        attention |= extra
        return model.apply({"params": params}, X, T, Y)

    # Equal up to the norm's epsilon.
    np.testing.assert_allclose(output(100.0), output(1.0), rtol=0, atol=2e-3)
