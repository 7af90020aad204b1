"""Convert DINOv2's ViT-L/14 from .pth to safetensors, with unchanged names.

python -m convert.dinov2                    # download the file (1.2 GB) into the user's cache
python -m convert.dinov2 dinov2_vitl14_pretrain.pth
"""

import functools
import sys

from convert import cli, published
from sit_jax.metrics import dinov2, weight_files

_FILE = published.File(weight_files.DINOV2, dinov2.file_shapes)

convert = functools.partial(published.convert, _FILE)
main = functools.partial(published.main, _FILE)

if __name__ == "__main__":
    sys.exit(cli.run(main))
