"""Convert the Inception weights for FID from .pth to safetensors, with unchanged names.

python -m convert.inception                 # download pytorch-fid's file into the user's cache
python -m convert.inception pt_inception-2015-12-05-6726825d.pth
"""

import functools
import sys

from convert import cli, published
from sit_jax.metrics import inception, weight_files

# num_batches_tracked is torchvision's counter of training batches; inference does not use it.
_FILE = published.File(weight_files.INCEPTION, inception.file_shapes, ".num_batches_tracked")

convert = functools.partial(published.convert, _FILE)
main = functools.partial(published.main, _FILE)

if __name__ == "__main__":
    sys.exit(cli.run(main))
