#!/usr/bin/env bash
# Run sit_jax.main in a pod. When the pod is about to be deleted, training saves and exits with
# status 0, which Kubernetes treats as success. This script then exits with $STOPPED_EARLY, at which
# xpk restarts the workload.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/cluster.sh

folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
mkfifo "$folder/output"
reports_early_stop <"$folder/output" &
reader=$!
python -m sit_jax.main "$@" >"$folder/output" &
main=$!
trap 'kill -TERM "$main"' TERM
status=0
wait "$main" || status=$?
while kill -0 "$main" 2>/dev/null; do # the signal interrupted wait; main is still running
    status=0
    wait "$main" || status=$?
done
if wait "$reader" && [ "$status" -eq 0 ]; then status=$STOPPED_EARLY; fi
exit "$status"
