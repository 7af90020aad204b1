"""Pixel features with known values: block averages, principal components, and a classifier."""

import numpy as np
import pytest

from sit_jax.metrics import pixels


def test_small_images_are_their_pixels():
    images = np.array([[[[0, 51], [102, 255]]]], np.uint8)  # [n, h, w, c] = [1, 1, 2, 2]
    np.testing.assert_allclose(pixels.as_features(images), [[0.0, 0.2, 0.4, 1.0]])


@pytest.mark.parametrize(
    ("side", "features"), [(16, 16), (31, 31), (32, 16), (47, 23), (48, 16), (64, 16)]
)
def test_sides_of_32_or_more_are_averaged_down(side, features):
    assert pixels.as_features(np.zeros((2, side, side, 3), np.uint8)).shape == (2, features**2 * 3)


def test_blocks_are_averaged_within_a_channel():
    """Checkerboards of 0 and 100, and of 0 and 200, over blocks of 2 x 2."""
    board = np.indices((32, 34)).sum(0) % 2
    images = np.stack([board * 100, board * 200], axis=-1)[None].astype(np.uint8)
    features = pixels.as_features(images).reshape(16, 17, 2)
    np.testing.assert_allclose(features, np.broadcast_to([50 / 255, 100 / 255], features.shape))


def test_pixels_beyond_the_last_complete_block_are_cut_off():
    images = np.zeros((1, 33, 35, 1), np.uint8)
    images[:, 32:] = 255
    images[:, :, 34:] = 255
    features = pixels.as_features(images)
    assert features.shape == (1, 16 * 17)
    np.testing.assert_array_equal(features, 0)


def test_components_are_the_directions_of_largest_variance():
    """Points on the line mean + s (3, 4) / 5: the first component is s, and the second is 0."""
    s = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    features = np.array([1.0, 7.0]) + s[:, None] * np.array([0.6, 0.8])
    components = pixels.fit_components(features, 2)
    projected = components.transform(features)
    np.testing.assert_allclose(np.abs(projected[:, 0]), np.abs(s), atol=1e-12)
    np.testing.assert_allclose(projected[:, 1], 0, atol=1e-12)
    np.testing.assert_allclose(components.explained_variance_, [2.5, 0], atol=1e-12)


@pytest.mark.parametrize(("rows", "kept"), [(10, 3), (2, 2)])
def test_no_more_components_than_the_data_has(rows, kept):
    features = np.random.default_rng(0).normal(size=(rows, 3))
    assert pixels.fit_components(features, 64).transform(features).shape == (rows, kept)


def test_the_classifier_names_the_class_of_the_nearest_images():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    labels = np.arange(60) % 3
    features = centres[labels] + rng.normal(size=(60, 2))
    classifier = pixels.fit_classifier(features, labels)
    np.testing.assert_array_equal(classifier.predict(centres), [0, 1, 2])


def test_no_images_have_no_features():
    assert pixels.as_features(np.zeros((0, 40, 33, 3), np.uint8)).shape == (0, 20 * 16 * 3)
