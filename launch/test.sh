#!/usr/bin/env bash
# Installs what the tests need into .venv (the first time) and runs them on the CPU; --help explains.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/lib.sh

usage() {
    cat <<'END'
usage: bash launch/test.sh [--torch] [--tpu] [pytest arguments]

Installs the base and pytest into .venv (once) and runs the tests on the CPU: all but the slow ones, or what the
pytest arguments choose, with paths seen from the repository root:
    bash launch/test.sh tests/test_storage.py -k whole
    bash launch/test.sh -m slow
One process a core, up to 8, shares the files; -n 0 is one process alone, as a debugger wants.

--torch   also installs PyTorch for the tests that compare with it (on Linux 5 GB; a CPU build that
          is in .venv already is kept)
--tpu     also installs libtpu for the tests that compile for TPUs; no TPU is needed

PYTHON=/path/to/python3.11          the interpreter that makes .venv
JAX_PLATFORMS=cuda                  where the tests run (default: cpu)
JAX_DISABLE_MOST_OPTIMIZATIONS=0    compiles for the CPU as a user's run does; without it XLA optimises little, as the
                                    tests spend most of their time in compiling what then runs for milliseconds
END
}

gb=3
extras=(test)
arguments=()
for argument in "$@"; do
    case $argument in
        -h | --help) usage; exit ;;
        --torch) extras+=(torch); gb=8 ;;
        --tpu) extras+=(tpu) ;;
        *) arguments+=("$argument") ;;
    esac
done

set_up "$gb" "${extras[@]}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
if [ "$JAX_PLATFORMS" = cpu ]; then
    export JAX_DISABLE_MOST_OPTIMIZATIONS="${JAX_DISABLE_MOST_OPTIMIZATIONS:-1}"
fi
# A file's tests share what is slow to make, so a file is one worker's. bash 3.2 calls an empty array unset.
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m 'not slow' ${arguments[@]+"${arguments[@]}"}
