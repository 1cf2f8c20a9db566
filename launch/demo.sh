#!/usr/bin/env bash
# The whole road on the embedded corpus: set-up, then all stages with two processes, some ten minutes on two CPU cores.
#
#   bash launch/demo.sh [LAUNCHER FLAG ...] [-- STAGE OPTION ...]     as launch/pipeline.sh takes them
#
# Everything it writes is in the repository's runs/demo; run it again to continue or to see the summary again.
set -euo pipefail

root="$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$root"
# Two processes are enough for so small a corpus, also where there are eight GPUs.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0,1}"
exec bash launch/pipeline.sh pipelines/configs/demo.toml "$@"
