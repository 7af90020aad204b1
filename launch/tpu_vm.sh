#!/usr/bin/env bash
# Trains on a Cloud TPU VM, through preemptions; --help explains.
set -euo pipefail
# shellcheck source=launch/cluster.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/cluster.sh"

usage() {
    cat <<'END_OF_USAGE'
usage: bash launch/tpu_vm.sh --name NAME --zone ZONE --type TYPE [options] -- ARGUMENTS OF sit_jax.main

    bash launch/tpu_vm.sh --name sit --zone us-west4-a --type v5litepod-16 --spot -- \
        --config configs/imagenet.py --workdir gs://BUCKET/sit

Creates the TPU VM (one that is there is used), copies this repository to all its workers, installs it, and runs
sit_jax.main on all of them. After a preemption: deletes what is left, creates it again, and runs the same command,
which goes on from the last checkpoint in the workdir. Where capacity may be short, queued_resources.sh waits in line.

--type TYPE        accelerator type: v4-N, v5litepod-N, v5p-N, v6e-N
--version VERSION  runtime (default: the one for JAX on that type)
--project PROJECT  default: gcloud's
--spot             a Spot VM: cheaper, may be preempted
--flags FILE       compiler flags, such as launch/compiler_flags/v5e.flags (default: none)
--delete           delete the TPU when training is done
--dry_run          print the commands, run none; gcloud need not be installed
END_OF_USAGE
}

create_tpu() {
    run gcloud compute tpus tpu-vm create "$name" "${place[@]}" --accelerator-type="$type" --version="$version" \
        ${spot:+--spot}
}
delete_tpu() { run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet; }
tpu_state() { ask gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)'; }

read_tpu_arguments "$@"
train_on_tpu
