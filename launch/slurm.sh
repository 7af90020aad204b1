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
# Trains on the GPUs of a SLURM job, one process per GPU, from one time limit to the next; --help explains.
set -euo pipefail
CDPATH='' cd -- "${SLURM_SUBMIT_DIR:-$(dirname -- "${BASH_SOURCE[0]}")/..}" # SLURM runs a copy of this file
[ -f launch/cluster.sh ] || { echo "error: $PWD is not the repository; run sbatch from there" >&2; exit 2; }
. launch/cluster.sh

usage() {
    cat <<'END_OF_USAGE'
usage: sbatch [options of sbatch] launch/slurm.sh [--flags FILE] -- ARGUMENTS OF sit_jax.main
       bash launch/slurm.sh --dry_run -- ARGUMENTS OF sit_jax.main

    sbatch --nodes=4 --time=12:00:00 launch/slurm.sh -- --config configs/imagenet.py --workdir /scratch/sit

Run it in the repository, with .venv made there for GPUs on a disk that all nodes see:
    python3 -m venv .venv && .venv/bin/pip install -e ".[cuda12]"
Options of sbatch replace the #SBATCH lines (nodes of 8 GPUs): --gpus-per-node and --ntasks-per-node go together.
Two minutes before the time limit, and when a job of higher priority needs the nodes, SLURM sends SIGTERM: training
saves and stops, the job is queued again, and goes on from there.

--flags FILE   compiler flags, such as launch/compiler_flags/h100.flags (default: none)
--dry_run      print the command, run nothing; without SLURM too
END_OF_USAGE
}

read_arguments "" "" "$@"
[ "${#arguments[@]}" -gt 0 ] || die "no arguments of sit_jax.main; give them after --; see --help"
need_tool srun https://slurm.schedmd.com/srun.html
if [ "${SLURM_JOB_ID:-}" ]; then
    gpus=${SLURM_GPUS_ON_NODE:-0} nodes=${SLURM_JOB_NUM_NODES:-1}
    [ "$gpus" -gt 0 ] || die "the job has no GPUs; add --gpus-per-node=N --ntasks-per-node=N to sbatch"
    [ "${SLURM_NTASKS:-$nodes}" -eq $((nodes * gpus)) ] ||
        die "${SLURM_NTASKS:-$nodes} tasks for $((nodes * gpus)) GPUs ($nodes nodes of $gpus); a process drives one GPU," \
            "the others would idle: add --ntasks-per-node=$gpus to sbatch"
elif [ -z "$dry_run" ]; then
    die "not in a SLURM job; submit it with: sbatch launch/slurm.sh ..., or add --dry_run"
fi
if [ "$flags" ]; then
    line=$(read_flags "$flags")
    export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$line"
    [ -z "$dry_run" ] || printf 'export %s\n' "$(quoted "XLA_FLAGS=$XLA_FLAGS")"
fi

# srun does not take --cpus-per-task over from sbatch. All GPUs of a node stay visible to its tasks: JAX picks the one
# of its local rank, and NCCL reaches the others directly. One lost process ends all.
status=0
train run srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" \
    .venv/bin/python -m sit_jax.main "${arguments[@]}" || status=$?
if [ "$status" -ne "$STOPPED_EARLY" ]; then exit "$status"; fi
# A job that was cancelled is no longer RUNNING; it is not to come back.
if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    say "training stopped early, saved; queueing the job again"
    scontrol requeue "$SLURM_JOB_ID"
fi
