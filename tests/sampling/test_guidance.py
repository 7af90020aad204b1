"""Classifier-free guidance: which channels and times, and both halves in one call or in two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.jobs import sampler
from sit_jax.jobs.setup import Setup, set_up
from sit_jax.jobs.workdir import Weights
from sit_jax.models.conditioning import ClassLabels
from sit_jax.sampling import ode
from sit_jax.sampling.guidance import in_one_call, in_two_calls, with_guidance
from sit_jax.settings import Config, Data, Model, Sample
from tests import goldens
from tests.processes import run_python

X = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
Y = np.array([3, 1, 4])


def test_guidance_leaves_later_channels_conditional():
    conditional, unconditional = (lambda x, t, v=v: jnp.full_like(x, v) for v in (2.0, 1.0))
    both = in_two_calls(conditional, unconditional)
    x, t = jnp.zeros((1, 1, 1, 4)), jnp.zeros(1)
    for channels, want in ((3, [4, 4, 4, 2]), (None, [4, 4, 4, 4])):
        guided = with_guidance(conditional, both, 3.0, channels)
        np.testing.assert_array_equal(guided(x, t)[0, 0, 0], want)
    assert with_guidance(conditional, both, 1.0) is conditional


def counted(calls):
    """Return a network that gives 2 for label 1 and 1 for label 0, and notes the rows it got."""

    def network(x, t_b, label_b):
        jax.debug.callback(lambda: calls.append(len(x)))
        return x * 0 + 1 + label_b.reshape(-1, 1, 1, 1)

    return network


@pytest.mark.parametrize("calls_of_both", [[2, 2], [4]])
def test_guidance_outside_its_interval_is_conditional_and_costs_nothing(calls_of_both):
    calls = []
    network, one, zero = counted(calls), jnp.ones(2, int), jnp.zeros(2, int)

    def conditional(x, t):
        return network(x, t, one)

    def unconditional(x, t):
        return network(x, t, zero)

    both = in_two_calls(conditional, unconditional)
    if len(calls_of_both) == 1:
        both = in_one_call(network, one, zero)
    guided = jax.jit(with_guidance(conditional, both, 3.0, interval=(0.25, 0.75)))
    x = jnp.zeros((2, 1, 1, 1))
    for times, want, cost in (
        ([0.1, 0.9], [2, 2], [2]),
        ([0.5, 0.9], [4, 2], calls_of_both),
        ([0.25, 0.75], [4, 4], calls_of_both),
    ):
        calls.clear()
        np.testing.assert_array_equal(guided(x, jnp.array(times)).ravel(), want)
        jax.effects_barrier()
        assert calls == cost


def test_one_call_pairs_each_row_of_any_condition_with_its_own_twin():
    def network(x, t_b, condition):
        return x + 10 * t_b[:, None] + condition["a"][:, None] + condition["b"]

    x, t = jnp.arange(6.0).reshape(3, 2), jnp.arange(3.0)
    condition = {"a": 100 * jnp.arange(3.0), "b": 1000 * jnp.arange(6.0).reshape(3, 2)}
    null = jax.tree.map(jnp.negative, condition)
    found = in_one_call(network, condition, null)(x, t)
    for ours, own in zip(found, (condition, null), strict=True):
        np.testing.assert_array_equal(ours, network(x, t, own))


@pytest.mark.parametrize(
    ("options", "interval"),
    [
        (ode.OdeOptions("heun", 4), (0.0, 1.0)),
        (ode.OdeOptions("dopri5", rtol=1e-2, error_norm="sample"), (0.3, 0.8)),
    ],
)
def test_one_call_gives_the_images_of_two_up_to_rounding(options, interval):
    """With adaptive steps each sample has times of its own, inside the interval or outside."""
    model, params = goldens.bare()
    null = ClassLabels(goldens.CLASSES).null_like(Y)

    def network(x, t_b, label_b):
        return model.apply({"params": params}, x, t_b, label_b)

    def conditional(x, t_b):
        return network(x, t_b, Y)

    def unconditional(x, t_b):
        return network(x, t_b, null)

    def images(both):
        guided = with_guidance(conditional, both, 4.0, 3, interval)
        return jax.jit(lambda x: ode.solve(guided, x, (0.0, 1.0), options))(X)

    (two, calls), (one, same) = map(
        images, (in_two_calls(conditional, unconditional), in_one_call(network, Y, null))
    )
    assert calls == same
    assert goldens.relative_error(one, two) < 1e-5


SHARDED = """
import re
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from sit_jax.sampling.guidance import in_one_call
from sit_jax import sharding

mesh = sharding.make_mesh(2, 4, 1)
rows = sharding.batch_sharding(mesh)

def network(x, t_b, label_b):
    x = jax.lax.with_sharding_constraint(x, rows)
    return jnp.sin(x + (t_b + label_b).reshape(-1, 1, 1, 1))

def both(x, t_b, label_b):
    return in_one_call(network, label_b, jnp.zeros_like(label_b))(x, t_b)

shapes = ((16, 4, 4, 1), (16,), (16,))
arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows) for shape in shapes]
text = jax.jit(both, out_shardings=rows).lower(*arrays).compile().as_text()
assert "sine" in text and "num_partitions=8" in text
print(re.findall("all-[a-z]+|collective-[a-z]+|reduce-scatter", text))
"""


def test_one_call_moves_nothing_between_the_devices_of_a_batch():
    assert run_python("-c", SHARDED, devices=8).split() == ["[]"]


def tiny(**sample):
    """Return the setup of a network that takes no time to compile."""
    return set_up(
        Config(
            model=Model(name="SiT-S/4", depth=1, width=16, heads=2),
            data=Data(image_size=8, channels=4, classes=10),
            sample=Sample(solver="euler", steps=2, batch=4, cfg_scale=2.0, **sample),
        )
    )


@pytest.fixture
def rows_of_calls(monkeypatch):
    """Return a function of a setup and a guide: the rows of the sampler's calls of its networks."""

    def trace(setup, guide=None):
        calls = set()
        network = Setup.network

        def noted(self, params, x, *arguments):
            calls.add(len(x))
            return network(self, params, x, *arguments)

        monkeypatch.setattr(Setup, "network", noted)
        rows = jax.ShapeDtypeStruct((4,), np.int32)
        params = setup.abstract_state.params
        sampler.jit_sampler(setup, guide).trace((params, params), {}, rows, rows)
        return calls

    return trace


@pytest.mark.parametrize(("platform", "rows"), [("cpu", 4), ("gpu", 8), ("tpu", 4)])
def test_the_sampler_makes_one_call_where_that_is_faster(
    monkeypatch, rows_of_calls, platform, rows
):
    monkeypatch.setattr(Setup, "platform", platform)
    assert rows_of_calls(tiny()) == {rows}
    assert rows_of_calls(tiny(cfg_interval=(0.2, 0.8))) == {4, rows}
    weaker = sampler.Guide(Weights(1, None, "", {}), tiny())  # its network cannot share a call
    assert rows_of_calls(tiny(), weaker) == {4}
