"""Your own images: one folder of JPEG, PNG or other files per class, in pixel space at 64x64.

    python -m sit_jax.main --config configs/folder.py --workdir runs/mine --config.data.path=PATH
    --config.data.classes=N

Images are centre-cropped, and mirrored at random: set --config.data.flip=False for digits, text or
anything else that must not be mirrored.

Cost: SiT-S/4 (33 M parameters, 256 tokens) with the paper's optimizer settings, 100,000 steps.
Meant for one GPU. On a CPU make it smaller: --config.model.depth=4 --config.model.width=192
--config.train.batch=32. No score has been measured.
"""

from sit_jax.config import default


def get_config():
    config = default()
    config.model.update(name="SiT-S/4")
    config.data.update(source="folder", image_size=64, channels=3, classes=2, flip=True)
    config.train.update(steps=100_000, batch=256)
    config.sample.update(solver="heun", steps=25, cfg_scale=1.5, cfg_channels=None, scale=2)
    config.checkpoint.update(every=5_000)
    config.log.update(every=100, sheet_every=5_000)
    return config
