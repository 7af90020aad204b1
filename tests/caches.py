"""Small folders of stored latents for tests."""

import dataclasses

import numpy as np

from sit_jax.data.latent_cache import CacheWriter, Example, Moments, Plan


def make_plan(**changes):
    """Return the plan of 23 latents of 4x4x3 in shards of 5; keywords change it or its moments."""
    moments = {"shape": (4, 4, 3), "dtype": "float32", "mirrored": True, "variance": True}
    kinds = {key: changes.pop(key) for key in list(changes) if key in moments}
    plan = Plan(
        moments=Moments(**moments | kinds),
        scale=(0.5, 2.0, 1.0),
        shift=(0.0, -1.0, 0.25),
        autoencoder={"name": "other"},
        image_size=32,
        class_names=("ant", "bee"),
        examples=23,
        shard_records=5,
        source={"path": "images"},
    )
    return dataclasses.replace(plan, **changes)


def moments_of(plan, number):
    """Return the moments of an example: noise."""
    return np.random.default_rng(number).standard_normal(plan.moments.shape_vhwm, np.float32)


def examples(plan, numbers, left_out=()):
    """Yield these examples, labelled 0 and 1 in turn."""
    for number in numbers:
        if number not in left_out:
            yield Example(number, number % 2, moments_of(plan, number))


def write(folder, plan, left_out=()):
    """Write a complete folder of latents and return its manifest."""
    folder.mkdir(exist_ok=True)
    writer = CacheWriter(folder, plan)
    writer.begin()
    for name, numbers in writer.missing():
        writer.write_shard(name, numbers, examples(plan, numbers, left_out))
    return writer.finish()
