#!/usr/bin/env bash
# Train the U-Net of one experiment again with other seeds, on the same latents, and evaluate each with the same noise:
# so `latentline compare` knows how much of a difference is luck. Run it again to continue where it stopped.
#
#   bash launch/replicate.sh EXPERIMENT.toml SEEDS [LAUNCHER FLAG ...] [-- STAGE OPTION ...]
#
#   bash launch/replicate.sh pipelines/configs/demo.toml 2                      two more trainings of the demo
#   bash launch/replicate.sh pipelines/configs/demo.toml 4 --num_processes 1    two beyond those
#
# The seeds are the SEEDS that follow the experiment's train_unet.seed. Seed N writes unet-seed_N and evaluation-seed_N
# beside unet and evaluation; in MLflow all are runs of that pipeline. Flags, signals and exit codes are those of
# launch/pipeline.sh, which makes the latents first.
set -euo pipefail

root="$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="$root/.venv/bin/python"
# shellcheck source=launch/stages.sh
source "$root/launch/stages.sh"

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi
if [[ ! -f ${1:-} || ! ${2:-} =~ ^[1-9][0-9]*$ ]]; then
    usage >&2
    exit 2
fi
printf -v this_command '%q ' bash "${BASH_SOURCE[0]}" "$@"
take_flags "${@:3}"
options=(--config "$1" "${stage_options[@]}")

bash "$root/launch/setup.sh"
export PYTHONSAFEPATH=1
first="$(stage_setting train_unet seed "${options[@]}")"
unet="$(stage_folder train_unet "${options[@]}")"
evaluation="$(stage_folder evaluate "${options[@]}")"

choose_machine
stop_on_signals
for ((number = 1; number <= $2; number++)); do
    seed="seed_$((first + number))"
    run_stage "$number/$2 train_unet with $seed" train_unet "$unet-$seed" "${options[@]}" \
        --seed "${seed#seed_}" --name "$(name_of "$unet-$seed" unet)"
    run_stage "$number/$2 evaluate with $seed" evaluate "$evaluation-$seed" "${options[@]}" \
        --inputs.unet "$unet-$seed" --name "$(name_of "$evaluation-$seed" evaluation)"
done

run="$(dirname -- "$evaluation")"
"$python" -m pipelines.tools.sync "$run" || say "MLflow is not complete; the line above says how to send the rest."
echo
exec "$python" -m pipelines.tools.compare "$evaluation"
