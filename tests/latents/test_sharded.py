"""On 8 devices, each encodes and decodes its own rows.

The weights are replicated, and nothing is gathered.
"""

import re

from tests.processes import run_python

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from sit_jax import sharding
from sit_jax.latents.sd_vae import VaeOptions, open_sd_vae
from tests import goldens

folder = str(goldens.FOLDER / "vae_legacy")
mesh = sharding.make_mesh(2, 2, 2)
one = open_sd_vae(VaeOptions(folder, batch=8))
eight = open_sd_vae(VaeOptions(folder, batch=1), sharding.per_device(mesh))
params = one.load()
images = {"image": np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), np.uint8)}
everywhere = sharding.put_replicated(mesh, params)
rows = sharding.shard_global_batch(mesh, images)
keys = jax.random.split(jax.random.key(3), 8)
keys = jax.device_put(keys, sharding.batch_sharding(mesh))

x = jax.jit(eight.encode, out_shardings=sharding.batch_sharding(mesh))(everywhere, keys, rows)
expected = jax.jit(one.encode)(params, jax.random.split(jax.random.key(3), 8), images)
assert goldens.relative_error(x, expected) < 1e-5
decode = jax.jit(eight.decode).lower(everywhere, x).compile()
assert goldens.relative_error(decode(everywhere, x), jax.jit(one.decode)(params, expected)) < 1e-5
assert x.addressable_shards[0].data.shape == (2, 6, 6, 4)
print(decode.as_text())
"""


def test_every_device_does_its_own_rows():
    program = run_python("-c", SCRIPT, devices=8)
    assert "convolution" in program
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", program)
