"""sharding: every matrix has a rule, and training gives the same losses on every mesh."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sit_jax import sharding
from sit_jax.errors import UserError
from tests import goldens
from tests.processes import run_python


def train_on_meshes(devices: int) -> dict:
    return json.loads(run_python("tests/train_on_meshes.py", devices=devices).splitlines()[-1])


@pytest.fixture(scope="module")
def runs():
    return train_on_meshes(1) | train_on_meshes(8)


@pytest.mark.parametrize("mesh", ["data", "fsdp", "all three", "accumulated"])
def test_eight_devices_train_and_sample_as_one(runs, mesh):
    one = runs["single"]
    eight = runs[mesh]
    # float32 sums in another order.
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)
    assert one["losses"][-1] < one["losses"][0]
    # After six steps the weights differ by rounding; that may flip an image's last bit.
    np.testing.assert_allclose(eight["log_prob"], one["log_prob"], rtol=1e-4)
    difference = np.abs(np.subtract(eight["images"], one["images"]))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def test_moments_are_created_sharded(runs):
    layers, width, hidden = runs["data"]["global"]
    assert runs["data"]["shard"] == [layers, width, hidden]
    assert runs["fsdp"]["shard"] == [layers, width // 8, hidden]
    assert runs["all three"]["shard"] == [layers, width // 2, hidden // 2]


class Mesh8:
    """A stand-in for a mesh: spec() reads only its shape."""

    shape = {"data": 2, "fsdp": 2, "tensor": 2}


def test_every_matrix_has_a_rule():
    """Every matrix is split over fsdp; only small arrays are not."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(goldens.params("sit_bare.pt", None)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = sharding.spec(f"opt_state/0/mu/{name}", leaf.shape, Mesh8)
        if name.endswith(("kernel", "embedding")):
            assert "fsdp" in spec, name


def test_layers_have_the_expected_specs():
    assert sharding.spec("params/blocks/attn/qkv/kernel", (3, 48, 3, 4, 12), Mesh8) == P(
        None, "fsdp", None, "tensor", None
    )
    assert sharding.spec("params/final_layer/adaLN_modulation/kernel", (48, 96), Mesh8) == P(
        "fsdp", None
    )
    assert sharding.spec("opt_state/0/count", (), Mesh8) == P()


def test_a_dimension_that_its_axis_does_not_divide_is_not_split():
    assert sharding.spec("params/blocks/mlp/fc1/kernel", (3, 47, 188), Mesh8) == P(
        None, None, "tensor"
    )


def test_bad_mesh_sizes_are_refused():
    with pytest.raises(UserError, match="mesh.fsdp is 0; expected 1 or more, or -1"):
        sharding.check_axes(1, 0, 1)
    with pytest.raises(UserError, match="more than one -1"):
        sharding.check_axes(-1, -1, 1)
    with pytest.raises(UserError, match="does not use 1 devices; their product must be 1"):
        sharding.make_mesh(3, 1, 1)
