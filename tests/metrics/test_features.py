"""Inception's features and both resizes against golden arrays of pytorch-fid and TensorFlow."""

import functools

import jax
import numpy as np
import pytest

from sit_jax.metrics import inception, resize
from sit_jax.metrics.features import EXTRACTORS, weights_digest
from tests import goldens
from tests.inception_weights import tensors
from tests.processes import run_python

EXTRACTOR = {"tf": "inception", "pytorch_fid": "inception-pytorch-fid"}
NAMES = {"pool": "pool", "spatial": "spatial_flat", "logits": "logits_unbiased"}  # ours: golden


@functools.cache
def params():
    return inception.fold(tensors())


@functools.cache
def compiled(extractor):
    return jax.jit(EXTRACTORS[extractor].apply)


def test_the_recipe_makes_the_weights_of_the_golden_arrays():
    _, arrays = goldens.load("inception")
    checks = [key for key in arrays if key.startswith("weights_check/")]
    assert len(checks) == 2
    for key in checks:
        want = arrays[key]
        got = tensors()[key.removeprefix("weights_check/")].reshape(-1)[: len(want)]
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "case", goldens.cases("inception", "features"), ids=lambda case: case["arrays"]["pool"]
)
def test_features_are_those_of_the_reference(case):
    _, arrays = goldens.load("inception")
    name = EXTRACTOR[case["preprocessing"]]
    got = compiled(name)(params(), arrays[case["images"]])
    assert {
        key: (len(arrays[case["images"]]), n) for key, n in EXTRACTORS[name].widths.items()
    } == {key: value.shape for key, value in got.items()}
    compared = {ours: theirs for ours, theirs in NAMES.items() if theirs in case["arrays"]}
    assert "pool" in compared
    for ours, theirs in compared.items():
        want = arrays[case["arrays"][theirs]]
        assert goldens.relative_error(got[ours], want) < 1e-5, ours


@pytest.mark.parametrize(
    "case", goldens.cases("inception", "resize"), ids=lambda case: case["images"].split("/")[0]
)
def test_images_are_resized_as_both_libraries_do(case):
    _, arrays = goldens.load("inception")
    images = arrays[case["images"]]
    rules = {"tf": resize.tf1_bilinear, "pytorch_fid": resize.half_pixel_bilinear}
    for kind in rules.keys() & case.keys():
        rows, columns = case.get(f"{kind}_stride", case["stride"])
        got = resize.resize(images, 299, rules[kind])[:, ::rows, ::columns]
        want = goldens.nhwc(arrays[case[kind]])
        assert goldens.relative_error(got, want) < 1e-6, kind


def test_a_grey_image_counts_as_three_equal_channels():
    _, arrays = goldens.load("inception")
    grey = arrays["small/images_nhwc"][..., :1]
    apply = EXTRACTORS["inception"].apply
    one, three = (
        jax.eval_shape(apply, params(), image) for image in (grey, np.repeat(grey, 3, axis=-1))
    )
    assert one == three
    got = compiled("inception")(params(), grey)["pool"]
    want = compiled("inception")(params(), np.repeat(grey, 3, axis=-1))["pool"]
    assert goldens.relative_error(got, want) < 1e-6


def test_the_digest_tells_weights_apart():
    tree = {"a": np.zeros(3, np.float32), "b": {"c": np.ones(2, np.float32)}}
    digest = weights_digest(tree)
    assert len(digest) == 16 and int(digest, 16) >= 0
    assert weights_digest(jax.tree.map(np.copy, tree)) == digest
    others = [
        {"a": tree["a"], "b": {"d": tree["b"]["c"]}},
        {"a": tree["a"] + np.float32(1e-7), "b": tree["b"]},
        {"a": tree["a"].reshape(3, 1), "b": tree["b"]},
    ]
    assert len({digest, *map(weights_digest, others)}) == 4


def test_devices_work_on_their_own_images_without_talking_to_each_other():
    """Compile for a batch over 4 devices."""
    script = """
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from sit_jax.metrics import dinov2, inception
from sit_jax.metrics.features import EXTRACTORS

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
each, all_of_it = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
images = jax.ShapeDtypeStruct((8, 64, 64, 3), np.uint8, sharding=each)
networks = {"inception": (inception.Inception(), 299), "dinov2": (dinov2.ViT(dinov2.VIT_L), 224)}
for name, (network, side) in networks.items():
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, side, side, 3)))["params"]
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=all_of_it), shapes
    )
    program = jax.jit(EXTRACTORS[name].apply).lower(params, images).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program.as_text(), (name, collective)
    for sharding in jax.tree.leaves(program.output_shardings):
        assert sharding.spec[0] == "data", (name, sharding)
    print(name)
"""
    assert run_python("-c", script, devices=4).split() == ["inception", "dinov2"]
