#!/usr/bin/env bash
#SBATCH --job-name=sit_jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Train on the GPUs of a SLURM job, one process per GPU, across time limits; see --help.
set -euo pipefail
# SLURM runs a copy of this file, so its own folder is of no use inside a job.
CDPATH='' cd -- "${SLURM_SUBMIT_DIR:-$(dirname -- "${BASH_SOURCE[0]}")/..}"
if [ ! -f launch/cluster.sh ]; then
    echo "error: $PWD is not the root of this repository; run sbatch from there" >&2
    exit 2
fi
. launch/cluster.sh

usage() {
    cat <<END_OF_USAGE
usage: sbatch [options of sbatch] launch/slurm.sh [options] -- ARGUMENTS
       bash launch/slurm.sh --dry_run [--gpus N] [options] -- ARGUMENTS

    sbatch --nodes=4 --time=12:00:00 launch/slurm.sh --data /shared/latents -- \\
        --config configs/latents.py --workdir /shared/sit

Run sit_jax.main with ARGUMENTS on all GPUs of the job, one process per GPU. Submit from the root of
the repository, which must be on a disk that all nodes share and hold a .venv for GPUs:
    python3 -m venv .venv && .venv/bin/pip install -e ".[cuda13]"
(".[cuda12]" if the nodes' driver is older than 580, as nvidia-smi shows it.)
Options of sbatch override the #SBATCH lines of this file, which ask for nodes with 8 GPUs; always
give --gpus-per-node and --ntasks-per-node together. SLURM sends SIGTERM two minutes before the time
limit, and when a job of higher priority needs the nodes. Training then saves and stops, and the job
is queued again and continues from that checkpoint.

--data SRC         stored latents on shared storage or in a bucket (gs://BUCKET/FOLDER, with gcsfs
                   in .venv): each node copies them once to its own disk and checks them before the
                   start, and --config.data.path is set to that copy. An interrupted copy is
                   continued
--scratch DIR      folder on the disk of each node for the copy (default: \$SLURM_TMPDIR)
$CHECK_HELP
--flags FILE       compiler flags, such as launch/compiler_flags/h100.flags (default: none)
--dry_run          check, print the commands and run none of them; works without SLURM
--gpus N           number of GPUs that --dry_run checks for (default: 8)
END_OF_USAGE
}

gpus=''
read_arguments "data scratch gpus" "no_check" "$@"
[ "${#arguments[@]}" -gt 0 ] || die "no arguments for sit_jax.main; give them after --; see --help"
read_data "${SLURM_TMPDIR:-}"
require_tool srun https://slurm.schedmd.com/srun.html
nodes=${SLURM_JOB_NUM_NODES:-1}
if [ "${SLURM_JOB_ID:-}" ]; then
    [ -z "$gpus" ] || die "--gpus is for --dry_run outside of a job; a job uses all of its GPUs"
    gpus=${SLURM_GPUS_ON_NODE:-0}
    [ "$gpus" -gt 0 ] ||
        die "the job has no GPUs; add --gpus-per-node=N --ntasks-per-node=N to sbatch"
    [ "${SLURM_NTASKS:-$nodes}" -eq $((nodes * gpus)) ] ||
        die "${SLURM_NTASKS:-$nodes} tasks for $((nodes * gpus)) GPUs ($nodes nodes of $gpus);" \
            "each GPU needs its own task: add --ntasks-per-node=$gpus to sbatch"
    gpus=$((nodes * gpus))
elif [ -z "$dry_run" ]; then
    die "not in a SLURM job; submit it with: sbatch launch/slurm.sh ..., or add --dry_run"
fi
manifest=$data
case $dry_run$data in yesgs://*) say "--dry_run does not read $data"; manifest='' ;; esac
[ "$no_check" ] || check_start "${gpus:-8}" ${manifest:+--manifest "$manifest"}
if [ "$flags" ]; then
    flags_line=$(read_flags "$flags")
    export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$flags_line"
    [ -z "$dry_run" ] || printf 'export %s\n' "$(quote "XLA_FLAGS=$XLA_FLAGS")"
fi

cpus=${SLURM_CPUS_PER_TASK:-8}
if [ "$data" ]; then # one task on each node, and not one for each GPU
    run srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        --cpus-per-task="$cpus" "${data_command[@]}"
fi

# srun does not inherit --cpus-per-task from sbatch. All GPUs of a node stay visible to its tasks:
# JAX picks the one of its local rank, and NCCL reaches the others directly. If one process dies,
# --kill-on-bad-exit ends all of them.
status=0
train run srun --kill-on-bad-exit=1 --cpus-per-task="$cpus" \
    .venv/bin/python -m sit_jax.main "${arguments[@]}" || status=$?
if [ "$status" -ne "$STOPPED_EARLY" ]; then exit "$status"; fi
# A cancelled job is no longer RUNNING and must not be queued again.
if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    say "training stopped early after saving; queueing the job again"
    scontrol requeue "$SLURM_JOB_ID"
fi
