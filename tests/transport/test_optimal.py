"""The best prediction for a finite data set, against posteriors summed in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.errors import UserError
from sit_jax.transport import losses, optimal, paths, prediction, times
from sit_jax.transport.interval import train_interval
from sit_jax.transport.optimal import PADDING, Points, Query
from sit_jax.transport.paths import interpolate

each_path = pytest.mark.parametrize("path", paths.PATHS.values(), ids=lambda p: p.name)
each_prediction = pytest.mark.parametrize("kind", prediction.PREDICTIONS)
NULL = 3


def make_points(std=False, n=40, d=2):
    """Return points of the classes 0 to 2 with some rows of padding, which count for nothing."""
    random = np.random.default_rng(0)
    label = np.arange(n, dtype=np.int32) % 3
    label[[5, 17]] = PADDING
    mean = random.normal(size=(n, d)).astype(np.float32) + label[:, None] / 2
    mean[[5, 17]] = 1e3
    std_nd = random.uniform(0.0, 0.3, (n, d)).astype(np.float32) if std else None
    if std:
        std_nd[0] = 0
    return Points(mean, std_nd, label)


def coefficients(path, t):
    """Return alpha, alpha', sigma, sigma' at t as float64."""
    functions = (path.alpha, path.d_alpha, path.sigma, path.d_sigma)
    return [float(f(jnp.float32(t))) for f in functions]


def brute_force(path, kind, points, x, t, label):
    """Return the optimal output at one x by Bayes' rule in float64, point by point."""
    alpha, d_alpha, sigma, d_sigma = coefficients(path, t)
    logs, data, noise = [], [], []
    for i in range(len(points.label_n)):
        if points.label_n[i] == PADDING or label not in (NULL, points.label_n[i]):
            continue
        mean = points.mean_nd[i].astype(np.float64)
        variance = np.zeros(2) if points.std_nd is None else points.std_nd[i].astype(float) ** 2
        total = alpha**2 * variance + sigma**2
        gap = x - alpha * mean
        logs.append(-0.5 * np.sum(gap**2 / total + np.log(total)))
        data.append(mean + alpha * variance / total * gap)
        noise.append(sigma / total * gap)
    weights = np.exp(np.array(logs) - max(logs))
    weights /= weights.sum()
    x1, x0 = weights @ data, weights @ noise
    return {"velocity": d_alpha * x1 + d_sigma * x0, "noise": x0, "score": -x0 / sigma}[kind]


@each_path
@each_prediction
@pytest.mark.parametrize("std", [False, True], ids=["points", "gaussians"])
def test_the_field_is_the_posterior_mean(path, kind, std):
    points = make_points(std)
    random = np.random.default_rng(1)
    label = np.array([0, 1, 2, NULL] * 8, np.int32)
    t = random.uniform(0.02, 0.97, len(label)).astype(np.float32)
    x = random.normal(size=(len(label), 2)).astype(np.float32)
    found = optimal.optimal_predict(path, kind, points, label, NULL)(x, t)
    expected = [brute_force(path, kind, points, *row) for row in zip(x, t, label, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=3e-4, atol=3e-4)


def test_the_posterior_of_a_mixture_integrated_on_a_grid():
    """E[x1 | x] of a 1-d mixture of Gaussians, as an integral over x1 rather than a sum."""
    points = Points(
        np.array([[-1.0], [0.5], [2.0]], np.float32),
        np.array([[0.2], [0.1], [0.4]], np.float32),
        np.zeros(3, np.int32),
    )
    x1 = np.linspace(-6, 7, 200_001)
    density = sum(
        np.exp(-((x1 - m) ** 2) / (2 * s**2)) / s
        for m, s in zip(points.mean_nd[:, 0], points.std_nd[:, 0], strict=True)
    )
    path = paths.PATHS["Linear"]
    for t, x in ((0.1, 0.3), (0.5, 0.7), (0.9, 1.3)):
        likelihood = np.exp(-((x - t * x1) ** 2) / (2 * (1 - t) ** 2))
        mean = (x1 * density * likelihood).sum() / (density * likelihood).sum()
        predict = optimal.optimal_predict(path, "velocity", points, jnp.zeros(1, jnp.int32), NULL)
        velocity = predict(jnp.array([[x]]), jnp.array([t]))[0, 0]
        assert velocity == pytest.approx((mean - x) / (1 - t), rel=1e-4)  # the formula


@pytest.mark.parametrize("std", [False, True], ids=["points", "gaussians"])
def test_blocks_and_their_order_change_nothing(std, monkeypatch):
    path = paths.PATHS["GVP"]
    points = make_points(std)
    query = make_query(path, points, 30)
    whole = optimal.add_points(path, NULL, query, optimal.no_points(query), points)
    for elements in (1, 30 * 2 * 7):  # one point at a time; 7, and then the rest
        monkeypatch.setattr(optimal, "_ELEMENTS", elements)
        sums = optimal.no_points(query)
        for rows in (slice(25, 40), slice(0, 3), slice(3, 25)):
            block = jax.tree.map(lambda x, rows=rows: x[rows], points)
            sums = optimal.add_points(path, NULL, query, sums, block)
        for a, b in zip(
            optimal.finish(path, query, sums), optimal.finish(path, query, whole), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_label_without_points_is_not_a_number():
    path = paths.PATHS["Linear"]
    points = make_points()
    predict = optimal.optimal_predict(path, "noise", points, jnp.array([7, 0]), NULL)
    output = predict(jnp.ones((2, 2)), jnp.array([0.5, 0.5]))
    assert np.isnan(output[0]).all() and np.isfinite(output[1]).all()


def make_query(path, points, n, t=None, seed=2):
    """Draw data from the points, noise and times."""
    keys = jax.random.split(jax.random.key(seed), 4)
    rows = np.random.default_rng(seed).choice(np.flatnonzero(points.label_n >= 0), n)
    x1 = jnp.asarray(points.mean_nd[rows])
    if points.std_nd is not None:
        x1 += points.std_nd[rows] * jax.random.normal(keys[0], x1.shape)
    x0 = jax.random.normal(keys[1], x1.shape)
    interval = train_interval(path, "noise")
    t_b = times.training_times(keys[2], n, interval) if t is None else jnp.full(n, t)
    return Query(x1, x0, t_b, jnp.asarray(points.label_n[rows]))


def loss_of(path, kind, query, output):
    return losses.losses(
        lambda x, t: output, path, kind, "none", query.data_bd, query.noise_bd, query.t_b
    )


@each_path
@each_prediction
@pytest.mark.parametrize("std", [False, True], ids=["points", "gaussians"])
def test_nothing_beats_the_optimum(path, kind, std):
    """Its loss is lower than that of its own output moved by a function of x and t."""
    n = 5_000
    points = make_points(std)
    query = make_query(path, points, n)
    sums = optimal.add_points(path, NULL, query, optimal.no_points(query), points)
    means = optimal.finish(path, query, sums)
    best = prediction.from_means(path, kind, *means, query.t_b)
    least = loss_of(path, kind, query, best)
    x = interpolate(path, query.data_bd, query.noise_bd, query.t_b)
    factor = 1 / path.sigma(query.t_b)[:, None] if kind == "score" else 1.0
    for move in (0.1 * x, -0.1 * x, jnp.full_like(x, 0.1), 0.1 * jnp.sign(x)):
        worse = loss_of(path, kind, query, best + factor * move) - least
        size = jnp.mean(move**2)
        # E|move|^2 exactly, if the optimum's error is uncorrelated with every function of x.
        assert worse.mean() == pytest.approx(float(size), abs=4 * float(worse.std()) / n**0.5)
    field = optimal.optimal_predict(path, kind, points, query.label_b, NULL)(x, query.t_b)
    middle = (query.t_b > 0.02) & (query.t_b < 0.95)  # without rounding of x near the ends
    np.testing.assert_allclose(field[middle], best[middle], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("std", [False, True], ids=["points", "gaussians"])
def test_nothing_cancels_next_to_the_data(std):
    """At 1 - t = 2^-20, x in float32 has lost the noise, but data and noise are known here."""
    path = paths.PATHS["Linear"]
    points = make_points(std)
    query = make_query(path, points, 200, t=1 - 2**-20)
    sums = optimal.add_points(path, NULL, query, optimal.no_points(query), points)
    data, noise = optimal.finish(path, query, sums)
    assert np.isfinite(noise).all()
    np.testing.assert_allclose(data, query.data_bd, atol=5e-6)
    if not std:  # every point is far from all others, in units of sigma: the loss is 0
        np.testing.assert_allclose(noise, query.noise_bd, atol=1e-6)
        velocity = prediction.from_means(path, "velocity", data, noise, query.t_b)
        assert loss_of(path, "velocity", query, velocity).max() < 1e-11


@each_path
@each_prediction
def test_an_affine_map_is_best_for_a_gaussian(path, kind):
    """The closed form equals the loss of the exact posterior mean of one Gaussian, by Monte Carlo.

    Times near the ends are left out, where the variance of a draw is large.
    """
    std = np.array([0.1, 1.0, 0.5, 0.0], np.float32)
    points = Points(np.full((1, 4), 0.3, np.float32), std[None], np.zeros(1, np.int32))
    n = 50_000
    for t in (0.1, 0.5, 0.9):
        query = make_query(path, points, n, t)
        sums = optimal.add_points(path, NULL, query, optimal.no_points(query), points)
        output = prediction.from_means(path, kind, *optimal.finish(path, query, sums), query.t_b)
        least = loss_of(path, kind, query, output)
        closed = optimal.affine_losses(path, kind, "none", jnp.asarray(std**2), jnp.full(1, t))[0]
        assert least.mean() == pytest.approx(float(closed), abs=4 * float(least.std()) / n**0.5)
        mean_square = float(np.mean(0.3**2 + std**2))
        zero = loss_of(path, kind, query, jnp.zeros_like(query.data_bd))
        closed = optimal.zero_losses(path, kind, "none", mean_square, jnp.full(1, t))[0]
        assert zero.mean() == pytest.approx(float(closed), abs=4 * float(zero.std()) / n**0.5)


def test_the_affine_loss_of_a_gaussian_over_all_times_is_pi_half_times_the_mean_root():
    eigenvalues = np.array([0.0, 1e-3, 0.25, 2.0], np.float32)
    t = (jnp.arange(100_000) + 0.5) / 100_000
    path = paths.PATHS["Linear"]
    mean = optimal.affine_losses(path, "velocity", "none", jnp.asarray(eigenvalues), t).mean()
    assert mean == pytest.approx(np.pi / 2 * np.sqrt(eigenvalues).mean(), rel=1e-3)


@pytest.mark.parametrize("weight", ["velocity", "likelihood"])
def test_closed_forms_have_the_weight_of_the_loss(weight):
    path = paths.PATHS["VP"]
    t = jnp.array([0.2, 0.7])
    factor = losses.WEIGHTS[weight](path, t)
    values = jnp.array([0.5, 2.0])
    for function, argument in ((optimal.affine_losses, values), (optimal.zero_losses, 1.5)):
        weighted = function(path, "noise", weight, argument, t)
        plain = function(path, "noise", "none", argument, t)
        np.testing.assert_allclose(weighted, factor * plain, rtol=1e-6)


@pytest.mark.parametrize("distribution", times.DISTRIBUTIONS)
def test_quantiles_are_those_of_the_training_times(distribution):
    options = ((0.1, 0.9), distribution, 0.4, 0.7)
    drawn = times.training_times(jax.random.key(0), 100_000, *options)
    u = jnp.array([0.1, 0.5, 0.9])
    t = times.quantiles(options[0], u, *options[1:])
    shares = [(drawn < limit).mean() for limit in t]
    np.testing.assert_allclose(shares, u, atol=4 * 0.5 / 100_000**0.5)
    ends = times.quantiles(options[0], jnp.array([0.0, 1.0]), *options[1:])
    np.testing.assert_allclose(ends, options[0], rtol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda path: optimal.optimal_predict(path, "eps", make_points(), jnp.zeros(1), NULL),
        lambda path: optimal.affine_losses(path, "eps", "none", jnp.ones(2), jnp.ones(1)),
        lambda path: optimal.zero_losses(path, "eps", "none", 1.0, jnp.ones(1)),
        lambda path: prediction.from_means(path, "eps", *jnp.ones((2, 1, 1)), jnp.ones(1)),
        lambda path: times.quantiles((0.0, 1.0), jnp.ones(1), "eps"),
    ],
)
def test_unknown_names(call):
    with pytest.raises(UserError, match="'eps'"):
        call(paths.PATHS["Linear"])
