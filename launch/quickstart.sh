#!/usr/bin/env bash
# Install, train a small SiT on handwritten digits and draw samples; see --help.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/quickstart.sh [workdir]

Install the base into .venv (only the first time), train a small SiT on scikit-learn's handwritten
digits, draw 200 samples, and report how many of them a classifier reads as the requested digit. All
output goes to the workdir (default: runs/digits in the repository). When run again, it continues
from the last checkpoint.

PYTHON=/path/to/python3.11   the interpreter that makes .venv
END
}

case ${1:-} in
    -h | --help) usage; exit ;;
    -*) usage >&2; exit 2 ;;
    '') workdir=runs/digits ;;
    /* | *://*) workdir=$1 ;;
    *) workdir=$PWD/$1 ;; # relative to the caller's folder, not to the repository root
esac
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/lib.sh

set_up 3
say "training; checkpoints and logs go to $workdir"
.venv/bin/python -m sit_jax.main --config configs/digits.py --workdir "$workdir"
say "drawing samples"
.venv/bin/python -m sit_jax.main --mode quality --workdir "$workdir" \
    --config.sample.count=200 --minimum 0.97,0.95

cat <<END

Done; the path of the sample sheet is printed above. Next steps, from $PWD:
  other labels, stronger guidance:
    .venv/bin/python -m sit_jax.main --workdir "$workdir" --mode sample \\
        --config.sample.labels=3,8 --config.sample.cfg_scale=4
  your own images, in one folder per class (here 64x64, two classes):
    .venv/bin/python -m sit_jax.main --config configs/folder.py --workdir runs/mine \\
        --config.data.path=/path/to/images --config.data.classes=2
  the tests:
    bash launch/test.sh
END
