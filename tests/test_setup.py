"""A setup names its programs and knows the spec of the records before data are opened."""

import jax
import numpy as np
import pytest

from sit_jax import config as config_lib
from sit_jax.data import pipeline
from sit_jax.jobs import sampler, train
from sit_jax.jobs.data import abstract_batch, open_source
from sit_jax.jobs.setup import set_up
from tests.commands import DIGITS


@pytest.fixture(scope="module")
def setup():
    tiny = {"model.depth": "1", "model.width": "16", "model.heads": "2", "sample.batch": "8"}
    return set_up(config_lib.load(DIGITS, list(tiny.items())))


def test_profiles_and_hlo_show_the_programs_by_name(setup):
    state, codec_params = setup.abstract_state, setup.codec.abstract_params
    step = train.make_train_step(setup).lower(state, abstract_batch(setup), codec_params)
    assert step.as_text().startswith("module @jit_train_step ")
    rows = jax.ShapeDtypeStruct((8,), np.int32)
    sample = sampler.jit_sampler(setup).lower((state.params, None), codec_params, rows, rows)
    assert sample.as_text().startswith("module @jit_sample ")


def test_the_spec_of_a_config_is_that_of_its_source(setup):
    source = open_source(setup)
    assert setup.record_spec == source.spec
    dataset = pipeline.batches(source, seed=0, batch_size=4, flip=False, skip_unreadable=False)
    batch = dataset[0]
    expected = pipeline.batch_spec(setup.record_spec)
    assert {name: (rows.shape[1:], rows.dtype) for name, rows in batch.items()} == {
        name: (array.shape, np.dtype(array.dtype)) for name, array in expected.items()
    }
