"""The Inception Score. Salimans et al., arXiv 1606.03498, eq. 4. Suffixes: n images, k classes."""

import numpy as np

from sit_jax.errors import check
from sit_jax.metrics.checks import check_features


def inception_score(logits_nk: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Return mean and standard deviation of the score over n equal parts, as torch-fidelity.

    The parts are in order: shuffle images that are sorted by class. Logits are without bias.
    Raises UserError if there are fewer images than splits, or a logit is not finite.
    """
    n = len(logits_nk)
    check(1 <= splits <= n, f"{splits} splits of {n} images; expected 1 to {n} splits")
    check_features(logits_nk, what="logits")
    borders = [part * n // splits for part in range(splits + 1)]
    scores = [
        _score(np.asarray(logits_nk[start:end], np.float64))
        for start, end in zip(borders, borders[1:], strict=False)
    ]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits_nk: np.ndarray) -> float:
    """Return exp of the mean KL divergence of p(class | image) from their mean."""
    log_p_nk = logits_nk - logits_nk.max(axis=1, keepdims=True)
    log_p_nk -= np.log(np.exp(log_p_nk).sum(axis=1, keepdims=True))
    p_nk = np.exp(log_p_nk)
    marginal_k = p_nk.mean(axis=0)
    # 0 log 0 is 0: a class whose probability underflows in every image.
    log_marginal_k = np.log(marginal_k, where=marginal_k > 0, out=np.zeros_like(marginal_k))
    divergence_n = np.sum(p_nk * (log_p_nk - log_marginal_k), axis=1)
    return float(np.exp(divergence_n.mean()))
