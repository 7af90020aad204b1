#!/usr/bin/env bash
# Train on a Cloud TPU VM and continue after preemptions; see --help.
set -euo pipefail
# shellcheck source=launch/cluster.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/cluster.sh"

usage() {
    cat <<END_OF_USAGE
usage: bash launch/tpu_vm.sh --name NAME --zone ZONE --type TYPE [options] -- ARGUMENTS

    bash launch/tpu_vm.sh --name sit --zone us-west4-a --type v5litepod-16 --spot \\
        --data gs://BUCKET/latents -- --config configs/latents.py --workdir gs://BUCKET/sit

Create the TPU VM (or use the one that already exists), copy this repository to all its workers,
install it, and run sit_jax.main with ARGUMENTS on all of them. After a preemption, delete what is
left of the VM, create it again, and run the same command, which continues from the last checkpoint
in the workdir. Where capacity is short, use queued_resources.sh, which waits in a queue.

--type TYPE        accelerator type: v4-N, v5litepod-N, v5p-N, v6e-N
--version VERSION  runtime (default: the runtime for JAX on that type)
--project PROJECT  Google Cloud project (default: gcloud's)
--spot             create a Spot VM, which is cheaper but may be preempted
$DATA_HELP
--mount            instead of copying, mount the bucket of --data read-only with gcsfuse, which is
                   installed on the hosts if it is missing: for data other than stored latents, or
                   larger than the disk. Every read then goes to the bucket
$CHECK_HELP
--flags FILE       compiler flags, such as launch/compiler_flags/v5e.flags (default: none)
--delete           delete the TPU when training is done
--dry_run          check, print the commands and run none of them; gcloud need not be installed
END_OF_USAGE
}

create_tpu() {
    run gcloud compute tpus tpu-vm create "$name" "${place[@]}" --accelerator-type="$type" \
        --version="$version" ${spot:+--spot}
}
delete_tpu() { run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet; }
tpu_state() {
    query gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)'
}

read_tpu_arguments "$@"
train_on_tpu
