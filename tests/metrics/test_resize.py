"""Laws of the resizes; golden arrays of TensorFlow's and PyTorch's are in test_features.py."""

import numpy as np
import pytest

from sit_jax.metrics import resize

RULES = [resize.tf1_bilinear, resize.half_pixel_bilinear, resize.pillow_bicubic]
SIZES = [(1, 299), (2, 299), (37, 299), (256, 299), (299, 299), (300, 299), (512, 224), (1024, 224)]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


@each_rule
@pytest.mark.parametrize("size", SIZES)
def test_a_constant_stays_as_it_is(rule, size):
    weights_oi = rule(*size)
    assert weights_oi.shape == size[::-1] and weights_oi.dtype == np.float32
    np.testing.assert_allclose(weights_oi.sum(axis=1), 1, rtol=1e-6)


@each_rule
def test_the_same_size_is_the_identity(rule):
    np.testing.assert_allclose(rule(299, 299), np.eye(299), rtol=0, atol=1e-7)


@each_rule
@pytest.mark.parametrize("size", [(64, 299), (512, 299)])
def test_a_ramp_is_sampled_where_the_rule_says(rule, size):
    """Inside the image a linear function of the place is reproduced, to 0.03 pixels."""
    inputs, outputs = size
    got = rule(inputs, outputs) @ np.arange(inputs)
    shift = 0 if rule is resize.tf1_bilinear else 0.5
    want = (np.arange(outputs) + shift) * inputs / outputs - shift
    inside = slice(outputs // 10, -outputs // 10)
    # Pillow's weights of a smaller image are linear only in the mean.
    np.testing.assert_allclose(got[inside], want[inside], rtol=0, atol=0.03)


def test_rows_and_columns_are_not_exchanged():
    image = np.zeros((1, 5, 9, 1), np.uint8)
    image[0, 1, 7] = 200
    got = np.asarray(resize.resize(image, 45, resize.half_pixel_bilinear))[0, ..., 0]
    row, column = np.unravel_index(got.argmax(), got.shape)
    assert (row // 9, column // 5) == (1, 7)


@pytest.mark.torch
@pytest.mark.parametrize("size", SIZES)
def test_half_pixel_bilinear_is_pytorchs(size):
    torch = pytest.importorskip("torch")
    inputs, outputs = size
    line_11i = torch.from_numpy(np.random.default_rng(0).random((1, 1, inputs), np.float32))
    want = torch.nn.functional.interpolate(line_11i, outputs, mode="linear", align_corners=False)
    got = resize.half_pixel_bilinear(inputs, outputs) @ line_11i[0, 0].numpy()
    np.testing.assert_allclose(got, want[0, 0].numpy(), rtol=0, atol=1e-6)
