"""DINOv2's class token against a plain PyTorch ViT with the same random weights.

dinov2.npz holds what tests/torch_dinov2.py gave for a small network; made by
`python tests/metrics/test_dinov2.py`, which needs PyTorch.
"""

import pathlib
import sys
import zlib

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from convert import dinov2 as converter
from sit_jax.errors import UserError
from sit_jax.metrics import dinov2, resize
from sit_jax.metrics.dinov2 import Architecture
from sit_jax.metrics.features import EXTRACTORS
from tests import checkpoints, goldens

SMALL = Architecture(width=48, depth=3, heads=4)
GOLDEN = pathlib.Path(__file__).with_name("dinov2.npz")


def tensors(architecture):
    """Return random weights in the published format, which leave no part without effect."""

    def draw(name, shape):
        g = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
        array = g.standard_normal(shape, np.float32)
        if name.endswith(".gamma") or "norm" in name and name.endswith(".weight"):
            return 1 + 0.1 * array
        if name.endswith(".weight"):
            return array / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
        return 0.3 * array

    return {name: draw(name, shape) for name, shape in dinov2.file_shapes(architecture).items()}


def images(n=2):
    return np.random.default_rng(0).integers(0, 256, (n, 60, 45, 3), np.uint8)


def as_input(images_bhwc):
    """Return what dgm-eval gives to the network, by Pillow."""
    resized = [Image.fromarray(image).resize((224, 224), Image.BICUBIC) for image in images_bhwc]
    return (np.stack(resized) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]


def by_torch(architecture, weights, images_bhwc):
    """Return (features, interpolated position embedding) of the network in PyTorch."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from tests import torch_dinov2

    a = architecture
    net = torch_dinov2.ViT(a.width, a.depth, a.heads, a.patch, a.grid).eval()
    net.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    x_bchw = torch.from_numpy(as_input(images_bhwc).transpose(0, 3, 1, 2).astype(np.float32))
    with torch.inference_mode():
        return net(x_bchw).numpy(), net.position(224 // a.patch)[0].numpy()


def ours(architecture, weights, images_bhwc):
    params = dinov2.params_from_file(weights, architecture)
    apply = jax.jit(lambda params, x: dinov2.features(params, dinov2.prepare(x), architecture))
    return apply(params, images_bhwc)["pool"], params["pos_embed"]


def test_a_small_network_gives_the_stored_features():
    got, position = ours(SMALL, tensors(SMALL), images())
    with np.load(GOLDEN) as golden:
        assert goldens.relative_error(position, golden["position"]) < 1e-5
        assert goldens.relative_error(got, golden["features"]) < 1e-5
        # The two images are not alike, so the comparison has something to compare.
        assert np.abs(np.diff(golden["features"], axis=0)).max() > 0.1


@pytest.mark.torch
def test_the_stored_features_are_those_of_pytorch():
    features, position = by_torch(SMALL, tensors(SMALL), images())
    with np.load(GOLDEN) as golden:
        assert goldens.relative_error(golden["features"], features) < 1e-5
        assert goldens.relative_error(golden["position"], position) < 1e-5


@pytest.mark.torch
@pytest.mark.slow
def test_the_published_size_gives_pytorchs_features(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    weights = tensors(dinov2.VIT_L)
    want, _ = by_torch(dinov2.VIT_L, weights, images())
    path = tmp_path / "x.safetensors"
    save_file(weights, path)
    extractor = EXTRACTORS["dinov2"]
    got = jax.jit(extractor.apply)(extractor.load(str(path)), images())
    assert got["pool"].shape == (2, extractor.widths["pool"])
    assert goldens.relative_error(got["pool"], want) < 1e-4


@pytest.mark.parametrize(
    "size", [(224, 224), (256, 256), (64, 64), (512, 512), (333, 500), (3, 400)]
)
def test_images_are_resized_as_pillow_does(size):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    want = np.asarray(Image.fromarray(image).resize((224, 224), Image.BICUBIC), np.float32)
    got = np.asarray(resize.resize_as_uint8(image[None], 224, resize.pillow_bicubic))[0]
    # Pillow's weights have 22 bits, so it rounds a few values that lie halfway the other way.
    assert np.abs(got - want).max() <= 1 and (got != want).mean() < 1e-3


def test_the_input_has_imagenets_mean_and_deviation():
    x_bhwc = images(1)
    got = dinov2.prepare(x_bhwc)
    assert np.abs(np.asarray(got) - as_input(x_bhwc)).max() < 1.001 / 255 / 0.224


def test_the_shapes_are_those_of_the_published_file():
    shapes = dinov2.file_shapes()
    # The published file has these tensors as float32,, and some 330 bytes for the name of each.
    size = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert len(shapes) == 5 + 24 * 14 + 2
    assert 0 < 1_217_586_395 - size < 400 * len(shapes)
    assert shapes["pos_embed"] == (1, 37 * 37 + 1, 1024) and shapes["mask_token"] == (1, 1024)


def test_the_converter_takes_the_published_format_and_refuses_another_file(tmp_path):
    path = checkpoints.save(tmp_path / "x.pth", {"cls_token": np.zeros((1, 1, 768), np.float32)})
    out = str(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="expected 1,217,586,395 and d5383ea8..."):
        converter.main([path, out])
    with pytest.raises(UserError, match=r"pos_embed is missing, expected shape \[1, 1370, 1024\]"):
        converter.main([path, out, "--any_weights"])


if __name__ == "__main__":
    made, position_td = by_torch(SMALL, tensors(SMALL), images())
    np.savez_compressed(GOLDEN, features=made, position=position_td)
