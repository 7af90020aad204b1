"""The twelve published sizes by name, and what one image costs."""

import dataclasses

from sit_jax.errors import check, unknown_name


@dataclasses.dataclass(frozen=True)
class Size:
    depth: int  # transformer blocks
    width: int  # channels of the residual stream
    heads: int
    patch: int  # pixels (or latent cells) along one side of a token


_BACKBONES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}
SIZES = {
    f"SiT-{name}/{patch}": Size(*sizes, patch)
    for name, sizes in _BACKBONES.items()
    for patch in (2, 4, 8)
}


def size_by_name(name: str, **overrides: int | None) -> Size:
    """A size from the table, with the fields that are not None replaced.

    `UserError` for an unknown name or a bad value.
    """
    if name not in SIZES:
        raise unknown_name("model", name, SIZES)
    size = dataclasses.replace(SIZES[name], **{k: v for k, v in overrides.items() if v is not None})
    for field, value in dataclasses.asdict(size).items():
        check(value >= 1, f"model {field} is {value}; expected at least 1")
    check(
        size.width % size.heads == 0,
        f"model width {size.width} is not divisible by its {size.heads} heads; choose a multiple",
    )
    check(
        size.width % 4 == 0,
        f"model width {size.width} is not divisible by 4, which the position embedding needs (sin and cos of two axes)",
    )
    return size


def tokens(input_size: int, patch: int) -> int:
    """Number of tokens of a square input. `UserError` unless patches tile it."""
    check(
        input_size % patch == 0,
        f"input size {input_size} is not divisible by the patch size {patch}; change data.image_size or model.patch",
    )
    return (input_size // patch) ** 2


def forward_flops(
    size: Size, input_size: int, channels: int, learn_sigma: bool, mlp_ratio: int = 4
) -> int:
    """Floating-point operations of one image's forward pass, two per multiply-add, matmuls only (XL/2 at 32x32x4: 2 x
    118.6e9).

    A training step costs three times this: the backward pass is two forward passes' worth of matmuls.
    """
    t, d = tokens(input_size, size.patch), size.width
    features = size.patch**2 * channels
    linear = t * d * d * (4 + 2 * mlp_ratio)  # q, k, v, projection; the two mlp layers
    block = linear + 2 * t * t * d + 6 * d * d  # + the two attention matmuls + adaLN
    ends = (
        t * d * features * (3 if learn_sigma else 2) + 2 * d * d + 256 * d + d * d
    )  # patches in and out; adaLN; time MLP
    return 2 * (size.depth * block + ends)
