"""The network against the PyTorch reference, its initial weights, and its sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.names import TABLE
from sit_jax.errors import UserError
from sit_jax.models import embeddings
from sit_jax.models.label_dropout import drop_labels
from sit_jax.models.sit import SiT
from sit_jax.models.sizes import SIZES, Size, forward_flops, size_by_name, tokens
from sit_jax.sampling.guidance import guide
from tests import goldens
from tests.goldens import nhwc, relative_error

FLOAT32 = 3e-6  # what an independent float64 implementation differs by (tests/golden/README.md)


def golden_network(case):
    weights = goldens.load("model")[0]["weights"][case["weights"]]
    model, params = (
        goldens.model(weights["learn_sigma"]),
        goldens.params(weights["file"], weights["entry"]),
    )
    return jax.jit(lambda x, t, y: model.apply({"params": params}, x, t, y))


@pytest.mark.parametrize("case", goldens.cases("model", "forward"), ids=lambda c: c["weights"])
def test_forward_equals_reference(case):
    arrays = goldens.load("model")[1]
    out = golden_network(case)(nhwc(arrays["x"]), arrays["t"], arrays["y"].astype(np.int32))
    assert relative_error(out, nhwc(arrays[case["out"]])) < FLOAT32


@pytest.mark.parametrize("case", goldens.cases("model", "forward_with_cfg"), ids=lambda c: c["out"])
def test_guidance_equals_reference(case):
    arrays, network = goldens.load("model")[1], golden_network(case)
    x, t, y = nhwc(arrays["x_cfg"]), arrays["t_cfg"], arrays["y_cfg"].astype(np.int32)
    half = len(x) // 2  # the reference doubles the batch and uses the first half of x twice
    conditional, unconditional = (lambda x, t, y=y: network(x, t, y) for y in (y[:half], y[half:]))
    out = guide(conditional, unconditional, case["cfg_scale"], channels=3)(x[:half], t[:half])
    assert relative_error(out, nhwc(arrays[case["out"]])[:half]) < FLOAT32


def test_embeddings_equal_reference():
    arrays = goldens.load("model")[1]
    for case in goldens.cases("model", "timestep_embedding"):
        t = arrays["timestep_embedding/t"]
        error = np.abs(embeddings.time_features(t, case["dim"]) - arrays[case["out"]])
        # The angle t f is rounded to 2^-24 of itself on both sides, so large t (999 is one of them) shifts the
        # sinusoid.
        assert (error <= 2**-23 * (1 + t[:, None])).all()
    for case in goldens.cases("model", "pos_embed"):
        ours = embeddings.position_embedding(case["dim"], case["grid"])
        np.testing.assert_allclose(ours, arrays[case["out"]].reshape(ours.shape), rtol=0, atol=1e-7)


def test_activations_equal_reference():
    """The parts of the network that are not visible in its output's size: embedders, attention, mlp, blocks."""
    (case,), arrays = goldens.cases("model", "intermediates"), goldens.load("model")[1]
    model, params = goldens.bare()
    x, t, y = nhwc(arrays["x"]), arrays["t"], arrays["y"].astype(np.int32)
    seen = []

    def see(x_btd):  # the hook between layers, inside the scan
        jax.debug.callback(seen.append, x_btd, ordered=True)
        return x_btd

    _, state = model.clone(shard=see).apply({"params": params}, x, t, y, capture_intermediates=True)
    jax.effects_barrier()
    inside = {
        name: state["intermediates"][name]["__call__"][0]
        for name in ("x_embedder", "t_embedder", "y_embedder")
    }
    inside |= {"final_layer": state["intermediates"]["final_layer"]["__call__"][0]}
    names = {
        "x_embedder": "patch_embed",
        "t_embedder": "t_embed",
        "y_embedder": "y_embed",
        "final_layer": "final_layer",
    }
    for ours, theirs in names.items():
        want = arrays[case["out"][theirs]]
        assert relative_error(inside[ours].reshape(want.shape), want) < FLOAT32, theirs
    for i in range(3):
        assert relative_error(seen[-3 + i], arrays[case["out"][f"block{i}"]]) < FLOAT32, i


def test_fresh_weights_follow_the_reference():
    wanted = goldens.load("model")[0]["fresh_init"]
    model = goldens.model(True)
    x, one = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1)
    params = model.init(jax.random.key(0), x, one, one.astype(int))["params"]
    flat = {
        jax.tree_util.keystr(k, simple=True, separator="/"): v
        for k, v in jax.tree_util.tree_leaves_with_path(params)
    }
    assert {path for path, _ in TABLE.values()} == set(flat)
    for name, (path, _) in TABLE.items():
        want, value = (
            wanted[name.replace(".N.", ".0.")],
            flat[path][0] if ".N." in name else flat[path],
        )
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


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    model, params = goldens.bare()
    x, t, y = (
        jax.random.normal(jax.random.key(0), (2, 8, 8, 4)),
        jnp.array([0.2, 0.7]),
        jnp.array([1, 10]),
    )

    def gradient(model):
        return jax.jit(jax.grad(lambda p: (model.apply({"params": p}, x, t, y) ** 2).sum()))(params)

    for a, b in zip(
        *map(jax.tree.leaves, (gradient(model), gradient(model.clone(remat=remat)))), strict=True
    ):
        assert np.abs(a - b).max() <= 1e-5 * max(
            np.abs(a).max(), 1e-3
        )  # recomputed sums may be ordered otherwise


def test_bfloat16_keeps_parameters_and_output_in_float32():
    model, params = goldens.bare()
    x, t, y = (
        jax.random.normal(jax.random.key(0), (2, 8, 8, 4)),
        jnp.array([0.2, 0.7]),
        jnp.array([1, 10]),
    )
    out = model.clone(dtype=jnp.bfloat16).apply({"params": params}, x, t, y)
    exact = model.apply({"params": params}, x, t, y)
    assert out.dtype == jnp.float32
    assert 1e-5 < relative_error(out, exact) < 0.05  # eight bits of mantissa, through three layers


def test_compile_size_does_not_grow_with_depth():
    def text(depth):
        model = SiT(Size(depth, 16, 2, 4), 8, 1, classes=3)
        x, t = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)
        params = jax.eval_shape(model.init, jax.random.key(0), x, t, t.astype(int))
        return jax.jit(model.apply).lower(params, x, t, t.astype(int)).as_text()

    assert len(text(24)) < 1.02 * len(text(2))


def test_label_dropout_is_a_function_of_its_key():
    labels = jnp.arange(10_000) % 10
    dropped = drop_labels(jax.random.key(1), labels, 0.1, null_label=10)
    np.testing.assert_array_equal(
        dropped, drop_labels(jax.random.key(1), labels, 0.1, null_label=10)
    )
    assert ((dropped == labels) | (dropped == 10)).all()
    assert abs((dropped == 10).mean() - 0.1) < 4 * np.sqrt(0.09 / 10_000)
    np.testing.assert_array_equal(drop_labels(jax.random.key(1), labels, 0.0, 10), labels)
    assert (drop_labels(jax.random.key(1), labels, 1.0, 10) == 10).all()


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
    x, t, y = (
        jax.random.normal(jax.random.key(0), (2, 8, 8, 4)),
        jnp.array([0.2, 0.7]),
        jnp.array([1, 10]),
    )
    params = model.init(jax.random.key(1), x, t, y)["params"]
    extra = {name: params["blocks"]["attn"].pop(name) for name in ("q_norm", "k_norm")}
    assert {name: scale["scale"].shape for name, scale in extra.items()} == {
        "q_norm": (3, 12),
        "k_norm": (3, 12),
    }

    def output(factor):  # the size of queries and keys no longer matters
        params = jax.tree.map(jnp.asarray, goldens.params("sit_bare.pt", None))
        attention = params["blocks"]["attn"]
        attention["qkv"] = jax.tree.map(
            lambda w: w.at[..., :2, :, :].multiply(factor), attention["qkv"]
        )
        attention |= extra
        return model.apply({"params": params}, x, t, y)

    np.testing.assert_allclose(
        output(100.0), output(1.0), rtol=0, atol=2e-3
    )  # but for the norm's epsilon
