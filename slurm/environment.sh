# What every job of this folder needs around its program. A variable that is set when the job is submitted is kept.
container=()  # if TGDPO_CONTAINER names an image (Pyxis); otherwise the Python environment that TGDPO_VENV names
if [[ -n ${TGDPO_CONTAINER:-} ]]; then
    container=("--container-image=$TGDPO_CONTAINER" "--container-mounts=${TGDPO_MOUNTS:-$PWD:$PWD}" "--container-workdir=$PWD")
elif [[ -r ${TGDPO_VENV:-.venv}/bin/activate ]]; then
    source "${TGDPO_VENV:-.venv}/bin/activate"
fi
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}  # compute nodes seldom reach a hub; tools.submit downloads before it queues
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}  # of each rank: one for every core of the node would hold up all others
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # a link that fails says so
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # collectives start before what overlaps with them

# End with a program's exit code. 75 means "queue me again". A cancelled job is not RUNNING any more, and stays cancelled.
end_with() {
    local code=$1 left state
    for ((left = 5; code == 75 && left; left--)); do  # Slurm may not answer for a moment
        state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) || state=""
        [[ ${state:-RUNNING} == RUNNING ]] || break
        if [[ -n $state || $left == 1 ]] && scontrol requeue "$SLURM_JOB_ID"; then break; else sleep 4; fi
    done
    exit "$code"
}

once() { local code=0  # Run a program on the first node of the job: once PROGRAM ARGUMENTS...
    srun --nodes=1 --ntasks=1 --cpu-bind=none "${container[@]}" python -m tgdpo_megatron "$@" || code=$?; end_with "$code"
}

# Start a program's launcher on each node of the job: on_each_node PROGRAM ARGUMENTS... When one ends, all end by
# themselves; what is left after a minute is killed. Of the signals, USR1 is handed on here, and SIGTERM by Slurm itself.
on_each_node() {
    local port=$((20000 + SLURM_JOB_ID % 12000)) code asked=1 step
    local meet=${TGDPO_RENDEZVOUS:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    # shellcheck disable=SC2016  # each node has a SLURM_NODEID of its own
    srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 --cpu-bind=none "${container[@]}" \
        bash -c 'exec python -m tgdpo_megatron "$0" --node-rank "$SLURM_NODEID" "$@"' "$1" \
        --nnodes "$SLURM_NNODES" --rdzv-endpoint "$meet:$port" --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "${@:2}" &
    step=$!; trap 'asked=1; kill -USR1 "$step" || true' USR1; trap 'asked=1' TERM
    while ((asked)); do asked=0 code=0; wait "$step" || code=$?; done  # a signal interrupts wait
    end_with "$code"
}
