"""Measure the error of each SDE solver on a mixture of two Gaussians, whose score is known exactly.

    python tests/benchmarks/sde_solvers.py

Takes about 3 minutes on 2 cores. For every solver, diffusion form and number of evaluations (calls
of the velocity and score), prints the Wasserstein-1 distance, from quantiles, between the samples
at t=0.96 and the exact marginal there. The path is linear. All solvers get the same random draws,
which makes them comparable. The last line gives the distance of as many exact samples, which is due
to chance: differences far below it mean nothing.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

from sit_jax.sampling import sde
from sit_jax.sampling.brownian import keyed_draw
from sit_jax.transport import interval, paths, prediction

WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([-1.0, 0.8])
STDS = np.array([0.3, 0.2])
PATH = paths.PATHS["Linear"]
END = 0.96
EVALUATIONS = (10, 20, 40, 80, 250)


def score(x, t_b):
    """Return the exact score of the mixture's marginal at t."""

    def log_density(x, t):
        alpha, sigma = PATH.alpha(t), PATH.sigma(t)
        variances = alpha**2 * STDS**2 + sigma**2
        return jax.nn.logsumexp(
            jnp.log(WEIGHTS) - (x - alpha * MEANS) ** 2 / (2 * variances) - jnp.log(variances) / 2
        )

    return jax.vmap(jax.grad(log_density))(x.ravel(), t_b).reshape(x.shape)


def exact_quantiles(n: int) -> np.ndarray:
    """Return the mixture's quantiles at END, in the middle of each of n equal shares."""
    means = END * MEANS
    stds = np.sqrt(END**2 * STDS**2 + (1 - END) ** 2)
    grid = np.linspace(-4, 4, 20_001)
    shares = (np.arange(n) + 0.5) / n
    return np.interp(shares, (WEIGHTS * norm.cdf((grid[:, None] - means) / stds)).sum(axis=1), grid)


def distance(solver: str, form: str, evaluations: int, n: int, quantiles: np.ndarray) -> float:
    """Return the Wasserstein-1 distance between n samples of a solver and the exact quantiles."""
    steps = evaluations if solver == "euler-maruyama" else evaluations // 2
    keys_b = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(n))
    fields = prediction.velocity_and_score(score, PATH, "score")
    span = interval.sde_interval(PATH, "score", form, 1 - END)

    @jax.jit
    def run(x):
        options = sde.SdeOptions(solver, steps, form=form, last_step="none")
        draw = keyed_draw(keys_b, (1, 1, 1))
        return sde.solve(fields, PATH, x, span, draw, options)[0]

    x = np.asarray(run(jax.random.normal(jax.random.key(1), (n, 1, 1, 1)))).ravel()
    return float(np.abs(np.sort(x) - quantiles).mean())


def main(n: int) -> None:
    quantiles = exact_quantiles(n)
    print(f"{'form':24}{'solver':18}" + "".join(f"{evaluations:>9}" for evaluations in EVALUATIONS))
    for form in ("SBDM", "sigma", "linear", "constant"):
        for solver in sde.SOLVERS:
            distances = [
                distance(solver, form, evaluations, n, quantiles) for evaluations in EVALUATIONS
            ]
            cells = "".join(f"{value:>9.4f}" for value in distances)
            print(f"{form:24}{solver:18}{cells}", flush=True)
    # 20 sets of n exact samples of END x1 + (1 - END) x0.
    draw = np.random.default_rng(0)
    component = (draw.random((20, n)) < WEIGHTS[1]).astype(int)
    noise, x0 = draw.standard_normal((2, 20, n))
    exact = END * (MEANS[component] + STDS[component] * noise) + (1 - END) * x0
    chance = np.abs(np.sort(exact) - quantiles).mean(axis=1)
    print(f"exact samples, by chance: {chance.mean():.4f} (20 sets of {n:,})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=50_000, help="samples (default: %(default)s)")
    main(parser.parse_args().count)
