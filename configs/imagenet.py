"""ImageNet in latents of the SD-VAE: the recipe of arXiv 2401.08740 for all twelve sizes.

    python -m sit_jax.main --config configs/imagenet.py:SiT-XL/2,256 --workdir runs/xl2
    --config.data.path=IMAGENET/train

Each step encodes its images with the VAE, which costs 0.27 of 0.98 TFLOP, and JPEG files have to be
decoded as fast as it trains. To store the latents once instead, give this config to --mode encode,
and train with configs/latents.py: the same examples up to the rounding of the storage, 42 GB at 256
pixels. Use this config for images that change, or where disk is scarce, and stored latents for long
runs.

    python -m sit_jax.main --mode encode --config configs/imagenet.py --workdir LATENTS
    --config.data.path=IMAGENET/train

Images are 256 or 512 pixels wide and high; without an argument the config is SiT-XL/2,256. The
folder holds one folder of JPEG files for each of the 1000 classes. The VAE comes from Hugging Face;
without a network, set --config.latents.path=FOLDER.

The default is float32, as in the reference, which trains in float32 with TF32 matmuls. On
accelerators --config.precision.compute=bfloat16 is faster.

Cost: SiT-XL/2 at 256 takes 0.71 TFLOP per image for the network and 0.27 for the VAE's encoder. At
batch 256 that is 1.0e20 FLOP for 400,000 steps, or 16 hours on 32 TPU v4 at the 6.8 steps/s that
the reference reports. At 512 pixels the VAE costs four times as much and the network 4.4 times. The
published 7M steps are --config.train.steps=7000000.

Expected FID-50K of the EMA, as published; none of it has been measured here. ODE is heun with
sample.steps=125, SDE is euler-maruyama with sample.steps=249 (250 evaluations each), without
guidance unless stated. Two training runs differ by about 1:

    SiT-S/2   256   400K     ODE 58.97  SDE 57.64
    SiT-B/2   256   400K     ODE 34.84  SDE 33.02
    SiT-L/2   256   400K     ODE 20.01  SDE 18.79
    SiT-XL/2  256   400K     ODE 18.04  SDE 17.19
    SiT-XL/2  256   7M       ODE  9.35  SDE  8.26
    SiT-XL/2  256   7M, sample.cfg_scale=1.5  ODE 2.15  SDE 2.06 (its diffusion is not published)
    SiT-XL/2  512   sample.cfg_scale=1.5                SDE 2.62

The paper decodes the images for its FID with the -ema VAE, the default, and the images it shows
with -mse: --config.latents.repo=stabilityai/sd-vae-ft-mse.
"""

from sit_jax.config import default


def get_config(arg="SiT-XL/2,256"):
    name, _, image_size = arg.partition(",")
    if image_size not in ("256", "512"):
        raise ValueError(
            f"the argument is {arg!r}; expected a size and 256 or 512 pixels, such as SiT-XL/2,256"
        )
    config = default()
    # The reference trains with learn_sigma, so weights can be converted in both directions.
    config.model.update(name=name, learn_sigma=True)
    config.data.update(
        source="folder", image_size=int(image_size), channels=3, classes=1000, flip=True
    )
    config.latents.update(codec="sd-vae")
    config.train.update(steps=400_000, batch=256, label_dropout=0.1, ema_decay=0.9999)
    config.optimizer.update(learning_rate=1e-4, schedule="constant")
    config.sample.update(solver="dopri5", count=64, batch=64, columns=8)
    config.checkpoint.update(every=10_000)
    config.log.update(every=100, sheet_every=10_000)
    return config
