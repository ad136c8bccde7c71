#!/usr/bin/env bash
# usage: RUNS=DIRECTORY [LIMIT=20] [DRY_RUN=1]
#            sbatch --nodes=N --ntasks-per-node=GPUS --gpus-per-node=GPUS scripts/tpu/slurm.sh COMMAND CONFIG ...
# A batch job for Slurm, submitted from the checkout. It has one task for each GPU, or one for each host without GPUs. A
# run that may be continued goes back into the queue, at most LIMIT times.
#SBATCH --job-name=nested_reft
#SBATCH --output=nested_reft-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
here=${SLURM_SUBMIT_DIR:-.}/scripts/tpu # Slurm runs a copy of this file that lies elsewhere
# shellcheck source=scripts/tpu/common.sh
. "$here/common.sh"
[ $# -ge 2 ] || usage
need RUNS
check RUNS LIMIT
check_command "$1" "$2"
export RUNS NESTED_REFT_COORDINATOR=auto

code=0
run srun --kill-on-bad-exit=0 "$here/start.sh" "$@" || code=$?
if may_restart "$code" && [ "${SLURM_RESTART_COUNT:-0}" -lt "${LIMIT:-20}" ]; then
    echo "slurm: srun ended with code $code; the job goes back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
