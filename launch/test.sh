#!/usr/bin/env bash
# Install the tests' packages into .venv and run the tests on the CPU, or the linters; see --help.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/lib.sh

usage() {
    cat <<'END'
usage: bash launch/test.sh [--torch] [--tpu] [pytest arguments]
       bash launch/test.sh --lint

Install the base and pytest into .venv (only the first time) and run the tests on the CPU: all but
the slow ones, or those that the pytest arguments select. Paths are relative to the repository root:
    bash launch/test.sh tests/test_storage.py
    bash launch/test.sh -m slow
The test files are shared among one process per core, at most 8. A debugger needs a single process:
add -n 0.

--torch   also install PyTorch, for the tests that compare with it (5 GB on Linux; a CPU build that
          is already in .venv is kept)
--tpu     also install libtpu, for the tests that compile for TPUs; no TPU is needed
--lint    run no tests: also install ruff and mypy, in the versions that pyproject.toml pins, and
          run `ruff check .`, `ruff format --check .` and `mypy`; the status is 1 if one finds
          anything. `ruff check --fix .` and `ruff format .` repair most findings.

PYTHON=/path/to/python3.11          the interpreter that makes .venv
JAX_PLATFORMS=cuda                  where the tests run (default: cpu)
JAX_DISABLE_MOST_OPTIMIZATIONS=0    compile for the CPU as in a user's run. By default XLA optimises
                                    little, since the tests spend most of their time compiling
                                    programs that then run for milliseconds.
END
}

lint() {
    local status=0
    .venv/bin/python -m ruff check . || status=1
    .venv/bin/python -m ruff format --check . || status=1
    .venv/bin/python -m mypy || status=1
    return "$status"
}

gb=3
lint=''
extras=(test)
arguments=()
for argument in "$@"; do
    case $argument in
        -h | --help) usage; exit ;;
        --torch) extras+=(torch); gb=8 ;;
        --tpu) extras+=(tpu) ;;
        --lint) extras+=(lint); lint=yes ;;
        *) arguments+=("$argument") ;;
    esac
done
if [ "$lint" ] && [ "${#arguments[@]}" -gt 0 ]; then
    die "--lint runs no tests, so '${arguments[0]}' would be ignored; leave one of them out"
fi

set_up "$gb" "${extras[@]}"
if [ "$lint" ]; then
    lint
    exit
fi
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
if [ "$JAX_PLATFORMS" = cpu ]; then
    export JAX_DISABLE_MOST_OPTIMIZATIONS="${JAX_DISABLE_MOST_OPTIMIZATIONS:-1}"
fi
# --dist loadfile: the tests of a file share fixtures that are slow to make.
# ${arguments[@]+...}: bash 3.2 treats an empty array as unset.
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m 'not slow' \
    ${arguments[@]+"${arguments[@]}"}
