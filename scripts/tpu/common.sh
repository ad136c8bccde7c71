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

# Refuses variables of a wrong form, before anything is printed or run. One that is empty or not set has a default.
check() {
    local variable form words
    for variable in "$@"; do
        [ -n "${!variable:-}" ] || continue
        case $variable in
            DRY_RUN | SPOT | KEEP) form="[01]" words="0 or 1" ;;
            SLICES | POLL) form="[1-9][0-9]{0,5}" words="a whole number, 1 or more" ;;
            LIMIT | WAIT | RESTARTS) form="0|[1-9][0-9]{0,5}" words="a whole number, 0 or more" ;;
            PORT) form="[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]" words="1 to 65535" ;;
            TYPE) form="[a-z0-9]+-[0-9]+(x[0-9]+)*" words="a kind of TPU and its size, such as v6e-8" ;;
            EXTRAS) form="[a-z0-9_]+(,[a-z0-9_]+)*" words="names of setup.py with commas between" ;;
            HOSTS) form=" *[A-Za-z0-9_][A-Za-z0-9_.@:%-]*( +[A-Za-z0-9_][A-Za-z0-9_.@:%-]*)* *" words="names with spaces between" ;;
            RUNS) form="gs://[a-z0-9][a-z0-9._-]+(/.*)?|[^-:]([^:]|:[^/])*" words="a directory, or gs://BUCKET/NAME" ;;
            NAME | ZONE | CLUSTER | WORKLOAD) form="[a-z]([a-z0-9-]*[a-z0-9])?" words="a name of a-z, 0-9 and -" ;;
            *) form="[^-].*" words="what does not begin with -" ;;
        esac
        [[ ${!variable} =~ ^($form)$ ]] || refuse "$variable is '${!variable}'; allowed is $words"
    done
}

# Refuses COMMAND and CONFIG that no run can begin with.
check_command() {
    case $1 in
        train | sft | dpo | reward-model) ;;
        *) refuse "COMMAND is '$1'; allowed are train, sft, dpo, reward-model" ;;
    esac
    case $2 in
        "" | -*) refuse "CONFIG is '$2'; allowed is the name of a configuration, or a .py file" ;;
    esac
}

# Ends a script that was given what cannot work.
refuse() {
    echo "error: $*" >&2
    exit 2
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

# Whether a run that ended with this code may be started again (nested_reft/exit_codes.py): 75 is a pre-emption, or a
# host that came late; 76 is stalled, and above 128 is a signal. SIGHUP, SIGINT, SIGQUIT and SIGPIPE come from a person
# who had enough.
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

# Any other value would look like a dry run, and run everything.
check DRY_RUN
