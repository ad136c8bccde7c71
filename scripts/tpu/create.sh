#!/usr/bin/env bash
# usage: NAME=NAME ZONE=ZONE TYPE=v6e-8 [SPOT=1] [SLICES=1] [RUNTIME=VERSION] [DRY_RUN=1]
#            create.sh [--FLAG=VALUE ...]
# Asks for a TPU as a queued resource, and waits until it is there. Flags, such as --project, go to gcloud. The exit
# code is 75 where the request was taken and then came to nothing.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/tpu/common.sh
. "$here/common.sh"
need NAME ZONE TYPE
check NAME ZONE TYPE SLICES SPOT POLL RUNTIME
for word in "$@"; do
    case $word in
        --?*) ;;
        *) refuse "word is '$word'; allowed are flags of gcloud, --FLAG=VALUE" ;;
    esac
done

# The software of a TPU VM goes by the kind of TPU (docs.cloud.google.com/tpu/docs/runtimes).
case $TYPE in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    *) runtime=tpu-ubuntu2204-base ;;
esac
set -- "--zone=$ZONE" "--accelerator-type=$TYPE" "--runtime-version=${RUNTIME:-$runtime}" "$@"
if [ "${SLICES:-1}" = 1 ]; then
    set -- "--node-id=$NAME" "$@"
else
    set -- "--node-count=$SLICES" "--node-prefix=$NAME" "$@"
fi
[ "${SPOT:-}" != 1 ] || set -- "$@" --spot

run gcloud compute tpus queued-resources create "$NAME" "$@"
describe=(gcloud compute tpus queued-resources describe "$NAME" "--zone=$ZONE" "--format=value(state.state)")
if [ "${DRY_RUN:-}" = 1 ]; then
    run "${describe[@]}"
    exit
fi
while true; do
    state=$("${describe[@]}") || state="" # asked again later
    case $state in
        ACTIVE) exit ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING) break ;;
    esac
    echo "create: $NAME is ${state:-unknown}" >&2
    sleep "${POLL:-30}"
done
echo "error: $NAME is $state; gcloud compute tpus queued-resources describe $NAME --zone=$ZONE says why" >&2
exit 75
