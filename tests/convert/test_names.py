"""The name table covers every tensor once, both ways, for any size; others are refused."""

import jax
import numpy as np
import pytest

from convert.names import POSITION, TABLE, params_from_torch, params_to_torch
from convert.torch_file import read_torch_file
from sit_jax.errors import UserError, check_tensors
from sit_jax.models.sizes import SIZES, Size
from tests import checkpoints, goldens


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_the_table_covers_every_tensor_once(learn_sigma):
    model = goldens.model(learn_sigma)
    x, one = np.zeros((1, 8, 8, 4), np.float32), np.zeros((1,), np.float32)
    tree = jax.eval_shape(
        lambda: model.init(jax.random.key(0), x, one, one.astype(np.int32))["params"]
    )
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    ours = sorted(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    assert sorted(path for path, _ in TABLE.values()) == ours


def test_the_order_is_the_order_of_torchs_parameters():
    manifest = goldens.load("model")[0]
    want = manifest["train_ckpt"]["opt_param_names"]
    content = read_torch_file(str(goldens.FOLDER / "sit_train_ckpt.pt"))
    names = [
        name
        for name, _ in params_to_torch(
            params_from_torch(content["ema"], goldens.SIZE), goldens.SIZE
        )
    ]
    assert names == want == list(content["ema"]) and names[0] == POSITION


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("learn_sigma", "classes", "channels"), [(False, 1, 3), (True, 1000, 4)])
def test_from_to_from_is_the_identity_bitwise(name, learn_sigma, classes, channels):
    real = SIZES[name]
    size = Size(depth=2, width=4 * real.heads, heads=real.heads, patch=real.patch)
    network = {
        "side": 2 * real.patch,
        "channels": channels,
        "classes": classes,
        "learn_sigma": learn_sigma,
    }
    before = checkpoints.state_dict(0, size, **network)
    # The conversion also keeps the payload of a NaN.
    before["pos_embed"].view(np.uint32)[...] = 0x7FC12345
    tree = params_from_torch(before, size)
    after = dict(params_to_torch(tree, size))
    assert list(after) == list(before)
    for tensor in before:
        np.testing.assert_array_equal(
            after[tensor].view(np.uint32), before[tensor].view(np.uint32), err_msg=tensor
        )
    second_tree = params_from_torch(after, size)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32)),
        tree,
        second_tree,
    )


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes_have_the_published_number_of_parameters(name):
    """Compare parameter counts, in millions, with the paper's: latents of 32x32x4, 1000 classes."""
    size = SIZES[name]
    shapes = checkpoints.shapes(size, side=32, classes=1000, learn_sigma=True)
    assert shapes["x_embedder.proj.weight"] == (size.width, 4, size.patch, size.patch)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, size.width)
    assert shapes[f"blocks.{size.depth - 1}.attn.qkv.weight"] == (3 * size.width, size.width)
    assert shapes["final_layer.linear.weight"] == (8 * size.patch**2, size.width)
    assert len(shapes) == 12 + 10 * size.depth
    published = {"SiT-S/2": 32.96, "SiT-B/2": 130.51, "SiT-L/2": 458.10, "SiT-XL/2": 675.13}
    if name in published:
        assert sum(map(np.prod, shapes.values())) / 1e6 == pytest.approx(published[name], abs=0.005)


def test_tensors_that_do_not_fit_are_named_with_both_shapes():
    expected = checkpoints.shapes()
    shapes = {name: shape for name, shape in expected.items() if name != "blocks.1.mlp.fc1.bias"}
    shapes |= {"extra.weight": (3, 4), "final_layer.linear.bias": (7,)}
    with pytest.raises(UserError) as caught:
        check_tensors("ema of x.pt", shapes, expected)
    assert str(caught.value) == (
        "ema of x.pt does not fit: blocks.1.mlp.fc1.bias is missing, expected shape [64]; "
        "extra.weight of shape [3, 4] is unexpected; "
        "final_layer.linear.bias has shape [7], expected [16]"
    )
    check_tensors("ema of x.pt", expected, expected)
