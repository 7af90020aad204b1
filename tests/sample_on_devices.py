"""Print samples of fixed weights, 8 per device at a time, as JSON, for test_sampler.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax import config as config_lib
from sit_jax.jobs.sampler import labels_of, make_sampler
from sit_jax.jobs.setup import set_up

TINY = [
    ("model.depth", "2"),
    ("model.width", "32"),
    ("model.heads", "4"),
    ("sample.cfg_scale", "2"),
]
SOLVERS = {
    "heun": [("sample.steps", "4")],
    "dopri5": [("sample.steps", "none"), ("sample.rtol", "0.1"), ("sample.error_norm", "sample")],
    "shark": [("sample.steps", "4")],
}
COUNT = 64
PER_DEVICE = 8


def draw(solver: str, mesh: list) -> list[str]:
    """Return the float32 pixels of each sample, in hexadecimal."""
    batch = PER_DEVICE * jax.device_count()
    overrides = (
        TINY + mesh + SOLVERS[solver] + [("sample.solver", solver), ("sample.batch", str(batch))]
    )
    setup = set_up(config_lib.load("configs/digits.py", overrides))

    def disturb(leaf: jax.Array) -> jax.Array:
        return leaf + 0.02 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)

    # The last layer of fresh weights is 0, so the images would not depend on the network.
    params = jax.jit(lambda: jax.tree.map(disturb, setup.init_params()))()
    sampler = make_sampler(setup)
    parts = [np.arange(start, start + batch, dtype=np.int32) for start in range(0, COUNT, batch)]
    images = np.concatenate(
        [jax.device_get(sampler(params, part, labels_of(setup, part))[0]) for part in parts]
    )
    assert np.isfinite(images).all() and len(np.unique(images)) > COUNT * 32
    return [image.tobytes().hex() for image in images]


if __name__ == "__main__":
    meshes = {"data": []}
    if jax.device_count() > 1:
        meshes["fsdp"] = [("mesh.fsdp", "4")]
    samples = {
        name: {solver: draw(solver, mesh) for solver in SOLVERS} for name, mesh in meshes.items()
    }
    print(json.dumps(samples))
