# shellcheck shell=bash
# What the scripts of this folder know about stages; to be sourced, with $root and $python set.

: "${root:?}" "${python:?}"
declare -A stage_folders=(
    [prepare_corpus]=corpus [train_vae]=vae [encode_latents]=latents [train_unet]=unet [evaluate]=evaluation
)

say() { printf '%s\n' "$*" >&2; }

# Set stages to those of experiment $1 in their order, each with options of its own: train_unet is one more time there
# where the file names a guide.
choose_stages() {
    # shellcheck disable=SC2034  # for those who source this
    stages=(prepare_corpus train_vae encode_latents train_unet evaluate)
    if "$python" -c "$names_guide" "$1" 2>/dev/null; then
        stages=("${stages[@]:0:4}" "train_unet --name guide" evaluate)
    fi
}
names_guide='
import sys, tomllib
tomllib.loads(open(sys.argv[1], encoding="utf-8-sig").read())["train_unet"]["named"]["guide"]
'

# Print one setting of a stage's resolved configuration: $1 stage, $2 key, then its --config and other options.
stage_setting() {
    local resolved print='import sys, tomllib; print(tomllib.loads(sys.stdin.read())[sys.argv[1]][sys.argv[2]])'
    resolved="$("$python" -m "pipelines.$1" "${@:3}" --print-config)" || return 2
    "$python" -c "$print" "$1" "$2" <<<"$resolved"
}

# Print the name that a stage has for its folder $1, whose usual name is $2: what follows it and a dash.
name_of() {
    local folder="${1##*/}"
    printf '%s' "${folder#"$2"-}"
}

# Print the folder a stage writes to, from its resolved configuration: $1 stage, then its --config and other options.
# Return 2, with the stage's own message, when its configuration has mistakes.
stage_folder() {
    local stage="$1" resolved
    shift
    resolved="$("$python" -m "pipelines.$stage" "$@" --print-config)" || return 2
    "$python" -c "$print_folder" "$stage" "${stage_folders[$stage]}" <<<"$resolved"
}
print_folder='
import pathlib, sys, tomllib
stage, folder = sys.argv[1:]
config = tomllib.loads(sys.stdin.read())
name = config[stage].get("name", "") if stage in ("train_unet", "evaluate") else ""
print(pathlib.PurePath(config["run"]["root"], f"{folder}-{name}" if name else folder))
'

# Print which outcome lies in a stage's folder $1 now; nothing when there is none. To be asked before the stage begins:
# the clocks of a file server and of the machines differ, so that "newer" would say little.
outcome_mark() { stat --format '%i %y' -- "$1/outcome.json" 2>/dev/null || true; }

# Print a key ($3) of the outcome that a stage left behind: $1 its folder, $2 the mark of the outcome that lay there
# before. When that one still lies there, it is of an earlier run. Nothing when there is none.
stage_outcome() {
    if [[ -f $1/outcome.json && $(outcome_mark "$1") != "$2" ]]; then
        "$python" -c 'import json, sys; found = json.load(open(sys.argv[1])).get(sys.argv[2]); print("" if found is None else found)' \
            "$1/outcome.json" "$3" 2>/dev/null || true
    fi
}

# Print the exit code that a failed stage left behind, since the launcher makes 1 of every code; arguments as above.
stage_exit_code() {
    local code
    code="$(stage_outcome "$1" "$2" exit_code)"
    echo "${code:-1}"
}

# What follows is for scripts that run stages on this machine.
this_command="" # by which the user continues; the script sets it
launcher=()     # flags of accelerate

# Set launcher to the words before --, and stage_options to those behind it.
take_flags() {
    launcher=()
    while (($# > 0)) && [[ $1 != -- ]]; do
        launcher+=("$1")
        shift
    done
    # shellcheck disable=SC2034  # for those who source this
    stage_options=("${@:2}")
}

# Give the launcher the file of launch/accelerate/ that fits this machine, unless it has one.
# Without any --config_file, accelerate would read the one in the user's home.
choose_machine() {
    local num_gpus=0 machine
    [[ " ${launcher[*]} " != *" --config"[_-]"file"* ]] || return 0
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
}

# A stage runs in a process group of its own (set -m), so that Ctrl-C reaches this script alone. The stage then gets
# one clear request: the file `stop` in its folder. Where that does not help, SIGTERM, which its launcher passes on.
stage_pid="" folder="" before="" requests=0
stop_on_signals() {
    set -m
    trap request_stop INT TERM HUP
}
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

# Set $code to the exit code of process $1, which has ended, where bash still knows it.
settle_code() {
    local ended=0
    wait "$1" 2>/dev/null || ended=$?
    ((ended == 127)) || code=$ended
}

# Launch stage $1 with the options behind it, into $folder; return the stage's own exit code, not its launcher's.
launch_stage() {
    local code stage="$1"
    shift
    before="$(outcome_mark "$folder")"
    "$python" -m accelerate.commands.launch "${launcher[@]}" -m "pipelines.$stage" "$@" &
    stage_pid=$!
    # A trapped signal ends `wait`, not the stage.
    while
        code=0
        wait "$stage_pid" || code=$?
        kill -0 "$stage_pid" 2>/dev/null
    do :; done
    # It may have ended while the trap ran; then the code so far is the signal's.
    settle_code "$stage_pid"
    stage_pid=""
    # A request that came while the stage was ending anyway must not stop the next start.
    ((requests == 0)) || rm -f -- "$folder/stop"
    ((code == 0)) || code="$(stage_exit_code "$folder" "$before")"
    return "$code"
}

# Run stage $2, under the heading $1, into the folder $3 with the options behind it; end the script where it fails.
run_stage() {
    local code=0 began=$SECONDS reason heading="$1" stage="$2"
    folder="$3"
    shift 3
    say "=== $heading"
    launch_stage "$stage" "$@" || code=$?
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
}
