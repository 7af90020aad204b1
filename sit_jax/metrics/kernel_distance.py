"""The kernel distance (KID). Binkowski et al., arXiv 1801.01401, section 3.

Suffixes: n images of a subset, d features.
"""

import numpy as np

from sit_jax.errors import check
from sit_jax.metrics.checks import check_features, check_same_width


def kernel_distance(
    fake_nd: np.ndarray,
    real_nd: np.ndarray,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Return mean and standard deviation, over random subsets, of the unbiased MMD^2.

    Subsets are drawn as torch-fidelity draws them, so its default seed gives its number. Raises
    UserError if a set has fewer rows than a subset, or a row is not finite.
    """
    for name, rows in (("samples", fake_nd), ("real images", real_nd)):
        check_features(rows, what=f"features of the {name}")
        check(
            2 <= size <= len(rows),
            f"subsets of {size} from {len(rows)} {name}; expected 2 to {len(rows)}",
        )
    check_same_width(fake_nd, real_nd)
    check(subsets >= 1, f"{subsets} subsets; expected 1 or more")
    draw = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        fake_rows = draw.choice(len(fake_nd), size, replace=False)
        real_rows = draw.choice(len(real_nd), size, replace=False)
        distances.append(_mmd2(fake_nd[fake_rows], real_nd[real_rows]))
    return float(np.mean(distances)), float(np.std(distances))


def _mmd2(x_nd: np.ndarray, y_nd: np.ndarray) -> float:
    """Return the unbiased estimate of MMD^2 from two sets of the same size n."""
    x_nd, y_nd = np.asarray(x_nd, np.float64), np.asarray(y_nd, np.float64)
    n = len(x_nd)
    within = sum(
        kernel_nn.sum() - np.trace(kernel_nn)
        for kernel_nn in (_kernel(x_nd, x_nd), _kernel(y_nd, y_nd))
    )
    return float(within / (n * (n - 1)) - 2 * _kernel(x_nd, y_nd).mean())


def _kernel(x_nd: np.ndarray, y_nd: np.ndarray) -> np.ndarray:
    kernel_nn = x_nd @ y_nd.T / x_nd.shape[1] + 1
    return kernel_nn * kernel_nn * kernel_nn  # ** 3 takes ten times as long
