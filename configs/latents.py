"""SiT on stored latents of 256 px images: 32x32x4, 1,000 classes, bfloat16, fsdp.

    python -m sit_jax.main --config configs/latents.py --workdir runs/xl2 --config.data.path=LATENTS

LATENTS is a folder that --mode encode made from images (configs/imagenet.py has the command) or
convert.latents from another project's cache. Preflight compiles for chips that are not here,
and needs no latents:

    python -m sit_jax.main --config configs/latents.py --mode preflight --topology v5e:4x4
    python -m sit_jax.main --config configs/latents.py:512 --mode preflight --topology v5e:4x4
    python -m sit_jax.main --config configs/latents.py:3B --mode preflight --topology v5p:4x4x4

SiT-XL/2 with the paper's optimizer settings and batch. `512` is for latents of 512 px images
(64x64x4). `3B` has 3.1 billion parameters and batch 1,024, larger than any in the paper, so no
score is known.

Cost: an image takes 0.71 TFLOP of training in XL/2, 3.1 in XL/2 at 512 px and 3.2 in 3B. At half
the peak, the 400,000 steps take XL/2 13 hours on v5e:4x4, and 3B 25 hours on v5p:4x4x4.
"""

from sit_jax.config import default


def get_config(variant="256"):
    variants = {
        "256": (32, 256, {}),
        "512": (64, 256, {}),
        # A head has 128 channels, as many as a TPU has lanes.
        "3B": (32, 1024, {"depth": 32, "width": 2304, "heads": 18}),
    }
    if variant not in variants:
        raise ValueError(f"the variant is {variant!r}; expected one of {', '.join(variants)}")
    side, batch, shape = variants[variant]
    config = default()
    # The reference trains with learn_sigma, so weights can be converted in both directions.
    config.model.update(name="SiT-XL/2", learn_sigma=True, **shape)
    config.data.update(source="latents", image_size=side, channels=4, classes=1000, flip=True)
    config.latents.update(codec="sd-vae")
    config.train.update(steps=400_000, batch=batch)
    config.sample.update(steps=50, solver="heun", cfg_scale=1.5, count=256, batch=256)
    config.precision.update(compute="bfloat16")
    config.mesh.update(data=1, fsdp=-1)
    return config
