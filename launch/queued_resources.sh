#!/usr/bin/env bash
# Trains on a Cloud TPU that is asked for as a queued resource, through preemptions; --help explains.
set -euo pipefail
# shellcheck source=launch/cluster.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/cluster.sh"

usage() {
    cat <<'END_OF_USAGE'
usage: bash launch/queued_resources.sh --name NAME --zone ZONE --type TYPE [options] -- ARGUMENTS OF sit_jax.main

    bash launch/queued_resources.sh --name sit --zone us-west4-a --type v5litepod-16 --spot -- \
        --config configs/imagenet.py --workdir gs://BUCKET/sit

Asks for the TPU in Google Cloud's queue, waits until the request is ACTIVE, and goes on as tpu_vm.sh does: copies this
repository to all workers, installs it, and runs sit_jax.main. After a preemption it deletes the request, queues anew,
and runs the same command, which goes on from the last checkpoint in the workdir.

--type TYPE        accelerator type: v4-N, v5litepod-N, v5p-N, v6e-N
--version VERSION  runtime (default: the one for JAX on that type)
--project PROJECT  default: gcloud's
--spot             Spot capacity: cheaper, may be preempted
--flags FILE       compiler flags, such as launch/compiler_flags/v5e.flags (default: none)
--delete           delete the request and its TPU when training is done
--dry_run          print the commands, run none; gcloud need not be installed
END_OF_USAGE
}

create_tpu() {
    run gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
        --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot}
}
delete_tpu() { run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet; }

# An ACTIVE request says little of its TPU, which may be gone: what is asked then is the TPU.
tpu_state() {
    local state
    state=$(ask gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)')
    if [ "$state" = ACTIVE ]; then
        state=$(ask gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)')
        state=${state:-TERMINATED}
    fi
    printf '%s' "$state"
}

read_tpu_arguments "$@"
train_on_tpu
