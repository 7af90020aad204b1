# shellcheck shell=bash
# Functions that make .venv and install packages into it, and say and die, which print messages.
# Sourced by the other scripts of this folder, which change to the repository root before a call.

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# Print the first Python >= 3.11 that can make a venv. If $PYTHON is set, consider only that one.
# If there is none, stop with one line that names what is missing.
find_python() {
    # 3.14 comes after the versions that the packages have supported for longer.
    local candidates=(python3.13 python3.12 python3.11 python3.14 python3)
    local candidate too_old='' incomplete='' version
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        # A command may exist and still fail: pyenv has shims for versions that are not selected.
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' \
            2>/dev/null) || continue
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            too_old="$candidate, which is $version"
        elif ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            incomplete="$candidate has no venv module; on Debian or Ubuntu:"
            incomplete+=" sudo apt install python$version-venv"
        else
            printf '%s\n' "$candidate"
            return
        fi
    done
    [ -z "$incomplete" ] || die "$incomplete"
    die "Python 3.11 or newer is needed, found ${too_old:-none of: ${candidates[*]}};" \
        "install one, or give its path: PYTHON=/path/to/python3.11 bash ${0##*/}"
}

venv_works() {
    .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Make .venv unless it already exists and works. A broken one is deleted and made again in the same
# place (a venv cannot be moved), but only if these scripts made it.
make_venv() {
    local python
    if venv_works; then return; fi
    if { [ -e .venv ] || [ -L .venv ]; } && [ ! -e .venv/.made-by-sit_jax ]; then
        die "$PWD/.venv has no working Python 3.11 or newer with pip and was not made by these" \
            "scripts; remove or rename it"
    fi
    python=$(find_python)
    say "making .venv with $python"
    rm -rf .venv
    mkdir .venv
    touch .venv/.made-by-sit_jax # first, so that an interrupted installation is recognized
    "$python" -m venv .venv || die "$python -m venv failed (its reason is above)"
}

# set_up GB EXTRA...: install the base, this repository (editable) and these extras of
# pyproject.toml into .venv. GB of disk space must be free.
# .installed-EXTRA holds the checksum of the files that an extra was installed from. All of them are
# deleted while an installation is under way, so that a failed one is repeated.
set_up() {
    local gb=$1 checksum extra is_done=yes extras
    shift
    make_venv
    checksum=$({ cat requirements.txt pyproject.toml; pwd; } | cksum)
    for extra in base "$@"; do
        [ "$(cat ".venv/.installed-$extra" 2>/dev/null)" = "$checksum" ] || is_done=''
    done
    if [ "$is_done" ]; then return; fi
    .venv/bin/python -c "import shutil, sys; sys.exit(shutil.disk_usage('.').free < $gb * 2**30)" ||
        die "less than $gb GB are free on the disk of $PWD; make room there and run this again"
    say "installing the Python packages into .venv: only the first time, 1 to 5 minutes with a" \
        "good network (needs $gb GB of disk)"
    rm -f .venv/.installed-*
    extras=$(IFS=,; printf '%s' "$*")
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -e ".${extras:+[$extras]}" ||
        die "pip could not install (its reason is above); check the network or proxy, or set" \
            "PIP_INDEX_URL to a mirror, then run this again"
    for extra in base "$@"; do
        printf '%s\n' "$checksum" >".venv/.installed-$extra"
    done
}
