"""Convert the Inception weights for FID from .pth to safetensors, with unchanged names.

python -m convert.inception pt_inception-2015-12-05-6726825d.pth inception.safetensors

The file is part of pytorch-fid's release fid_weights.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from safetensors.numpy import save_file

from convert import cli
from convert.names import check_tensors
from convert.torch_file import Tensor, read_torch_file
from sit_jax.errors import check

# On each line a block, then BRANCH=SHAPE for each of its convolutions, the shape being output
# channels x input channels x height x width. A batch norm follows every convolution.
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
Mixed_6a branch3x3=384x288x3x3 branch3x3dbl_1=64x288x1x1 branch3x3dbl_2=96x64x3x3
Mixed_6a branch3x3dbl_3=96x96x3x3
Mixed_6b branch1x1=192x768x1x1 branch7x7_1=128x768x1x1 branch7x7_2=128x128x1x7
Mixed_6b branch7x7_3=192x128x7x1
Mixed_6b branch7x7dbl_1=128x768x1x1 branch7x7dbl_2=128x128x7x1 branch7x7dbl_3=128x128x1x7
Mixed_6b branch7x7dbl_4=128x128x7x1 branch7x7dbl_5=192x128x1x7 branch_pool=192x768x1x1
Mixed_6c branch1x1=192x768x1x1 branch7x7_1=160x768x1x1 branch7x7_2=160x160x1x7
Mixed_6c branch7x7_3=192x160x7x1
Mixed_6c branch7x7dbl_1=160x768x1x1 branch7x7dbl_2=160x160x7x1 branch7x7dbl_3=160x160x1x7
Mixed_6c branch7x7dbl_4=160x160x7x1 branch7x7dbl_5=192x160x1x7 branch_pool=192x768x1x1
Mixed_6d branch1x1=192x768x1x1 branch7x7_1=160x768x1x1 branch7x7_2=160x160x1x7
Mixed_6d branch7x7_3=192x160x7x1
Mixed_6d branch7x7dbl_1=160x768x1x1 branch7x7dbl_2=160x160x7x1 branch7x7dbl_3=160x160x1x7
Mixed_6d branch7x7dbl_4=160x160x7x1 branch7x7dbl_5=192x160x1x7 branch_pool=192x768x1x1
Mixed_6e branch1x1=192x768x1x1 branch7x7_1=192x768x1x1 branch7x7_2=192x192x1x7
Mixed_6e branch7x7_3=192x192x7x1
Mixed_6e branch7x7dbl_1=192x768x1x1 branch7x7dbl_2=192x192x7x1 branch7x7dbl_3=192x192x1x7
Mixed_6e branch7x7dbl_4=192x192x7x1 branch7x7dbl_5=192x192x1x7 branch_pool=192x768x1x1
Mixed_7a branch3x3_1=192x768x1x1 branch3x3_2=320x192x3x3 branch7x7x3_1=192x768x1x1
Mixed_7a branch7x7x3_2=192x192x1x7
Mixed_7a branch7x7x3_3=192x192x7x1 branch7x7x3_4=192x192x3x3
Mixed_7b branch1x1=320x1280x1x1 branch3x3_1=384x1280x1x1 branch3x3_2a=384x384x1x3
Mixed_7b branch3x3_2b=384x384x3x1
Mixed_7b branch3x3dbl_1=448x1280x1x1 branch3x3dbl_2=384x448x3x3 branch3x3dbl_3a=384x384x1x3
Mixed_7b branch3x3dbl_3b=384x384x3x1 branch_pool=192x1280x1x1
Mixed_7c branch1x1=320x2048x1x1 branch3x3_1=384x2048x1x1 branch3x3_2a=384x384x1x3
Mixed_7c branch3x3_2b=384x384x3x1
Mixed_7c branch3x3dbl_1=448x2048x1x1 branch3x3dbl_2=384x448x3x3 branch3x3dbl_3a=384x384x1x3
Mixed_7c branch3x3dbl_3b=384x384x3x1 branch_pool=192x2048x1x1
"""
# Outputs and inputs of the last layer.
_CLASSES = 1008
_FEATURES = 2048


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of the network."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, oihw in _convolutions():
        shapes[f"{name}.conv.weight"] = oihw
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = oihw[:1]
    return shapes | {"fc.weight": (_CLASSES, _FEATURES), "fc.bias": (_CLASSES,)}


def _convolutions() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, OIHW shape) of every convolution."""
    for line in _CONVOLUTIONS.strip().splitlines():
        block, *branches = line.split()
        for branch in branches:
            name, _, shape = branch.partition("=")
            yield f"{block}.{name}" if name else block, tuple(map(int, shape.split("x")))


def main(argv: Sequence[str]) -> None:
    """Parse the command line and convert."""
    parser = cli.parser(
        "inception",
        "Convert the Inception weights for FID, pt_inception-2015-12-05-6726825d.pth, to "
        "safetensors. Tensor names stay unchanged; values are stored as float32.",
    )
    parser.add_argument(
        "weights", help="pt_inception-2015-12-05-6726825d.pth of pytorch-fid's release fid_weights"
    )
    parser.add_argument("out", help="the .safetensors file to write")
    flags = parser.parse_args(argv)
    convert(flags.weights, flags.out, overwrite=flags.overwrite)


def convert(weights: str, out: str, *, overwrite: bool = False) -> None:
    """Write the weights to `out` as float32.

    Raises UserError if the file's tensors are not those of the network.
    """
    check(out.endswith(".safetensors"), f"{out!r} is not a valid name; expected NAME.safetensors")
    cli.check_input(weights)
    content = read_torch_file(weights)
    check(
        isinstance(content, Mapping),
        f"{weights} holds {type(content).__name__}, not a state dict; get pytorch-fid's file",
    )
    # num_batches_tracked is torchvision's counter of training batches; inference does not use it.
    tensors = {
        str(name): value
        for name, value in content.items()
        if isinstance(value, Tensor) and not str(name).endswith(".num_batches_tracked")
    }
    expected = expected_shapes()
    check_tensors(weights, {name: tensor.shape for name, tensor in tensors.items()}, expected)
    size = sum(4 * math.prod(shape) for shape in expected.values())
    with cli.output(out, size, overwrite) as new:
        arrays = {name: np.ascontiguousarray(tensors[name], np.float32) for name in expected}
        bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
        check(
            not bad,
            f"{weights}: {', '.join(bad[:4])} holds NaN or infinite values; get an intact file",
        )
        save_file(arrays, new, {"format": "pt"})
    print(f"{len(expected)} tensors -> {out}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
