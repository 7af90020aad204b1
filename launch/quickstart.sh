#!/usr/bin/env bash
# From nothing to pictures: installs, trains a small SiT on handwritten digits and draws samples; --help explains.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/quickstart.sh [workdir]

Installs the base into .venv (once), trains a small SiT on scikit-learn's handwritten digits, draws 200 samples, and
says how many of them a classifier reads as the digit that was asked for. Everything goes to the workdir (default:
runs/digits in the repository). Run again, it goes on where it stopped.

PYTHON=/path/to/python3.11   the interpreter that makes .venv
END
}

case ${1:-} in
    -h | --help) usage; exit ;;
    -*) usage >&2; exit 2 ;;
    '') workdir=runs/digits ;;
    /* | *://*) workdir=$1 ;;
    *) workdir=$PWD/$1 ;; # as seen from the caller's folder, which is left now
esac
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/lib.sh

set_up 3
say "training; checkpoints and logs go to $workdir"
.venv/bin/python -m sit_jax.main --config configs/digits.py --workdir "$workdir"
say "drawing samples"
.venv/bin/python tests/benchmarks/digits_quality.py --workdir "$workdir"

cat <<END

Done; the path of the sample sheet is printed above. What next, from $PWD:
  other labels, more guidance:
    .venv/bin/python -m sit_jax.main --workdir "$workdir" --mode sample \\
        --config.sample.labels=3,8 --config.sample.cfg_scale=4
  your own folder of class folders of images (here 64x64, two classes):
    .venv/bin/python -m sit_jax.main --config configs/folder.py --workdir runs/mine \\
        --config.data.path=/path/to/images --config.data.classes=2
  the tests:
    bash launch/test.sh
END
