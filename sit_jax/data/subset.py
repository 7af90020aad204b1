"""The order in which a part of a data set is drawn, so that the part is a sample of the whole."""

import numpy as np


def uniform_order(count: int, seed: int) -> np.ndarray:
    """Return the indices of `count` images in random order, which depends only on the seed."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(count)


def draw_order(labels_n: np.ndarray, seed: int) -> np.ndarray:
    """Return all indices [n] in an order of which every prefix is a stratified random draw.

    The first m hold m n_c / n images of a class of n_c, within about 1, and a longer prefix keeps
    what a shorter one holds. It depends only on the labels, int [n] from 0, and on the seed.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    shuffled = np.lexsort((random.random(len(labels_n)), labels_n))  # class by class
    sorted_labels = labels_n[shuffled]
    sizes = np.bincount(labels_n)
    starts = np.cumsum(sizes) - sizes
    # The j-th image of a class of size n_c has the key (j + u_c) / n_c, so that the keys of each
    # class are spread evenly over [0, 1). A u_c of its own in [0, 1) leaves to chance which
    # classes come first.
    places = np.arange(len(labels_n)) - starts[sorted_labels]
    offsets = random.random(len(sizes))
    keys = (places + offsets[sorted_labels]) / sizes[sorted_labels]
    return shuffled[np.lexsort((shuffled, keys))]
