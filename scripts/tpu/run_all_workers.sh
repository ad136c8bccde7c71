#!/usr/bin/env bash
# usage: NAME=NAME ZONE=ZONE [SLICES=1] [DRY_RUN=1] run_all_workers.sh ACTION ...
#   install                 copies the commit that is checked out here to every host of a TPU, and installs it there
#   start COMMAND CONFIG [--FIELD VALUE ...]
#                           starts restart_loop.sh on every host, with RUNS=DIRECTORY, and comes back
#   log                     shows the last lines of every host's log
#   stop                    lets the run end with a checkpoint
#   run COMMAND [WORD ...]  runs a command in every host's checkout
# EXTRAS goes to install.sh; LIMIT and WAIT go to restart_loop.sh.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/tpu/common.sh
. "$here/common.sh"
[ $# -ge 1 ] || usage
need NAME ZONE
check NAME ZONE SLICES RUNS LIMIT WAIT EXTRAS
kind=tpu-vm
all=("--zone=$ZONE" --worker=all)
if [ "${SLICES:-1}" != 1 ]; then
    kind=queued-resources
    all+=(--node=all)
fi

on_hosts() {
    run gcloud compute tpus "$kind" ssh "$NAME" "${all[@]}" "--command=$1"
}

install() {
    local bundle="${TMPDIR:-/tmp}/nested_reft-$NAME.bundle"
    # A bundle keeps the name of the commit, which a run writes into its versions.json.
    run git -C "$here/../.." bundle create --quiet "$bundle" HEAD
    run gcloud compute tpus "$kind" scp "$bundle" "$NAME:nested_reft.bundle" "${all[@]}"
    on_hosts "git init --quiet nested_reft && cd nested_reft && git fetch --quiet ../nested_reft.bundle HEAD &&\
 git checkout --quiet --force FETCH_HEAD && $(quoted "EXTRAS=${EXTRAS:-tpu,tasks,data,math,gcs}") scripts/tpu/install.sh"
}

start() {
    local variables
    need RUNS
    # JAX_PLATFORMS makes a host that does not see its TPU fail, where JAX would take the CPU.
    variables=(NESTED_REFT_COORDINATOR=auto "JAX_PLATFORMS=tpu,cpu" "RUNS=$RUNS")
    variables+=("LIMIT=${LIMIT:-5}" "WAIT=${WAIT:-10}")
    on_hosts "cd nested_reft && $(detached "$(quoted env "${variables[@]}" scripts/tpu/restart_loop.sh "$@")")"
}

action=$1
shift
case $action in
    install) install ;;
    start)
        [ $# -ge 2 ] || usage
        check_command "$1" "$2"
        start "$@"
        ;;
    log) on_hosts "tail -n 20 nested_reft/nested_reft.log" ;;
    stop) on_hosts "cd nested_reft && $STOP" ;;
    run)
        [ $# -ge 1 ] || usage
        on_hosts "cd nested_reft && $(quoted "$@")"
        ;;
    *) usage ;;
esac
