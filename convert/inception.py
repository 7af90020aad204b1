"""The Inception network of FID, pytorch-fid's pt_inception-2015-12-05 weights: .pth -> safetensors, names unchanged.

python -m convert.inception pt_inception-2015-12-05-6726825d.pth inception.safetensors
"""

import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from safetensors.numpy import save_file

from convert import cli
from convert.names import check_tensors
from convert.torch_file import Tensor, read_torch_file
from sit_jax.errors import check

# Block, then branch=OIHW of each of its convolutions; every one is followed by a batch norm.
_CONVOLUTIONS = """
Conv2d_1a_3x3 =32x3x3x3
Conv2d_2a_3x3 =32x32x3x3
Conv2d_2b_3x3 =64x32x3x3
Conv2d_3b_1x1 =80x64x1x1
Conv2d_4a_3x3 =192x80x3x3
Mixed_5b branch1x1=64x192x1x1 branch5x5_1=48x192x1x1 branch5x5_2=64x48x5x5 branch3x3dbl_1=64x192x1x1
Mixed_5b branch3x3dbl_2=96x64x3x3 branch3x3dbl_3=96x96x3x3 branch_pool=32x192x1x1
Mixed_5c branch1x1=64x256x1x1 branch5x5_1=48x256x1x1 branch5x5_2=64x48x5x5 branch3x3dbl_1=64x256x1x1
Mixed_5c branch3x3dbl_2=96x64x3x3 branch3x3dbl_3=96x96x3x3 branch_pool=64x256x1x1
Mixed_5d branch1x1=64x288x1x1 branch5x5_1=48x288x1x1 branch5x5_2=64x48x5x5 branch3x3dbl_1=64x288x1x1
Mixed_5d branch3x3dbl_2=96x64x3x3 branch3x3dbl_3=96x96x3x3 branch_pool=64x288x1x1
Mixed_6a branch3x3=384x288x3x3 branch3x3dbl_1=64x288x1x1 branch3x3dbl_2=96x64x3x3 branch3x3dbl_3=96x96x3x3
Mixed_6b branch1x1=192x768x1x1 branch7x7_1=128x768x1x1 branch7x7_2=128x128x1x7 branch7x7_3=192x128x7x1
Mixed_6b branch7x7dbl_1=128x768x1x1 branch7x7dbl_2=128x128x7x1 branch7x7dbl_3=128x128x1x7
Mixed_6b branch7x7dbl_4=128x128x7x1 branch7x7dbl_5=192x128x1x7 branch_pool=192x768x1x1
Mixed_6c branch1x1=192x768x1x1 branch7x7_1=160x768x1x1 branch7x7_2=160x160x1x7 branch7x7_3=192x160x7x1
Mixed_6c branch7x7dbl_1=160x768x1x1 branch7x7dbl_2=160x160x7x1 branch7x7dbl_3=160x160x1x7
Mixed_6c branch7x7dbl_4=160x160x7x1 branch7x7dbl_5=192x160x1x7 branch_pool=192x768x1x1
Mixed_6d branch1x1=192x768x1x1 branch7x7_1=160x768x1x1 branch7x7_2=160x160x1x7 branch7x7_3=192x160x7x1
Mixed_6d branch7x7dbl_1=160x768x1x1 branch7x7dbl_2=160x160x7x1 branch7x7dbl_3=160x160x1x7
Mixed_6d branch7x7dbl_4=160x160x7x1 branch7x7dbl_5=192x160x1x7 branch_pool=192x768x1x1
Mixed_6e branch1x1=192x768x1x1 branch7x7_1=192x768x1x1 branch7x7_2=192x192x1x7 branch7x7_3=192x192x7x1
Mixed_6e branch7x7dbl_1=192x768x1x1 branch7x7dbl_2=192x192x7x1 branch7x7dbl_3=192x192x1x7
Mixed_6e branch7x7dbl_4=192x192x7x1 branch7x7dbl_5=192x192x1x7 branch_pool=192x768x1x1
Mixed_7a branch3x3_1=192x768x1x1 branch3x3_2=320x192x3x3 branch7x7x3_1=192x768x1x1 branch7x7x3_2=192x192x1x7
Mixed_7a branch7x7x3_3=192x192x7x1 branch7x7x3_4=192x192x3x3
Mixed_7b branch1x1=320x1280x1x1 branch3x3_1=384x1280x1x1 branch3x3_2a=384x384x1x3 branch3x3_2b=384x384x3x1
Mixed_7b branch3x3dbl_1=448x1280x1x1 branch3x3dbl_2=384x448x3x3 branch3x3dbl_3a=384x384x1x3
Mixed_7b branch3x3dbl_3b=384x384x3x1 branch_pool=192x1280x1x1
Mixed_7c branch1x1=320x2048x1x1 branch3x3_1=384x2048x1x1 branch3x3_2a=384x384x1x3 branch3x3_2b=384x384x3x1
Mixed_7c branch3x3dbl_1=448x2048x1x1 branch3x3dbl_2=384x448x3x3 branch3x3dbl_3a=384x384x1x3
Mixed_7c branch3x3dbl_3b=384x384x3x1 branch_pool=192x2048x1x1
"""
_CLASSES, _FEATURES = 1008, 2048  # of the last layer


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """name -> shape of every tensor that the network uses."""
    shapes = {}
    for name, oihw in _convolutions():
        shapes[f"{name}.conv.weight"] = oihw
        shapes |= {
            f"{name}.bn.{part}": oihw[:1]
            for part in ("weight", "bias", "running_mean", "running_var")
        }
    return shapes | {"fc.weight": (_CLASSES, _FEATURES), "fc.bias": (_CLASSES,)}


def _convolutions() -> Iterator[tuple[str, tuple[int, ...]]]:
    for line in _CONVOLUTIONS.strip().splitlines():
        block, *branches = line.split()
        for branch in branches:
            name, _, shape = branch.partition("=")
            yield f"{block}.{name}" if name else block, tuple(map(int, shape.split("x")))


def main(argv: Sequence[str]) -> None:
    parser = cli.parser(
        "inception", "Converts pt_inception-2015-12-05-6726825d.pth, names unchanged."
    )
    parser.add_argument("weights", help="the .pth file of pytorch-fid's release fid_weights")
    parser.add_argument("out", help="the .safetensors file to be written")
    convert(**vars(parser.parse_args(argv)))


def convert(weights: str, out: str, *, overwrite: bool = False) -> None:
    """Writes `out`, float32. `UserError` if the file holds other tensors than the network's."""
    check(
        out.endswith(".safetensors"),
        f"{out!r} is no name for the result; expected NAME.safetensors",
    )
    content = read_torch_file(weights)
    check(isinstance(content, Mapping), f"{weights} holds {type(content).__name__}, no state dict")
    found = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    found = {
        name: value for name, value in found.items() if not name.endswith(".num_batches_tracked")
    }  # a counter
    expected = expected_shapes()
    check_tensors(weights, {name: value.shape for name, value in found.items()}, expected)
    with cli.output(
        out, sum(4 * int(np.prod(shape)) for shape in expected.values()), overwrite
    ) as new:
        tensors = {name: np.ascontiguousarray(found[name], np.float32) for name in expected}
        bad = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
        check(
            not bad,
            f"{weights}: {', '.join(bad[:4])} holds NaN or infinite values; bring a sound file",
        )
        save_file(tensors, new, {"format": "pt"})
    print(f"{len(expected)} tensors -> {out}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
