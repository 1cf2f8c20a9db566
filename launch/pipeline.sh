#!/usr/bin/env bash
# Run all five stages of one experiment on this machine, one after the other. Run it again to continue where it stopped.
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

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
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
shift
launcher=()
while (($# > 0)) && [[ $1 != -- ]]; do
    launcher+=("$1")
    shift
done
options=(--config "$experiment" "${@:2}")

bash "$root/launch/setup.sh"
began_all=$SECONDS
# The packages come from .venv, never from a folder that happens to be called data/ or models/ where we were started.
export PYTHONSAFEPATH=1

# All five configurations are checked before the first stage works: a mistake in the last one shows now.
scratch="$(mktemp -d)"
trap 'rm -rf -- "$scratch"' EXIT
checks=()
for stage in "${stages[@]}"; do
    stage_folder "$stage" "${options[@]}" >"$scratch/$stage" &
    checks+=($!)
done
mistaken=0
for check in "${checks[@]}"; do wait "$check" || mistaken=$?; done
((mistaken == 0)) || exit "$mistaken"

# Without any --config_file, accelerate would read the one in the user's home.
if [[ " ${launcher[*]} " != *" --config"[_-]"file"* ]]; then
    num_gpus=0
    if [[ ! ${ACCELERATE_USE_CPU:-} =~ ^(1|y|yes|t|true|True|on)$ ]]; then
        num_gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
    fi
    case $num_gpus in
        0)
            export ACCELERATE_USE_CPU=true
            machine=(--config_file "$root/launch/accelerate/cpu.yaml")
            ;;
        1) machine=(--config_file "$root/launch/accelerate/single_gpu.yaml") ;;
        *) machine=(--config_file "$root/launch/accelerate/multi_gpu.yaml" --num_processes "$num_gpus") ;;
    esac
    launcher=("${machine[@]}" "${launcher[@]}")
fi

# A stage runs in a process group of its own (set -m), so that Ctrl-C reaches this script alone. The stage then gets
# one clear request: the file `stop` in its folder. Where that does not help, SIGTERM, which its launcher passes on.
set -m
stage_pid="" folder="" before="" requests=0
request_stop() {
    requests=$((requests + 1))
    [[ -n $stage_pid ]] || exit 75
    if ((requests == 1)); then
        say "stopping at the next update, with a checkpoint"
        mkdir -p -- "$folder" && : >"$folder/stop"
    else
        kill -TERM "$stage_pid" 2>/dev/null || true
    fi
}
trap request_stop INT TERM HUP

run_stage() { # $1 stage; returns the stage's own exit code, not its launcher's
    local code
    folder="$(<"$scratch/$1")"
    before="$(outcome_mark "$folder")"
    "$python" -m accelerate.commands.launch "${launcher[@]}" -m "pipelines.$1" "${options[@]}" &
    stage_pid=$!
    # A trapped signal ends `wait`, not the stage.
    while
        code=0
        wait "$stage_pid" || code=$?
        kill -0 "$stage_pid" 2>/dev/null
    do :; done
    stage_pid=""
    # A request that came while the stage was ending anyway must not stop the next start.
    ((requests == 0)) || rm -f -- "$folder/stop"
    ((code == 0)) || code="$(stage_exit_code "$folder" "$before")"
    return "$code"
}

number=0
for stage in "${stages[@]}"; do
    number=$((number + 1))
    say "=== $number/${#stages[@]} $stage"
    began=$SECONDS
    code=0
    run_stage "$stage" || code=$?
    if ((code != 0)); then
        reason="$(stage_outcome "$folder" "$before" reason)"
        say "$stage ended with exit code $code after $((SECONDS - began)) s${reason:+: $reason}"
        if ((code == 2)); then
            say "Bad input or configuration, which has to be mended first; what is finished stays finished."
        else
            say "The same command continues from there:"
            say "  $this_command"
        fi
        exit "$code"
    fi
    say "=== $stage took $((SECONDS - began)) s"
    ((requests == 0)) || exit 75 # It was quicker than the request to stop.
done

# Absolute, so that what is printed works from any folder.
results="$(cd -- "$(<"$scratch/evaluate")" && pwd)"
# What a slow or absent server has not taken yet; it costs the stages no time, and a failure here loses nothing.
"$python" -m pipelines.tools.sync "$(dirname -- "$results")" || say "MLflow is not complete; the line above says how to send the rest."
store="${MLFLOW_TRACKING_URI:-sqlite:///$(dirname -- "$(dirname -- "$results")")/mlflow.db}"
cat <<SUMMARY

All five stages took $((SECONDS - began_all)) s.
  samples   $results/samples.png
  metrics   $results/metrics.json
  MLflow    $(printf '%q ' "$python" -m mlflow ui --backend-store-uri "$store")
SUMMARY
