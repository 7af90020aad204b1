#!/usr/bin/env bash
# Make .venv with sit_jax for TPUs, after installing Python 3.11 if needed. copy_and_install in
# cluster.sh runs this script on each TPU VM.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/lib.sh

if ! (find_python) >/dev/null 2>&1; then # the TPU runtimes are Ubuntu 22.04, with Python 3.10
    say "installing Python 3.11"
    # A VM that has just started runs its own updates: wait for apt's lock.
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y python3.11 python3.11-venv
fi
set_up 5 tpu
