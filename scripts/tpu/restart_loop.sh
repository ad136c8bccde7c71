#!/usr/bin/env bash
# usage: RUNS=DIRECTORY [LIMIT=5] [WAIT=10] [STATE=PATH] [DRY_RUN=1]
#            restart_loop.sh COMMAND CONFIG [--FIELD VALUE ...]
# Keeps a run going on this host. It is continued after a pre-emption (75), a stall (76) and a signal, and never after
# 0, 1, 2 or 130. The loop ends after LIMIT starts in a row that wrote no checkpoint. Before each further one it waits WAIT
# seconds, and WAIT more for each start before that wrote none. The loop holds PATH.lock and writes its number into
# PATH.pid; when the run ends, PATH.code gets its exit code. PATH is nested_reft in the checkout unless it is given.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/tpu/common.sh
. "$here/common.sh"
[ $# -ge 2 ] || usage
need RUNS
use_environment
state=${STATE:-$(cd "$here/../.." && pwd)/nested_reft}
if [ "${DRY_RUN:-}" = 1 ]; then
    exec "$here/start.sh" "$@"
fi

say() {
    echo "restart_loop: $*" >&2
}

newest() {
    python "$here/newest_run.py" "$RUNS"
}

# Waits for a process and puts its exit code into `code`. A signal for this script only interrupts it.
wait_for() {
    local before
    while true; do
        before=$signals code=0
        wait "$1" || code=$?
        [ "$before" != "$signals" ] || return 0
    done
}

# The lock stays with nested-reft, should the loop be killed: two must not work on one host.
exec 9> "$state.lock"
flock --nonblock 9 || {
    say "another one holds $state.lock"
    exit 2
}
rm -f "$state.code"
echo $$ > "$state.pid"

# Whatever stops a host sends SIGTERM to all its processes. A second one, from here, would end nested-reft before it has
# saved, so the loop passes no signals on.
signals=0 code=0 idle=0
trap 'signals=$((signals + 1)); say "stops as soon as nested-reft has ended"' TERM INT HUP

checkpoint=$(newest) || checkpoint=unknown
while [ "$signals" = 0 ]; do
    "$here/start.sh" "$@" &
    wait_for $!
    if [ "$signals" != 0 ] || ! may_restart "$code"; then
        break
    fi
    now=$(newest) || now=$checkpoint
    if [ "$now" = "$checkpoint" ]; then
        idle=$((idle + 1))
    else
        idle=0 checkpoint=$now
    fi
    if [ "$idle" -ge "${LIMIT:-5}" ]; then
        say "$idle starts in a row wrote no checkpoint"
        break
    fi
    pause=$((${WAIT:-10} * (idle + 1)))
    say "nested-reft ended with code $code; it starts again in $pause s"
    sleep "$pause" &
    wait $! || true
done
say "ended; the last exit code is $code"
# A loop that was stopped leaves no code, since its run is to go on.
[ "$signals" != 0 ] || echo "$code" > "$state.code"
exit "$code"
