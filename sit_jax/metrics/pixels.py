"""Quality of small images from their pixels alone: principal components, and a classifier of real ones.

Cheap and for comparisons on one data set; on photographs neither says what Inception features would.
"""

import numpy as np

_SIDE = 16  # larger images are averaged down to about this: their coarse look is what pixels can compare


def as_features(images_bhwc: np.ndarray) -> np.ndarray:
    """uint8 [n, h, w, c] -> float64 [n, d] in [0, 1], averaged over blocks to sides of 16 to 31 where larger."""
    n, h, w, c = images_bhwc.shape
    by = max(1, min(h, w) // _SIDE)
    blocks = images_bhwc[:, : h // by * by, : w // by * by].reshape(n, h // by, by, w // by, by, c)
    return blocks.mean(axis=(2, 4)).reshape(n, -1) / 255.0


def fit_components(features_nd: np.ndarray, components: int):
    """scikit-learn's PCA of real features, whose `transform` keeps at most so many directions."""
    from sklearn.decomposition import PCA

    return PCA(min(components, *features_nd.shape), svd_solver="full").fit(features_nd)


def fit_classifier(features_nd: np.ndarray, labels_n: np.ndarray):
    """A classifier (scikit-learn's SVC) of real images, which says by `predict` what a sample looks like."""
    from sklearn.svm import SVC

    return SVC(gamma="scale").fit(features_nd, labels_n)
