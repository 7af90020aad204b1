#!/usr/bin/env bash
# Train on the TPUs of a GKE cluster through xpk; see --help.
set -euo pipefail
# shellcheck source=launch/cluster.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/cluster.sh"

usage() {
    cat <<END_OF_USAGE
usage: bash launch/xpk.sh --cluster CLUSTER --name NAME --type TYPE --image IMAGE [options] -- \\
           ARGUMENTS

    docker build -f launch/Dockerfile --build-arg EXTRA=tpu --build-arg RUN_AS=root -t IMAGE . &&
        docker push IMAGE
    bash launch/xpk.sh --cluster mine --name sit --type v5litepod-256 --image IMAGE \\
        --data gs://BUCKET/latents -- --config configs/latents.py --workdir gs://BUCKET/sit \\
        --config.mesh.fsdp=64 --config.mesh.data=-1

Submit a workload that runs sit_jax.main with ARGUMENTS, and return. \`xpk workload list --cluster
CLUSTER\` shows it. When its nodes are lost, or training stops early because they are about to be,
the workload restarts and continues from the last checkpoint in the workdir.

--type TYPE        xpk's --tpu-type: v5litepod-N, v5p-N, v6e-N, tpu7x-N, ...
--slices N         number of slices (default: 1)
--restarts N       how often the workload may restart (default: 100)
--project PROJECT  Google Cloud project (default: gcloud's)
--zone ZONE        Google Cloud zone (default: gcloud's)
$DATA_HELP
$CHECK_HELP
--flags FILE       compiler flags, such as launch/compiler_flags/v5e.flags (default: none)
--dry_run          check, print the command and do not run it; xpk need not be installed
END_OF_USAGE
}

cluster='' name='' type='' image='' slices=1 restarts=100 project='' zone=''
read_arguments "cluster name type image slices restarts project zone data scratch" "no_check" "$@"
require_options cluster name type image
require_bucket
require_remote_arguments
# shellcheck disable=SC2088 # each pod expands the ~
read_data '~/sit_data'
require_tool xpk "https://github.com/AI-Hypercomputer/xpk (pip install xpk)"
[ -z "$data" ] || require_tool gcloud https://cloud.google.com/sdk/docs/install
check_remote_start "$type" "$slices"
# exec: xpk sends SIGTERM to the process that it started, which must be in_pod.sh rather than a
# shell around it.
command="exec $(main_command LIBTPU_INIT_ARGS bash launch/in_pod.sh)"
[ -z "$data" ] || command="$(quote "${data_command[@]}") && $command"

run xpk workload create --cluster="$cluster" --workload="$name" --tpu-type="$type" \
    --num-slices="$slices" --docker-image="$image" --max-restarts="$restarts" \
    --termination-grace-period-seconds=120 \
    ${project:+--project="$project"} ${zone:+--zone="$zone"} --command="$command"
