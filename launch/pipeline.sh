#!/usr/bin/env bash
# Run all stages of one experiment on this machine, one after the other. Run it again to continue where it stopped.
#
#   bash launch/pipeline.sh EXPERIMENT.toml [LAUNCHER FLAG ...] [-- STAGE OPTION ...]
#
#   bash launch/pipeline.sh pipelines/configs/demo.toml                          all GPUs, or two processes on the CPU
#   bash launch/pipeline.sh pipelines/configs/demo.toml --num_processes 4
#   bash launch/pipeline.sh pipelines/configs/demo.toml -- --run.root runs/again
#
# Launcher flags go to `accelerate launch` and win over the file of launch/accelerate/ that fits this machine. Stage
# options go to every stage, so only --run.* makes sense. ACCELERATE_USE_CPU=true leaves the GPUs alone.
# Ctrl-C or SIGTERM stop the stage at its next update, with a checkpoint; a second one does not wait for the update.
# Exit code: 0 done, 2 bad input or configuration, 75 stopped and resumable, 1 failure.
set -euo pipefail

root="$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="$root/.venv/bin/python"
# shellcheck source=launch/stages.sh
source "$root/launch/stages.sh"

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
case ${1:-} in
    -h | --help)
        usage
        exit 0
        ;;
    "" | -*)
        usage >&2
        exit 2
        ;;
esac
experiment="$1"
if [[ ! -f $experiment ]]; then
    echo "pipeline.sh: there is no file $experiment in $PWD" >&2
    exit 2
fi
printf -v this_command '%q ' bash "${BASH_SOURCE[0]}" "$@"
take_flags "${@:2}"
options=(--config "$experiment" "${stage_options[@]}")

bash "$root/launch/setup.sh"
began_all=$SECONDS
# The packages come from .venv, never from a folder that happens to be called data/ or models/ where we were started.
export PYTHONSAFEPATH=1

# All configurations are checked before the first stage works: a mistake in the last one shows now.
choose_stages "$experiment"
scratch="$(mktemp -d)"
trap 'rm -rf -- "$scratch"' EXIT
checks=()
for stage in "${stages[@]}"; do
    read -ra words <<<"$stage"
    stage_folder "${words[@]}" "${options[@]}" >"$scratch/$stage" &
    checks+=($!)
done
mistaken=0
for check in "${checks[@]}"; do wait "$check" || mistaken=$?; done
((mistaken == 0)) || exit "$mistaken"

choose_machine
stop_on_signals
number=0
for stage in "${stages[@]}"; do
    number=$((number + 1))
    read -ra words <<<"$stage"
    run_stage "$number/${#stages[@]} $stage" "${words[0]}" "$(<"$scratch/$stage")" "${words[@]:1}" "${options[@]}"
done

# Absolute, so that what is printed works from any folder.
results="$(cd -- "$(<"$scratch/evaluate")" && pwd)"
# What a slow or absent server has not taken yet; it costs the stages no time, and a failure here loses nothing.
"$python" -m pipelines.tools.sync "$(dirname -- "$results")" || say "MLflow is not complete; the line above says how to send the rest."
store="${MLFLOW_TRACKING_URI:-sqlite:///$(dirname -- "$(dirname -- "$results")")/mlflow.db}"
runs="#/experiments?workflowType=machine_learning"
if [[ $store == http* ]]; then
    tracked="$store/$runs"
else
    tracked="$(printf '%q ' "$python" -m mlflow ui --backend-store-uri "$store")
            shows the runs at http://127.0.0.1:5000/$runs"
fi
cat <<SUMMARY

All stages took $((SECONDS - began_all)) s.
  samples   $results/samples.png
  metrics   $results/metrics.json
  MLflow    $tracked
SUMMARY
