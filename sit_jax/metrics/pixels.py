"""The quality of small images from their pixels: principal components, and a classifier.

They are cheap and can compare samplers on one data set. On photographs they do not predict
Inception features.
"""

from typing import Any

import numpy as np

from sit_jax.errors import check

# Larger images are averaged down to about this side: pixels can compare only their coarse look.
_SIDE = 16
_FOLDS = 5  # of cross-validation


def as_features(images_bhwc: np.ndarray) -> np.ndarray:
    """Flatten uint8 images [n, h, w, c] to float64 features [n, d] in [0, 1].

    An image whose shorter side is 32 or more is averaged over square blocks, to a shorter side of
    16 to 23. Pixels beyond the last complete block are cut off.
    """
    n, h, w, c = images_bhwc.shape
    block = max(1, min(h, w) // _SIDE)
    rows = h // block
    columns = w // block
    tiled = images_bhwc[:, : rows * block, : columns * block]
    blocks = tiled.reshape(n, rows, block, columns, block, c)
    return blocks.mean(axis=(2, 4)).reshape(n, rows * columns * c) / 255.0


def fit_components(features_nd: np.ndarray, components: int) -> Any:
    """Fit scikit-learn's PCA to real features.

    Its `transform` keeps `components` directions, or as many as the data has.
    """
    from sklearn.decomposition import PCA

    return PCA(min(components, *features_nd.shape), svd_solver="full").fit(features_nd)


def fit_classifier(features_nd: np.ndarray, labels_n: np.ndarray) -> Any:
    """Fit scikit-learn's SVC to real images; its `predict` names the class of a sample.

    If there is only one class, it always names that one.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.svm import SVC

    one_class = (labels_n == labels_n[0]).all()
    classifier = DummyClassifier() if one_class else SVC(gamma="scale")
    return classifier.fit(features_nd, labels_n)


def cross_validated_accuracy(features_nd: np.ndarray, labels_n: np.ndarray) -> float:
    """Return the accuracy of `fit_classifier` on real images that it was not fitted to.

    It is the mean over five folds. Raises `UserError` if a class has fewer than five images, or if
    there is only one.
    """
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    _, counts = np.unique(labels_n, return_counts=True)
    check(
        len(counts) > 1,
        "the real images are of one class, so a classifier reads every sample as that one; compare "
        "samples with --mode sweep",
    )
    check(
        counts.min() >= _FOLDS,
        f"a class has {counts.min()} images; expected {_FOLDS} or more, for cross-validation",
    )
    return float(cross_val_score(SVC(gamma="scale"), features_nd, labels_n, cv=_FOLDS).mean())
