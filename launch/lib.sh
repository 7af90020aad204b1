# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh from the repository root: makes .venv and installs into it what is not there yet.

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# Prints the first Python >= 3.11 that can make a venv ($PYTHON alone if set), or says in one line what is missing.
find_python() {
    local candidates=(python3.13 python3.12 python3.11 python3) candidate found='' incomplete='' version
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        # A name may be found and still not run: pyenv's shim of a version that is not there.
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            found="$candidate, which is $version"
        elif ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            incomplete="$candidate has no venv module; on Debian or Ubuntu: sudo apt install python$version-venv"
        else
            printf '%s\n' "$candidate"
            return
        fi
    done
    [ -z "$incomplete" ] || die "$incomplete"
    die "Python 3.11 or newer is needed, found ${found:-none of: ${candidates[*]}};" \
        "install one, or name it: PYTHON=/path/to/python3.11 bash ${0##*/}"
}

venv_works() { .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Makes .venv unless a working one is there. A broken one is made anew in place (a venv cannot be moved), if it is ours.
make_venv() {
    local python
    if venv_works; then return; fi
    if { [ -e .venv ] || [ -L .venv ]; } && [ ! -e .venv/.made-by-sit_jax ]; then
        die "$PWD/.venv has no working Python 3.11 or newer with pip and was not made here; remove or rename it"
    fi
    python=$(find_python)
    say "making .venv with $python"
    rm -rf .venv
    mkdir .venv
    touch .venv/.made-by-sit_jax # first, so that one left half-made is known as ours
    "$python" -m venv .venv || die "$python -m venv failed (its reason is above)"
}

# set_up GB EXTRA...: a .venv with the base, this repository (editable) and extras of pyproject.toml; GB must be free.
# One stamp per extra holds the checksum of what it was installed from; all are gone while an installation is under way.
set_up() {
    local gb=$1 wanted extra is_done=yes extras
    shift
    make_venv
    wanted=$({ cat requirements.txt pyproject.toml; pwd; } | cksum)
    for extra in base "$@"; do
        [ "$(cat ".venv/.installed-$extra" 2>/dev/null)" = "$wanted" ] || is_done=''
    done
    if [ "$is_done" ]; then return; fi
    .venv/bin/python -c "import shutil, sys; sys.exit(shutil.disk_usage('.').free < $gb * 2**30)" ||
        die "less than $gb GB are free on the disk of $PWD; make room there and run this again"
    say "installing the Python packages into .venv: once, 1 to 5 minutes with a good network (needs $gb GB of disk)"
    rm -f .venv/.installed-*
    extras=$(IFS=,; printf '%s' "$*")
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}" ||
        die "pip could not install (its reason is above); check the network or proxy, or set PIP_INDEX_URL" \
            "to a mirror, then run this again"
    for extra in base "$@"; do
        printf '%s\n' "$wanted" >".venv/.installed-$extra"
    done
}
