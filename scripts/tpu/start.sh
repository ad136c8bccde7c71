#!/usr/bin/env bash
# usage: RUNS=DIRECTORY [DRY_RUN=1] start.sh COMMAND CONFIG [--FIELD VALUE ...]
# Continues the newest run in RUNS that has a checkpoint, or starts one there. COMMAND is train, sft, dpo or
# reward-model. RUNS is a directory for this run alone, which every host sees, or gs://BUCKET/NAME.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/tpu/common.sh
. "$here/common.sh"
[ $# -ge 2 ] || usage
need RUNS
check RUNS
check_command "$1" "$2"
use_environment

set -- nested-reft "$@" --runs "$RUNS"
if [ "${DRY_RUN:-}" != 1 ]; then
    newest=$(python "$here/newest_run.py" "$RUNS") || {
        code=$?
        # 2 is a mistake. Anything else may pass, such as a disk that does not answer. A new run must not begin then.
        [ "$code" != 2 ] || exit 2
        exit 75
    }
    [ -z "$newest" ] || set -- "$@" --resume "${newest#* }"
fi
# The script becomes the command, so that signals reach it.
run exec "$@"
