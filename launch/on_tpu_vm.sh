#!/usr/bin/env bash
# Runs on each TPU VM, started by copy_and_install: .venv with sit_jax for TPUs, and before it a Python if need be.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/lib.sh

if ! (find_python) >/dev/null 2>&1; then # Ubuntu 22.04, which the TPU runtimes are, comes with Python 3.10
    say "installing Python 3.11"
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq update # a VM that has just started updates itself
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y python3.11 python3.11-venv
fi
set_up 5 tpu
