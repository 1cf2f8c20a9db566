# shellcheck shell=bash
# What the scripts of this folder know about stages; to be sourced, with $python set.

: "${python:?}"
# shellcheck disable=SC2034  # for those who source this
stages=(prepare_corpus train_vae encode_latents train_unet evaluate)
declare -A stage_folders=(
    [prepare_corpus]=corpus [train_vae]=vae [encode_latents]=latents [train_unet]=unet [evaluate]=evaluation
)

say() { printf '%s\n' "$*" >&2; }

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
name = config[stage].get("name", "") if stage == "evaluate" else ""
print(pathlib.PurePath(config["run"]["root"], f"{folder}-{name}" if name else folder))
'

# Print which outcome lies in a stage's folder $1 now; nothing when there is none. To be asked before the stage begins:
# the clocks of a file server and of the machines differ, so that "newer" would say little.
outcome_mark() { stat --format '%i %y' -- "$1/outcome.json" 2>/dev/null || true; }

# Print a key ($3) of the outcome that a stage left behind: $1 its folder, $2 the mark of the outcome that lay there
# before. When that one still lies there, it is of an earlier run. Nothing when there is none.
stage_outcome() {
    if [[ -f $1/outcome.json && $(outcome_mark "$1") != "$2" ]]; then
        "$python" -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2]) or "")' \
            "$1/outcome.json" "$3" 2>/dev/null || true
    fi
}

# Print the exit code that a failed stage left behind, since the launcher makes 1 of every code; arguments as above.
stage_exit_code() {
    local code
    code="$(stage_outcome "$1" "$2" exit_code)"
    echo "${code:-1}"
}
