"""Run by test_sampler.py in a process of its own: samples of fixed weights, 2 on each device at a time, as JSON."""

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
COUNT, EACH = 16, 2


def draw(solver: str, mesh: list) -> list[str]:
    """The float32 pixels of each sample, in hexadecimal."""
    batch = EACH * jax.device_count()
    overrides = (
        TINY + mesh + SOLVERS[solver] + [("sample.solver", solver), ("sample.batch", str(batch))]
    )
    setup = set_up(config_lib.load("configs/digits.py", overrides))
    # Fresh weights end in zeros, which would hide the network.
    params = jax.jit(lambda: jax.tree.map(lambda leaf: leaf + 0.02 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape),
                                          setup.init_params()))()  # fmt: skip
    sampler = make_sampler(setup)
    parts = [np.arange(start, start + batch, dtype=np.int32) for start in range(0, COUNT, batch)]
    images = np.concatenate(
        [jax.device_get(sampler(params, part, labels_of(setup, part))[0]) for part in parts]
    )
    assert np.isfinite(images).all() and len(np.unique(images)) > COUNT * 32
    return [image.tobytes().hex() for image in images]


if __name__ == "__main__":
    meshes = {"data": []} | ({"fsdp": [("mesh.fsdp", "4")]} if jax.device_count() > 1 else {})
    print(
        json.dumps(
            {
                name: {solver: draw(solver, mesh) for solver in SOLVERS}
                for name, mesh in meshes.items()
            }
        )
    )
