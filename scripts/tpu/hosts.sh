#!/usr/bin/env bash
# usage: HOSTS="HOST ..." [DIRECTORY=nested_reft] [PORT=8476] [DRY_RUN=1] hosts.sh ACTION ...
#   start COMMAND CONFIG [--FIELD VALUE ...]
#          starts restart_loop.sh on every host, one process each, with RUNS=DIRECTORY, and comes back
#   log    shows the last lines of every host's log
#   stop   lets the run end with a checkpoint
# The hosts are reached by ssh. Each has a checkout in DIRECTORY, and all of them reach the first one at PORT. LIMIT and
# WAIT go to restart_loop.sh.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/tpu/common.sh
. "$here/common.sh"
[ $# -ge 1 ] || usage
need HOSTS
check HOSTS DIRECTORY PORT RUNS LIMIT WAIT
action=$1
shift
case $action in
    start)
        [ $# -ge 2 ] || usage
        need RUNS
        check_command "$1" "$2"
        ;;
    log | stop) ;;
    *) usage ;;
esac

read -ra names <<< "$HOSTS"
if [ ${#names[@]} = 1 ]; then
    refuse "HOSTS is one host; run restart_loop.sh there"
fi
index=0
for host in "${names[@]}"; do
    variables=("NESTED_REFT_COORDINATOR=${names[0]}:${PORT:-8476}" "NESTED_REFT_PROCESSES=${#names[@]}")
    variables+=("NESTED_REFT_PROCESS=$index" "RUNS=${RUNS:-}" "LIMIT=${LIMIT:-5}" "WAIT=${WAIT:-10}")
    case $action in
        start) command=$(detached "$(quoted env "${variables[@]}" scripts/tpu/restart_loop.sh "$@")") ;;
        log) command="tail -n 20 nested_reft.log" ;;
        stop) command=$STOP ;;
    esac
    run ssh "$host" "cd $(quoted "${DIRECTORY:-nested_reft}") && $command"
    index=$((index + 1))
done
