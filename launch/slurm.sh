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
    cat <<'END_OF_USAGE'
usage: sbatch [options of sbatch] launch/slurm.sh [--flags FILE] -- ARGUMENTS
       bash launch/slurm.sh --dry_run -- ARGUMENTS

    sbatch --nodes=4 --time=12:00:00 launch/slurm.sh -- \
        --config configs/imagenet.py --workdir /scratch/sit

Run sit_jax.main with ARGUMENTS on all GPUs of the job, one process per GPU. Submit from the root of
the repository, which must be on a disk that all nodes share and hold a .venv for GPUs:
    python3 -m venv .venv && .venv/bin/pip install -e ".[cuda12]"
Options of sbatch override the #SBATCH lines of this file, which ask for nodes with 8 GPUs; always
give --gpus-per-node and --ntasks-per-node together. SLURM sends SIGTERM two minutes before the time
limit, and when a job of higher priority needs the nodes. Training then saves and stops, and the job
is queued again and continues from that checkpoint.

--flags FILE   compiler flags, such as launch/compiler_flags/h100.flags (default: none)
--dry_run      print the command and do not run it; works without SLURM
END_OF_USAGE
}

read_arguments "" "" "$@"
[ "${#arguments[@]}" -gt 0 ] || die "no arguments for sit_jax.main; give them after --; see --help"
require_tool srun https://slurm.schedmd.com/srun.html
if [ "${SLURM_JOB_ID:-}" ]; then
    gpus=${SLURM_GPUS_ON_NODE:-0} nodes=${SLURM_JOB_NUM_NODES:-1}
    [ "$gpus" -gt 0 ] ||
        die "the job has no GPUs; add --gpus-per-node=N --ntasks-per-node=N to sbatch"
    [ "${SLURM_NTASKS:-$nodes}" -eq $((nodes * gpus)) ] ||
        die "${SLURM_NTASKS:-$nodes} tasks for $((nodes * gpus)) GPUs ($nodes nodes of $gpus);" \
            "each GPU needs its own task: add --ntasks-per-node=$gpus to sbatch"
elif [ -z "$dry_run" ]; then
    die "not in a SLURM job; submit it with: sbatch launch/slurm.sh ..., or add --dry_run"
fi
if [ "$flags" ]; then
    flags_line=$(read_flags "$flags")
    export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$flags_line"
    [ -z "$dry_run" ] || printf 'export %s\n' "$(quote "XLA_FLAGS=$XLA_FLAGS")"
fi

# srun does not inherit --cpus-per-task from sbatch. All GPUs of a node stay visible to its tasks:
# JAX picks the one of its local rank, and NCCL reaches the others directly. If one process dies,
# --kill-on-bad-exit ends all of them.
status=0
train run srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" \
    .venv/bin/python -m sit_jax.main "${arguments[@]}" || status=$?
if [ "$status" -ne "$STOPPED_EARLY" ]; then exit "$status"; fi
# A cancelled job is no longer RUNNING and must not be queued again.
if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    say "training stopped early after saving; queueing the job again"
    scontrol requeue "$SLURM_JOB_ID"
fi
