#!/usr/bin/env bash
# Submit all stages of one experiment to Slurm, each to start when the one before it has succeeded.
#
#   bash launch/slurm/submit.sh EXPERIMENT.toml [SBATCH OPTION ...] [-- STAGE OPTION ...]
#   bash launch/slurm/submit.sh pipelines/configs/imagenet256.toml \
#       --nodes 4 --gpus-per-node 8 --cpus-per-task 96 --time 24:00:00
#
# The sbatch options go to every job, except that prepare_corpus, which is bound by reading, gets one node.
# Prints one line a stage: its name and its job. Submitting again is harmless: finished stages end at once.
set -euo pipefail

root="$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
python="${LATENTLINE_PYTHON:-$root/.venv/bin/python}"
# shellcheck source=launch/stages.sh
source "$root/launch/stages.sh"
if (($# == 0)) || [[ $1 == -* ]]; then
    say "usage: bash launch/slurm/submit.sh EXPERIMENT.toml [SBATCH OPTION ...] [-- STAGE OPTION ...]"
    exit 2
fi
if [[ ! -x $python ]]; then
    say "submit.sh: there is no $python. Make it once: LATENTLINE_TORCH=cuda bash launch/setup.sh gpu eval remote text"
    exit 2
fi
experiment="$1"
shift
sbatch_options=()
while (($# > 0)) && [[ $1 != -- ]]; do
    sbatch_options+=("$1")
    shift
done
options=(--config "$experiment" "${@:2}")
export LATENTLINE_ROOT="$root" PYTHONSAFEPATH=1

# Better a message here than in a job that starts next week.
mistaken=0
choose_stages "$experiment"
for stage in "${stages[@]}"; do
    read -ra words <<<"$stage"
    stage_folder "${words[@]}" "${options[@]}" >/dev/null || mistaken=$?
done
((mistaken == 0)) || exit "$mistaken"

previous=""
for stage in "${stages[@]}"; do
    read -ra words <<<"$stage"
    job=(--parsable --job-name "${words[0]}" "${sbatch_options[@]}")
    if [[ $stage == prepare_corpus ]]; then job+=(--nodes 1); fi
    if [[ -n $previous ]]; then job+=(--dependency "afterok:$previous" --kill-on-invalid-dep=yes); fi
    previous="$(sbatch "${job[@]}" "$root/launch/slurm/stage.sbatch" "${words[@]}" "${options[@]}")"
    previous="${previous%%;*}" # with several clusters: JOB;CLUSTER
    printf '%-16s %s\n' "$stage" "$previous"
done
