"""On 8 devices: each encodes and decodes its own rows, with the weights whole on all of them and nothing gathered."""

import os
import re
import subprocess
import sys

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from sit_jax import sharding
from sit_jax.latents import open_codec
from tests import goldens

options = dict(path=str(goldens.FOLDER / "vae_legacy"), repo=None, revision=None, dtype="float32", scale=0.18215)
mesh = sharding.make_mesh(2, 2, 2)
one, eight = open_codec("sd-vae", **options, batch=8), open_codec(
    "sd-vae", **options, batch=1, per_device=sharding.per_device(mesh))
params = one.load()
images = np.random.default_rng(0).uniform(-1, 1, (8, 12, 12, 3)).astype(np.float32)
everywhere, rows = sharding.put_replicated(mesh, params), sharding.shard_global_batch(mesh, images)
keys = jax.device_put(jax.random.split(jax.random.key(3), len(images)), sharding.batch_sharding(mesh))

x = jax.jit(eight.encode, out_shardings=sharding.batch_sharding(mesh))(everywhere, keys, rows)
expected = jax.jit(one.encode)(params, jax.random.split(jax.random.key(3), len(images)), images)
assert goldens.relative_error(x, expected) < 1e-5
decode = jax.jit(eight.decode).lower(everywhere, x).compile()
assert goldens.relative_error(decode(everywhere, x), jax.jit(one.decode)(params, expected)) < 1e-5
assert x.addressable_shards[0].data.shape == (2, 6, 6, 4)
print(decode.as_text())
"""


def test_every_device_does_its_own_rows():
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ".",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "convolution" in done.stdout
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", done.stdout)
