# What the scripts beside it share; each of them reads it first.
# shellcheck shell=bash
set -euo pipefail

# Prints the first comment of a script, which says how it is used, and ends it.
usage() {
    sed -n '2,/^[^#]/s/^# //p' "$0" >&2
    exit 2
}

# Refuses to go on without the variables that it is given the names of.
need() {
    local variable missing=""
    for variable in "$@"; do
        [ -n "${!variable:-}" ] || missing+=" $variable"
    done
    [ -z "$missing" ] && return
    echo "error: not set:$missing" >&2
    usage
}

# The words as a shell would read them again; plain words stay as they are.
quoted() {
    local word line=""
    for word in "$@"; do
        case $word in
            "" | *[!A-Za-z0-9_./:=@%+,-]*) word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'" ;;
        esac
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

# Runs a command; with DRY_RUN=1 it is printed instead.
run() {
    if [ "${DRY_RUN:-}" = 1 ]; then quoted "$@"; else "$@"; fi
}

# Whether a run that ended with this code may be started again (nested_reft/exit_codes.py): 75 is pre-empted, 76 is
# stalled, and above 128 is a signal. SIGHUP, SIGINT, SIGQUIT and SIGPIPE come from a person who had enough.
may_restart() {
    case $1 in
        75 | 76 | 132 | 133 | 134 | 135 | 136 | 137 | 138 | 139 | 143) return 0 ;;
        *) return 1 ;;
    esac
}

# Puts the commands of the checkout's own environment first, where it has one.
use_environment() {
    local environment
    environment=${VENV:-$(dirname "$0")/../../.venv}
    if [ -d "$environment/bin" ]; then
        PATH=$(cd "$environment/bin" && pwd):$PATH
    fi
}

# A command in words that goes on when the shell that started it has gone. It is a process group of its own.
detached() {
    echo "{ setsid nohup $1 >> nested_reft.log 2>&1 < /dev/null & }"
}

# Stops the loop and what it has started: the loop passes no signals on, so they go to the group.
# shellcheck disable=SC2016,SC2034 # the host expands it; scripts beside this one use it
STOP='kill -TERM -- "-$(cat nested_reft.pid)"'
