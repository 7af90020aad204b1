#!/usr/bin/env bash
# Runs sit_jax.main in a pod. Training that stops early, saved, because the pod is to go ends with status 0, which
# Kubernetes takes for done: here it is $STOPPED_EARLY, at which the workload starts again.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/cluster.sh

folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
mkfifo "$folder/said"
says_it_stopped <"$folder/said" &
reader=$!
python -m sit_jax.main "$@" >"$folder/said" &
main=$!
trap 'kill -TERM "$main"' TERM
status=0
wait "$main" || status=$?
while kill -0 "$main" 2>/dev/null; do # the signal ended the wait, not yet main
    status=0
    wait "$main" || status=$?
done
if wait "$reader" && [ "$status" -eq 0 ]; then status=$STOPPED_EARLY; fi
exit "$status"
