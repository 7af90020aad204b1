"""Class-conditional 8x8 digits from scikit-learn: the demonstration that needs no download.

    python -m sit_jax.main --config configs/digits.py --workdir runs/digits

Cost: a 1.3 M parameter SiT, 1,800 steps; about a minute and a half on two CPU cores. Expected:
the classifier of `--mode quality` reads 99 % or more of the samples as their label.
"""

from sit_jax.config import default


def get_config():
    config = default()
    config.model.update(name="SiT-S/4", depth=4, width=128, heads=4)
    config.data.update(source="digits", split="train", image_size=8, channels=1, classes=10)
    config.train.update(steps=1800, batch=128, ema_decay=0.995)
    config.optimizer.update(learning_rate=2e-3, schedule="cosine")
    config.sample.update(
        solver="heun", steps=25, cfg_scale=1.5, count=100, batch=100, columns=10, scale=6
    )
    config.likelihood.update(split="test", batch=128)
    config.excess.update(test_split="test")
    config.checkpoint.update(every=600)
    config.log.update(every=100, sheet_every=600, sheet_count=100)
    return config
