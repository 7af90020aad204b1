#!/usr/bin/env bash
# Download and convert the published SiT-XL/2 and draw samples of it; see --help.
set -euo pipefail

file=SiT-XL-2-256.pt
# As recorded by two projects that use this file.
sha256=e645b5cd82d1d645cfd9b7c96041b56b2a0aa61faed90c0869e79be02ab55aca
home=https://huggingface.co/nyu-visionx/SiT-collections
# Its authors keep the file at the first address. The second is the one in their README, which they
# have announced they will give up.
urls=(
    "$home/resolve/main/$file"
    "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/$file?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"
)
vae=stabilityai/sd-vae-ft-mse
folder=runs/pretrained

# From sample.py of the PyTorch reference: its eight labels, its guidance, and the defaults of its
# two samplers.
common=(
    "--config.sample.labels=207,360,387,974,88,979,417,279" --config.sample.cfg_scale=4
    --config.sample.cfg_channels=3 --config.sample.count=8 --config.sample.batch=8
    --config.sample.columns=4
)
ode=(
    --config.sample.solver=dopri5 --config.sample.steps=none --config.sample.atol=1e-6
    --config.sample.rtol=1e-3
)
sde=(
    --config.sample.solver=euler-maruyama --config.sample.steps=249
    --config.sample.diffusion_form=sigma --config.sample.diffusion_norm=1
    --config.sample.last_step=mean --config.sample.last_step_size=0.04
)

usage() {
    cat <<END
usage: bash launch/sample_pretrained.sh [ode|sde] [options] [--config.KEY=VALUE ...]

Install the base into .venv (only the first time), download the published SiT-XL/2 for ImageNet
256x256 (2.7 GB; an interrupted download is resumed), convert it, and draw the reference's eight
labels with guidance 4, as its sample.py does: with ODE by default (dopri5), or with SDE
(Euler-Maruyama, 250 evaluations). Files go to $folder in the repository (6 GB), the VAE to
Hugging Face's cache; existing ones are used again. The last line printed is the path of the sheet.
Meant for an accelerator: one evaluation of the eight images takes a CPU core about 40 s.

--checkpoint FILE   your own .pt or .safetensors in place of the download
--workdir WORKDIR   folder of the converted model and its samples (default: in $folder,
                    named after the file)
--weights ema|raw, --num_heads N, --num_classes N, --image_size PIXELS
                    passed on to the conversion: python -m convert.from_torch --help
--vae FOLDER        folder with a VAE's config.json and diffusion_pytorch_model.safetensors, in
                    place of $vae
--config.KEY=VALUE  any setting of sit_jax/settings.py, such as --config.sample.seed=1 or
                    --config.sample.labels=1,2,3

PYTHON=/path/to/python3.11   the interpreter that makes .venv

Without a network: copy $file (sha256 $sha256)
from $home into $folder, and the two files
of https://huggingface.co/$vae into a folder for --vae.
END
}

# Print a path relative to the caller's folder, which is left below, as an absolute path.
absolute() { case $1 in /*) printf '%s\n' "$1" ;; *) printf '%s\n' "$PWD/$1" ;; esac; }

refuse() { printf 'error: %s; see bash launch/sample_pretrained.sh --help\n' "$*" >&2; exit 2; }

sampler=ode checkpoint='' workdir=''
decoder="--config.latents.repo=$vae"
settings=()
conversion=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit ;;
        ode | sde) sampler=$1 ;;
        --config.*=*) settings+=("$1") ;;
        --checkpoint=* | --workdir=* | --vae=* | --weights=* | --num_heads=* | --num_classes=* | \
            --image_size=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
        --checkpoint | --workdir | --vae)
            [ "${2:-}" ] || refuse "$1 has no value"
            path=$(absolute "$2")
            case $1 in
                --checkpoint)
                    [ -f "$path" ] || refuse "--checkpoint $2 is not a file"
                    checkpoint=$path
                    ;;
                --workdir) workdir=$path ;;
                --vae)
                    [ -d "$path" ] || refuse "--vae $2 is not a folder"
                    decoder="--config.latents.path=$path"
                    ;;
            esac
            shift
            ;;
        --weights | --num_heads | --num_classes | --image_size)
            [ "${2:-}" ] || refuse "$1 has no value"
            conversion+=("$1=$2")
            shift
            ;;
        *) refuse "unknown argument $1" ;;
    esac
    shift
done
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/lib.sh

# is_published FILE: succeed if the file has the published sha256.
is_published() {
    .venv/bin/python -c 'import hashlib, sys
with open(sys.argv[1], "rb") as file:
    sys.exit(hashlib.file_digest(file, "sha256").hexdigest() != sys.argv[2])' "$1" "$sha256"
}

# Download the published file to $folder/$file and check it, or stop. An interrupted download stays
# beside it and is resumed the next time.
download() {
    local target=$folder/$file part=$folder/$file.part url fetched=''
    if [ -e "$target" ]; then
        is_published "$target" ||
            die "$target is not the published file (its sha256 is not $sha256); remove it to" \
                "download it again, or use it as it is: --checkpoint $PWD/$target"
        return
    fi
    mkdir -p "$folder"
    for url in "${urls[@]}"; do
        say "downloading $url (2.7 GB)"
        # Less than 1 kB/s for a minute is a failure. Status 416 (nothing left to send) also counts
        # as one, but is harmless if the file is complete.
        if curl --fail --location --connect-timeout 30 --speed-time 60 --speed-limit 1000 \
            --continue-at - --output "$part" "$url"; then
            fetched=yes
            break
        fi
    done
    if [ -e "$part" ] && is_published "$part"; then
        mv "$part" "$target"
    elif [ "$fetched" ]; then
        mv "$part" "$target.refused"
        die "the file from $url is not the published file (its sha256 is not $sha256); it is kept" \
            "as $PWD/$target.refused: if you trust it, give it with --checkpoint, otherwise run" \
            "this again"
    else
        die "$file could not be downloaded (curl's reason is above); run this again to resume" \
            "from $part (remove that file to start over), or copy the file (2.7 GB, sha256" \
            "$sha256) from $home to $PWD/$target; without a network, also copy config.json and" \
            "diffusion_pytorch_model.safetensors of https://huggingface.co/$vae into a folder" \
            "for --vae"
    fi
}

set_up 3
name=${checkpoint:-$file}
name=${name##*/}
workdir=${workdir:-$folder/${name%.*}}
# Identifies the conversion, so that another file of the same name, or one converted otherwise, is
# not mistaken for it.
source=${checkpoint:-$file}
[ ! "$checkpoint" ] || source="$checkpoint, $(wc -c <"$checkpoint") bytes"
# ${array[@]+...}, here and below: bash 3.2 treats an empty array as unset.
for flag in ${conversion[@]+"${conversion[@]}"}; do source+=" $flag"; done
if [ ! -e "$workdir/config.json" ]; then
    if [ ! "$checkpoint" ]; then
        download
        checkpoint=$folder/$file
    fi
    say "converting $checkpoint"
    .venv/bin/python -m convert.from_torch "$checkpoint" "$workdir" \
        ${conversion[@]+"${conversion[@]}"}
    printf '%s\n' "$source" >"$workdir/converted-from"
elif [ "$checkpoint${conversion[*]-}" ] && [ "$(cat "$workdir/converted-from" 2>/dev/null)" != "$source" ]; then
    die "$workdir was not converted from $source; give another folder with --workdir"
fi
say "sampling"
if [ "$sampler" = sde ]; then solver=("${sde[@]}"); else solver=("${ode[@]}"); fi
.venv/bin/python -m sit_jax.main --mode sample --workdir "$workdir" \
    "$decoder" "${common[@]}" "${solver[@]}" ${settings[@]+"${settings[@]}"}
