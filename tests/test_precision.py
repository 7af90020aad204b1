"""The precision of the network's products, by their use, and what it changes in images."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.jobs import likelihood, sampler, train
from sit_jax.jobs.data import abstract_batch
from sit_jax.jobs.results import as_named
from sit_jax.jobs.setup import set_up
from sit_jax.jobs.workdir import Weights
from sit_jax.settings import Config, Data, Likelihood, Model, Precision, Sample, Train
from tests import goldens
from tests.benchmarks import precision as benchmark

ROWS = np.zeros(4, np.int32)
IMAGES = {"image": np.zeros((4, 8, 8, 1), np.uint8)}


def tiny(matmul, solver="euler"):
    """Return the setup of a network that takes no time to trace."""
    return set_up(
        Config(
            model=Model(name="SiT-S/4", depth=1, width=16, heads=2),
            data=Data(image_size=8, channels=1, classes=10),
            train=Train(steps=1, batch=4),
            sample=Sample(solver=solver, steps=2, batch=4, cfg_scale=2.0),
            likelihood=Likelihood(solver="euler", steps=2, batch=4),
            precision=Precision(matmul=matmul),
        )
    )


def program(use, setup):
    """Return the traced function of a use, with its arguments."""
    params = setup.abstract_state.params
    if use == "training":
        return train.make_train_step(setup), (setup.abstract_state, abstract_batch(setup), {})
    if use == "sampling":
        return sampler.jit_sampler(setup), ((params, None), {}, ROWS, ROWS)
    if use == "inversion":
        return sampler.make_inverter(setup), (params, {}, ROWS, IMAGES, ROWS)
    return likelihood.make_log_prob(setup), (params, {}, ROWS, IMAGES, ROWS)


@pytest.fixture
def precisions(monkeypatch):
    """Return a function of a use and a setup: the precisions of the products in its program."""
    for module in (sampler, likelihood):  # the arguments are abstract: no batch to put on devices
        monkeypatch.setattr(module, "call_with_batches", lambda setup, compiled: compiled)

    def trace(use, setup):
        function, arguments = program(use, setup)
        text = str(jax.make_jaxpr(function)(*arguments))
        dots = re.findall(r"dot_general\[(.*?)\n *\]", text, re.DOTALL)
        found = [re.search(r"precision=\(Precision\.(\w+),", dot) for dot in dots]
        return {match[1] if match else "DEFAULT" for match in found}

    return trace


@pytest.mark.parametrize(
    ("use", "default"),
    [
        ("training", "DEFAULT"),
        ("sampling", "HIGH"),
        ("inversion", "HIGH"),
        ("likelihood", "HIGHEST"),
    ],
)
def test_products_have_the_precision_of_their_use_unless_it_is_set(precisions, use, default):
    # The gradient of the label table is a product whose precision is no choice: it adds up rows.
    always = {"HIGHEST"} if use == "training" else set()
    assert precisions(use, tiny(None)) == {default} | always
    assert precisions(use, tiny("highest")) == {"HIGHEST"}
    assert precisions(use, tiny("default")) == {"DEFAULT"} | always


def test_the_stages_of_a_solver_are_summed_in_full_precision(precisions):
    """diffrax sums those of sra1 with a product in the context's precision."""
    assert precisions("sampling", tiny("default", solver="sra1")) == {"DEFAULT", "HIGHEST"}


@pytest.mark.parametrize("matmul", [None, "default", "high", "highest"])
def test_settings_say_the_precision_that_images_were_drawn_in(matmul):
    settings = sampler.sampler_settings(tiny(matmul), Weights(1, None, "", {}), None)
    assert settings["precision"] == {"compute": "float32", "matmul": matmul or "high"}


def test_names_count_highest_as_null_as_it_was_recorded_when_it_was_the_default():
    def settings(matmul):
        return {"a": 1, "precision": {"compute": "float32", "matmul": matmul}}

    assert as_named(settings("highest")) == settings(None) != as_named(settings("high"))
    assert as_named({"samples": settings("highest")}) == {"samples": settings(None)}
    recorded = settings("highest")
    as_named(recorded)
    assert recorded == settings("highest")
    assert as_named({"latents": {"matmul": "highest"}}) == {"latents": {"matmul": "highest"}}


@pytest.mark.parametrize(
    ("split", "low", "high"), [(benchmark.tf32, 1e-5, 1e-3), (benchmark.three_passes, 1e-8, 1e-5)]
)
def test_high_changes_images_by_less_than_the_error_that_the_solver_is_allowed(split, low, high):
    """On TF32 and on TPUs: by less than the default sample.rtol and a hundredth of it."""
    case = benchmark.golden_case()
    assert high <= case.config.sample.rtol
    case = case.with_sample(solver="heun", steps=10)
    exact = benchmark.images_of(case)
    changed = benchmark.images_of(case, split=split)
    assert low < benchmark.rms_difference(changed, exact) < high


def test_emulated_products_have_the_rounding_of_their_format():
    a, b = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    exact = a.astype(np.float64) @ b

    def error(split):
        with benchmark.emulated(split):
            return goldens.relative_error(jnp.einsum("ij,jk->ik", a, b), exact)

    assert 1e-4 < error(benchmark.tf32) < 1e-3
    assert 1e-7 < error(benchmark.three_passes) < 2e-5
