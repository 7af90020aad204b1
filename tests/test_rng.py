"""rng: keys and draws are functions of (seed, stream, index), whatever the environment says."""

import jax
import numpy as np
import pytest

import sit_jax
from sit_jax import rng, runtime
from sit_jax.errors import UserError
from tests.commands import TINY, call, flags, rows
from tests.processes import run_python

# Draws of every kind in this package: a key, normals, and the probes of the likelihood.
DRAWS = """
import jax.numpy as jnp, numpy as np
from sit_jax import rng
from sit_jax.latents import dequantise
from sit_jax.models.conditioning import ClassLabels
from sit_jax.sampling import brownian, density
from sit_jax.transport import times
import jax
keys = jax.vmap(lambda i: rng.key(7, "s", i))(jnp.arange(3))
images = jnp.zeros((3, 2, 2, 1), jnp.uint8)
draws = [
    jax.random.key_data(rng.key(2**32 - 1, "a", 5)),
    rng.normal_by_index(3, "b", jnp.arange(2), (2,)),
    density.draw_probes("rademacher", keys, 2, (4,)),
    density.draw_probes("gaussian", keys, 2, (4,)),
    brownian.keyed_draw(keys, (2,))(jnp.int32(4), 1),
    times.training_times(keys[0], 4, (0.0, 1.0)),
    times.training_times(keys[0], 4, (0.0, 1.0), "logit-normal"),
    dequantise.uniform(keys, images)[0],
    ClassLabels(10).drop(keys[0], jnp.zeros(20, jnp.int32), 0.5),
]
print([np.asarray(draw).round(6).tolist() for draw in draws])
"""


def test_a_key_is_that_of_the_seed():
    for seed in (0, 1, 2**31, 2**32 - 1):
        np.testing.assert_array_equal(
            jax.random.key_data(rng.key(seed, "stream", 4)),
            jax.random.key_data(
                jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 4041850396), 4)
            ),
        )


@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_ENABLE_X64": "1"},
        {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_RANDOM_SEED_OFFSET": "1"},
    ],
)
def test_draws_do_not_depend_on_the_environment(variables, monkeypatch, capsys):
    exec(DRAWS, {})
    expected = capsys.readouterr().out
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert run_python("-c", DRAWS, devices=1) == expected


OTHER = {
    "jax_enable_x64": True,
    "jax_threefry_partitionable": False,
    "jax_default_prng_impl": "rbg",
    "jax_random_seed_offset": 1,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}


@pytest.fixture
def set_option():
    """Set an option of jax to another value, as an environment variable would."""
    before = {name: getattr(jax.config, name) for name in OTHER}
    yield lambda name: jax.config.update(name, OTHER[name])
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("name", OTHER)
def test_an_option_that_changes_numbers_is_undone_and_named(name, set_option):
    assert runtime.fix_numerics() is None
    set_option(name)
    assert list(runtime.changed_numerics()) == [name]
    assert runtime.fix_numerics().endswith(f"must not depend on it: {name.upper()}")
    assert not runtime.changed_numerics()


@pytest.mark.parametrize("name", ["jax_enable_x64", "jax_threefry_partitionable"])
def test_the_environment_does_not_change_a_run(name, set_option, trained, tmp_path):
    set_option(name)
    with pytest.raises(UserError, match=f"{name.upper()}.*jax.config.update"):
        sit_jax.load(trained[0])
    status, _, err = call(*TINY, "--workdir", tmp_path / "run", *flags(log__sheet_every=0))
    assert (status, err.count("\n")) == (0, 1) and name.upper() in err
    names = ("step", "loss", "grad_norm", "learning_rate")
    assert [[row[name] for name in names] for row in rows(tmp_path / "run")] == [
        [row[name] for name in names] for row in rows(trained[0])
    ]
