#!/usr/bin/env bash
# Bring the training data to this machine; see --help. The scripts for clusters run this on every
# host before each start.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/data.sh copy SRC DST
       bash launch/data.sh mount [--install] gs://BUCKET/FOLDER DST

copy    copy stored latents from SRC, a folder in a bucket or on shared storage, to the folder DST
        of this machine. Every file is checked by its SHA-256 (python -m sit_jax.data.fetch). A copy
        that was interrupted is continued; a complete one is checked in seconds.
mount   mount the bucket read-only with gcsfuse, so that its folder appears as DST, which must end
        in BUCKET/FOLDER. Nothing is copied or checked, and every read goes to the bucket.
        --install first installs gcsfuse if it is missing: it adds Google's apt repository with
        sudo, as on a TPU VM.
END
}

home=$HOME
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/lib.sh

install_gcsfuse() {
    local key=/usr/share/keyrings/cloud.google.asc apt=(sudo apt-get -o DPkg::Lock::Timeout=600 -qq)
    local packages=https://packages.cloud.google.com/apt codename
    say "installing gcsfuse from Google's apt repository"
    codename=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")
    curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    printf 'deb [signed-by=%s] %s gcsfuse-%s main\n' "$key" "$packages" "$codename" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    "${apt[@]}" update
    "${apt[@]}" install -y gcsfuse
}

# mount_bucket BUCKET FOLDER: mount unless the bucket is mounted there already, and works.
mount_bucket() {
    local place=${target%"/$2"} mounted
    [ "${place##*/}" = "$1" ] || die "DST '$target' does not end in $1/$2"
    mounted=$(findmnt --noheadings --output SOURCE --mountpoint "$place" || true)
    if [ "$mounted" = "$1" ] && [ -d "$target" ]; then
        say "$target is mounted already"
        return
    elif [ "$mounted" = "$1" ]; then # a gcsfuse that died leaves a mount that cannot be read
        fusermount -u "$place"
    elif [ "$mounted" ]; then
        die "$place has $mounted mounted; unmount it, or give another folder"
    fi
    say "mounting gs://$1 read-only on $place; nothing is copied, every read goes to the bucket"
    mkdir -p "$place"
    gcsfuse --implicit-dirs -o ro "$1" "$place"
    [ -d "$target" ] || die "gs://$1 has no folder $2"
}

case ${1:-} in
    -h | --help) usage; exit ;;
    copy | mount) what=$1; shift ;;
    *) die "expected copy or mount, not '${1:-}'; see --help" ;;
esac
install=''
if [ "$what" = mount ] && [ "${1:-}" = --install ]; then
    install=yes
    shift
fi
[ $# -eq 2 ] || die "expected SRC and DST; see --help"
source=${1%/}
target=$2
# The launch scripts do not know the home folder of this machine.
# shellcheck disable=SC2088
case $target in '~/'*) target=$home/${target#'~/'} ;; esac

if [ "$what" = copy ]; then
    python=.venv/bin/python
    [ -x "$python" ] || python=python # in the image
    exec "$python" -m sit_jax.data.fetch "$source" "$target"
fi
case $source in
    gs://?*/?*) ;;
    *) die "'$source' cannot be mounted; expected gs://BUCKET/FOLDER" ;;
esac
if ! command -v gcsfuse >/dev/null; then
    [ "$install" ] || die "gcsfuse is not installed; see" \
        "https://cloud.google.com/storage/docs/cloud-storage-fuse/install"
    install_gcsfuse
fi
source=${source#gs://}
mount_bucket "${source%%/*}" "${source#*/}"
