#!/usr/bin/env bash
# Train on a Cloud TPU requested as a queued resource and continue after preemptions; see --help.
set -euo pipefail
# shellcheck source=launch/cluster.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/cluster.sh"

usage() {
    cat <<END_OF_USAGE
usage: bash launch/queued_resources.sh --name NAME --zone ZONE --type TYPE [options] -- ARGUMENTS

    bash launch/queued_resources.sh --name sit --zone us-west4-a --type v5litepod-16 --spot \\
        --data gs://BUCKET/latents -- --config configs/latents.py --workdir gs://BUCKET/sit

Request the TPU in Google Cloud's queue and wait until the request is ACTIVE. Then do the same as
tpu_vm.sh: copy this repository to all workers, install it, and run sit_jax.main with ARGUMENTS.
After a preemption, delete the request, queue a new one, and run the same command, which continues
from the last checkpoint in the workdir.

--type TYPE        accelerator type: v4-N, v5litepod-N, v5p-N, v6e-N
--version VERSION  runtime (default: the runtime for JAX on that type)
--project PROJECT  Google Cloud project (default: gcloud's)
--spot             request Spot capacity, which is cheaper but may be preempted
$DATA_HELP
--mount            instead of copying, mount the bucket of --data read-only with gcsfuse, which is
                   installed on the hosts if it is missing: for data other than stored latents, or
                   larger than the disk. Every read then goes to the bucket
$CHECK_HELP
--flags FILE       compiler flags, such as launch/compiler_flags/v5e.flags (default: none)
--delete           delete the request and its TPU when training is done
--dry_run          check, print the commands and run none of them; gcloud need not be installed
END_OF_USAGE
}

create_tpu() {
    run gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
        --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot}
}
delete_tpu() {
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# An ACTIVE request does not imply that its TPU still exists, so query the TPU as well.
tpu_state() {
    local state
    state=$(query gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
        --format='value(state.state)')
    if [ "$state" = ACTIVE ]; then
        state=$(query gcloud compute tpus tpu-vm describe "$name" "${place[@]}" \
            --format='value(state)')
        state=${state:-TERMINATED}
    fi
    printf '%s' "$state"
}

read_tpu_arguments "$@"
train_on_tpu
