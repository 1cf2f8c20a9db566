#!/usr/bin/env bash
# Run one machine's part of a stage that runs on several machines. The same command on each of them:
#
#   PET_NNODES=2 PET_NODE_RANK=0 PET_MASTER_ADDR=10.0.0.1 bash launch/node.sh STAGE --config EXPERIMENT.toml [OPTION ...]
#
# launch/slurm/ and launch/kubernetes/ call it. Variables, with the names that torchrun and Kubeflow use:
#   PET_NNODES           machines; 1
#   PET_NODE_RANK        number of this one, from 0; 0
#   PET_NPROC_PER_NODE   processes on each machine; else its GPUs, or 1 on the CPU
#   PET_MASTER_ADDR      address of machine 0, as the others reach it; needed for more than one machine
#   PET_MASTER_PORT      a free port of machine 0; 29500
#   LATENTLINE_PYTHON    the interpreter; else .venv of this repository, else python of the PATH (in an image)
# Become the launcher (exec), so that SIGTERM reaches it: it passes it on to the processes of the stage.
set -euo pipefail

root="$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
if (($# == 0)) || [[ $1 == -* ]]; then
    printf 'usage: bash launch/node.sh STAGE --config EXPERIMENT.toml [OPTION ...]\n' >&2
    exit 2
fi
stage="$1"
shift

python="${LATENTLINE_PYTHON:-}"
if [[ -z $python ]]; then
    if [[ -x $root/.venv/bin/python ]]; then python="$root/.venv/bin/python"; else python=python; fi
fi
export PYTHONSAFEPATH=1

num_gpus=0
if [[ ! ${ACCELERATE_USE_CPU:-} =~ ^(1|y|yes|t|true|True|on)$ ]]; then
    num_gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
fi
if ((num_gpus > 0)); then
    config="$root/launch/accelerate/multi_node.yaml"
else
    export ACCELERATE_USE_CPU=true
    config="$root/launch/accelerate/cpu.yaml"
fi

nodes="${PET_NNODES:-1}"
per_node="${PET_NPROC_PER_NODE:-auto}"
[[ $per_node =~ ^[0-9]+$ ]] || per_node=$((num_gpus > 0 ? num_gpus : 1))
cores="$(nproc)" # those that this task may use
if ((cores < per_node)); then
    printf 'node.sh: %s processes will share %s core(s). On Slurm: --cpus-per-task.\n' "$per_node" "$cores" >&2
fi
if ((nodes > 1)) && [[ -z ${PET_MASTER_ADDR:-} ]]; then
    printf 'node.sh: PET_NNODES = %s, but PET_MASTER_ADDR does not say where machine 0 is.\n' "$nodes" >&2
    exit 2
fi

exec "$python" -m accelerate.commands.launch --config_file "$config" \
    --num_machines "$nodes" --machine_rank "${PET_NODE_RANK:-0}" --num_processes $((nodes * per_node)) \
    --main_process_ip "${PET_MASTER_ADDR:-127.0.0.1}" --main_process_port "${PET_MASTER_PORT:-29500}" \
    --rdzv_backend static -m "pipelines.$stage" "$@"
