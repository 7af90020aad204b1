#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster through xpk; --help explains.
set -euo pipefail
# shellcheck source=launch/cluster.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/cluster.sh"

usage() {
    cat <<'END_OF_USAGE'
usage: bash launch/xpk.sh --cluster CLUSTER --name NAME --type TYPE --image IMAGE [options] -- ARGUMENTS OF sit_jax.main

    docker build -f launch/Dockerfile --build-arg EXTRA=tpu --build-arg RUN_AS=root -t IMAGE . && docker push IMAGE
    bash launch/xpk.sh --cluster mine --name sit --type v5litepod-256 --image IMAGE -- \
        --config configs/imagenet.py --workdir gs://BUCKET/sit

Submits the workload and returns; `xpk workload list --cluster CLUSTER` shows it. When its nodes are lost, or training
stops early because they are to go, the workload starts again and goes on from the last checkpoint in the workdir.

--type TYPE        xpk's --tpu-type: v5litepod-N, v5p-N, v6e-N, tpu7x-N ...
--slices N         number of slices (default: 1)
--restarts N       how often the workload may start again (default: 100)
--project PROJECT, --zone ZONE   default: gcloud's
--flags FILE       compiler flags, such as launch/compiler_flags/v5e.flags (default: none)
--dry_run          print the command, run nothing; xpk need not be installed
END_OF_USAGE
}

cluster='' name='' type='' image='' slices=1 restarts=100 project='' zone=''
read_arguments "cluster name type image slices restarts project zone" "" "$@"
need cluster name type image
need_remote_run
need_tool xpk "https://github.com/AI-Hypercomputer/xpk (pip install xpk)"
line=$(main_line LIBTPU_INIT_ARGS bash launch/in_pod.sh)

# exec: xpk hands SIGTERM to the process it started, which must be in_pod.sh and not a shell around it.
run xpk workload create --cluster="$cluster" --workload="$name" --tpu-type="$type" --num-slices="$slices" \
    --docker-image="$image" --max-restarts="$restarts" --termination-grace-period-seconds=120 \
    ${project:+--project="$project"} ${zone:+--zone="$zone"} --command="exec $line"
