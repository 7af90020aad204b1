"""The FIDs of the SiT paper (arXiv 2401.08740), to compare with."""

from typing import NamedTuple

from sit_jax.settings import Config


class Published(NamedTuple):
    """A published FID-50K on ImageNet, of the EMA, with 250 evaluations of the network."""

    model: str
    image_size: int
    training: str
    sampler: str
    fid: float


TABLE = (
    Published("SiT-S/2", 256, "400K steps", "ODE, no guidance", 58.97),
    Published("SiT-S/2", 256, "400K steps", "SDE, no guidance", 57.64),
    Published("SiT-B/2", 256, "400K steps", "ODE, no guidance", 34.84),
    Published("SiT-B/2", 256, "400K steps", "SDE, no guidance", 33.02),
    Published("SiT-L/2", 256, "400K steps", "ODE, no guidance", 20.01),
    Published("SiT-L/2", 256, "400K steps", "SDE, no guidance", 18.79),
    Published("SiT-XL/2", 256, "400K steps", "ODE, no guidance", 18.04),
    Published("SiT-XL/2", 256, "400K steps", "SDE, no guidance", 17.19),
    Published("SiT-XL/2", 256, "7M steps", "ODE, no guidance", 9.35),
    Published("SiT-XL/2", 256, "7M steps", "SDE, no guidance", 8.26),
    Published("SiT-XL/2", 256, "7M steps", "ODE, cfg 1.5", 2.15),
    Published("SiT-XL/2", 256, "7M steps", "SDE, cfg 1.5", 2.06),
    Published("SiT-XL/2", 512, "", "SDE, cfg 1.5", 2.62),
)


def published_for(config: Config) -> list[Published]:
    """Return the published numbers of a config's network and image size; [] if it has none."""
    height, _, _ = config.data.image_shape
    size = height * 8 if config.data.source == "latents" else height
    return [row for row in TABLE if (row.model, row.image_size) == (config.model.name, size)]
