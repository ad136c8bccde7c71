#!/usr/bin/env bash
# usage: CLUSTER=NAME WORKLOAD=NAME TYPE=v6e-16 IMAGE=IMAGE RUNS=gs://BUCKET/runs [SLICES=1] [RESTARTS=50]
#            [DRY_RUN=1] xpk.sh COMMAND CONFIG [--FIELD VALUE ...]
# Submits a run to a GKE cluster by XPK. IMAGE was built with the Dockerfile beside this script.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/tpu/common.sh
. "$here/common.sh"
[ $# -ge 2 ] || usage
need CLUSTER WORKLOAD TYPE IMAGE RUNS
# With `exec`, SIGTERM reaches nested-reft: XPK sends it to the shell in which the command stands.
run xpk workload create "--cluster=$CLUSTER" "--workload=$WORKLOAD" "--tpu-type=$TYPE" "--num-slices=${SLICES:-1}" \
    "--docker-image=$IMAGE" "--env=RUNS=$RUNS" --env=NESTED_REFT_COORDINATOR=auto --env=JAX_PLATFORMS=tpu,cpu \
    "--max-restarts=${RESTARTS:-50}" --restart-on-exit-codes=75,76 --termination-grace-period-seconds=60 \
    "--command=exec scripts/tpu/start.sh $(quoted "$@")"
