#!/usr/bin/env bash
# usage: NAME=NAME ZONE=ZONE TYPE=v6e-8 RUNS=gs://BUCKET/NAME [MOUNT=COMMAND] [SLICES=1] [POLL=60] [KEEP=1]
#            [DRY_RUN=1] spot.sh COMMAND CONFIG [--FIELD VALUE ...]
# Trains on spot TPUs. It asks for them, installs and starts the run, and does so again whenever they are taken away.
# When the run has ended, it deletes the TPU, unless KEEP is 1, and ends with the run's exit code. It may be stopped and
# started again at any time: the run goes on by itself. RUNS has to outlive the TPU. Where it is in a network file
# system, MOUNT is run on each host before a start.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/tpu/common.sh
. "$here/common.sh"
[ $# -ge 2 ] || usage
need NAME ZONE TYPE RUNS
check NAME ZONE TYPE RUNS SLICES POLL KEEP LIMIT WAIT EXTRAS RUNTIME
check_command "$1" "$2"
export NAME ZONE TYPE RUNS SPOT=1

delete() {
    run gcloud compute tpus queued-resources delete "$NAME" "--zone=$ZONE" --force --quiet
}

mount_runs() {
    [ -z "${MOUNT:-}" ] || "$here/run_all_workers.sh" run bash -c "$MOUNT"
}

begin() {
    local code=0
    "$here/create.sh" || code=$?
    [ "$code" != 75 ] || return 0 # it was taken away before it was there
    [ "$code" = 0 ] || exit "$code"
    if ! { "$here/run_all_workers.sh" install && mount_runs && "$here/run_all_workers.sh" start "$@"; }; then
        # A TPU that is being taken away stays active for a while.
        sleep "${POLL:-60}"
        [ "$(state)" != ACTIVE ] || exit 1
    fi
}

# The state of the queued resource: NONE where there is none, and nothing where that could not be learnt.
state() {
    local describe=(gcloud compute tpus queued-resources describe "$NAME" "--zone=$ZONE" "--format=value(state.state)")
    "${describe[@]}" 2> "$errors" || ! grep -q NOT_FOUND "$errors" || echo NONE
}

# What restart_loop.sh leaves on the first host; nothing as long as it goes on.
exit_code() {
    local first=(tpu-vm ssh "$NAME" "--zone=$ZONE" --worker=0)
    if [ "${SLICES:-1}" != 1 ]; then
        first=(queued-resources ssh "$NAME" "--zone=$ZONE" --worker=0 --node=0)
    fi
    first+=("--command=cat nested_reft/nested_reft.code")
    gcloud compute tpus "${first[@]}" 2> /dev/null | grep -xE '[0-9]+' || true
}

if [ "${DRY_RUN:-}" = 1 ]; then
    begin "$@"
    delete
    exit
fi
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
while true; do
    case $(state) in
        NONE) begin "$@" ;;
        ACTIVE)
            code=$(exit_code)
            [ -z "$code" ] || break
            ;;
        SUSPENDED | FAILED) delete ;;
    esac
    sleep "${POLL:-60}"
done
echo "spot: the run ended with code $code" >&2
[ "${KEEP:-}" = 1 ] || delete
exit "$code"
