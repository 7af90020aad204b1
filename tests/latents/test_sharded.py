"""On 8 devices, each encodes and decodes its own rows.

The weights are replicated, and nothing is gathered.
"""

import os
import re
import subprocess
import sys

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
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": ".",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "convolution" in done.stdout
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", done.stdout)
