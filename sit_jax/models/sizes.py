"""The published sizes by name, and the cost of one image."""

import dataclasses

from sit_jax.errors import check, unknown_name


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a network."""

    depth: int  # transformer blocks
    width: int  # channels of the residual stream
    heads: int
    patch: int  # pixels (or latent cells) along one side of a token


_BACKBONES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}
SIZES = {
    f"SiT-{name}/{patch}": Size(depth, width, heads, patch)
    for name, (depth, width, heads) in _BACKBONES.items()
    for patch in (2, 4, 8)
}


def size_by_name(name: str, **overrides: int | None) -> Size:
    """Return a size from the table, with the fields in `overrides` that are not None replaced.

    Raises UserError for an unknown name or a bad value.
    """
    if name not in SIZES:
        raise unknown_name("model", name, SIZES)
    given = {field: value for field, value in overrides.items() if value is not None}
    size = dataclasses.replace(SIZES[name], **given)
    for field, value in dataclasses.asdict(size).items():
        check(value >= 1, f"model {field} is {value}; expected at least 1")
    check(
        size.width % size.heads == 0,
        f"model width {size.width} is not divisible by its {size.heads} heads; choose a multiple",
    )
    check(
        size.width % 4 == 0,
        f"model width {size.width} is not divisible by 4, as the position embedding needs "
        "(sin and cos of two axes); choose a multiple of 4",
    )
    return size


def tokens(input_size: int, patch: int) -> int:
    """Return the number of tokens of a square input. Raises UserError unless patches tile it."""
    check(
        input_size % patch == 0,
        f"input size {input_size} is not divisible by the patch size {patch}; change "
        "data.image_size or model.patch",
    )
    return (input_size // patch) ** 2


def forward_flops(
    size: Size, input_size: int, channels: int, learn_sigma: bool, mlp_ratio: int = 4
) -> int:
    """Count the floating-point operations of the matmuls in one image's forward pass.

    A multiply-add counts as two: XL/2 at 32x32x4 takes 2 x 118.6e9. A training step takes three
    times as many, because the backward pass has twice the matmuls of the forward pass.
    """
    t = tokens(input_size, size.patch)
    d = size.width
    features = size.patch**2 * channels
    # q, k, v and the projection; the two layers of the mlp.
    linear = t * d * d * (4 + 2 * mlp_ratio)
    # The two matmuls of attention; adaLN.
    block = linear + 2 * t * t * d + 6 * d * d
    # Patches in and out; the final adaLN; the time mlp.
    patches = t * d * features * (3 if learn_sigma else 2)
    ends = patches + 2 * d * d + 256 * d + d * d
    return 2 * (size.depth * block + ends)
