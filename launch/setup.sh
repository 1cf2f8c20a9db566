#!/usr/bin/env bash
# Make .venv in the repository root and install Latentline into it, in the versions of launch/constraints.txt.
#
#   bash launch/setup.sh [EXTRA ...]   test, browser, remote, gpu, eval, emoji, text of pyproject.toml; earlier ones stay
#
# Returns at once when all of it is there already. Understands two variables:
#   PYTHON              the interpreter to make .venv with; else the first python3 of at least 3.11
#   LATENTLINE_TORCH    cpu or cuda; else cuda where an NVIDIA GPU answers, and cpu elsewhere. Say cuda on the
#                       login node of a cluster whose GPU nodes use this folder.
set -euo pipefail

root="$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
python="$venv/bin/python"
constraints="$root/launch/constraints.txt"
stamp="$venv/latentline-setup"       # three lines: fingerprint, torch flavour, extras
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

# Of everything that changes what pip would install, and of the path, which the scripts in .venv/bin hold.
fingerprint() {
    { printf '%s\n' "$root" && cat -- "$root/pyproject.toml" "$constraints"; } | sha256sum | cut -d ' ' -f 1
}

torch_flavour() { # $1: the one installed before, or nothing
    case ${LATENTLINE_TORCH:-} in
        cpu | cuda) printf '%s' "$LATENTLINE_TORCH" ;;
        "") if [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; then printf cuda; else printf '%s' "${1:-cpu}"; fi ;;
        *) die "LATENTLINE_TORCH = $LATENTLINE_TORCH is not known. Use cpu or cuda, or leave it out." ;;
    esac
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v -- "$candidate"
            return
        fi
        [[ -z ${PYTHON:-} ]] || die "PYTHON = $PYTHON is no Python of version 3.11 or later."
    done
    die "found no Python of version 3.11 or later. Install one, or name it: PYTHON=/path/to/python bash launch/setup.sh"
}

# False for a folder that was moved or copied, a removed interpreter, or a half-made environment.
venv_is_usable() {
    grep -qsF -e "=$venv" -e "=\"$venv\"" -e "='$venv'" -- "$venv/bin/activate" && "$python" -m pip --version >/dev/null 2>&1
}

make_venv() {
    local interpreter
    interpreter="$(find_python)"
    say "making $venv with $("$interpreter" -V)"
    # The lock file stays, since others may be waiting on it.
    find "$venv" -mindepth 1 -maxdepth 1 ! -name setup.lock -exec rm -rf -- {} +
    "$interpreter" -m venv -- "$venv" || die "$interpreter -m venv failed. On Debian and Ubuntu: apt install python3-venv"
}

pip_install() { "$python" -m pip install --quiet --quiet "$@"; }

installed_torch() { "$python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true; }

# Try to install; false when there is no such version; stop on any other failure (network, disk full).
install_if_findable() {
    local complaint
    complaint="$(pip_install --no-deps "$@" 2>&1)" && return
    [[ $complaint == *"No matching distribution"* ]] || die "pip install $* failed:"$'\n'"$complaint"
    return 1
}

# The plain Linux wheel brings several GB of CUDA libraries. Wheels without them have the local version "+cpu", and
# a request for exactly that version is met by such a wheel or by nothing.
install_cpu_torch() {
    local version versions
    [[ $(installed_torch) != *+cpu ]] || return 0
    # The tested version first, then whatever else is findable within the range of pyproject.toml.
    versions="$("$python" -m pip index versions torch --retries 1 2>/dev/null |
        grep -o '[0-9][0-9.]*+cpu' | sort --unique --version-sort --reverse || true)"
    for version in "$pinned_torch+cpu" $versions; do
        "$python" - "$version" "$torch_range" <<<"$in_range" || continue
        ! install_if_findable --retries 1 "torch==$version" || return 0
    done
    say "pip finds no CPU wheel of torch for $("$python" -V): the plain wheel follows, which on x86-64 Linux brings several GB"
    say "of CUDA libraries. To avoid them, name an index that has CPU wheels in PIP_EXTRA_INDEX_URL and start again."
}
in_range='
import sys
from pip._vendor.packaging.requirements import Requirement
sys.exit(not Requirement(sys.argv[2]).specifier.contains(sys.argv[1]))
'

# Where wheels of both kinds are findable, "2.13.0+cpu" outranks "2.13.0"; "===" asks for the very string.
install_cuda_torch() {
    local version
    version="$(installed_torch)"
    [[ -z $version || $version == *+cpu ]] || return 0
    install_if_findable --force-reinstall "torch===$pinned_torch" || say "no plain wheel of torch $pinned_torch is findable; taking what pip finds."
}

# Set $now, $torch and $extras to what is asked for; true when just that is installed. Writes nothing, so that it also
# serves where .venv belongs to somebody else (an image, a shared folder).
up_to_date() {
    local before="" torch_before="" extras_before=()
    if [[ -f $stamp ]]; then
        { read -r before && read -r torch_before && read -r -a extras_before; } <"$stamp" || true
    fi
    now="$(fingerprint)"
    torch="$(torch_flavour "$torch_before")" || exit 1
    mapfile -t extras < <(printf '%s\n' "${extras_before[@]}" "$@" | sed '/^$/d' | LC_ALL=C sort -u)
    [[ "$now $torch ${extras[*]}" == "$before $torch_before ${extras_before[*]}" ]] && "$python" -c '' 2>/dev/null
}

if up_to_date "$@"; then exit 0; fi
mkdir -p -- "$venv"
exec 9>"$venv/setup.lock"
flock 9 || die "cannot lock $venv/setup.lock"
if up_to_date "$@"; then exit 0; fi # done by the one we waited for
rm -f -- "$stamp"

venv_is_usable || make_venv
pinned_torch="$(sed -n 's/^torch==//p' "$constraints")"
torch_range="$(grep -o '"torch[<>=][^"]*"' "$root/pyproject.toml" | tr -d '"')"
say "installing Latentline ${extras[*]:+with ${extras[*]} }and $torch torch; this takes minutes the first time"
"install_${torch}_torch"

# An untested torch that had to be taken must not be replaced now.
cd -- "$root"
have="$(installed_torch)"
chosen="$(mktemp)"
trap 'rm -f -- "$chosen"' EXIT
if [[ -n $have && ${have%%+*} != "$pinned_torch" ]]; then
    say "torch $have is not the tested $pinned_torch"
    sed '/^torch==/d' "$constraints" >"$chosen"
else
    cat -- "$constraints" >"$chosen"
fi
wanted="$(IFS=,; printf '%s' "${extras[*]}")"
pip_install --constraint "$chosen" --editable ".${wanted:+[$wanted]}"

printf '%s\n%s\n%s\n' "$now" "$torch" "${extras[*]}" >"$stamp.new"
mv -f -- "$stamp.new" "$stamp"
say "done"
