#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes on a bare CUDA machine with torch: install from this
# checkout without network, build the extension (or take the one that is there), GPU tests, compute-sanitizer, benchmarks
# by priority. Results are written as they come; the last lines are a short table. The GPU's settings are left alone.
#
#   tools/gpu_session.sh [--out FOLDER] [--limit SECONDS] [--wheels FOLDER] [--only STEP,...] [--commit ID] [--dry-run]
#
#   --out       where log.txt, table.txt, benchmarks.json and benchmarks.html go (default: $OUT, else gpu-session/)
#   --limit     for everything, in seconds (default 570)
#   --wheels    wheels to install first, without looking at an index (default: .whl, where there is one)
#   --only      some of: install, build, tests, sanitizer, benchmarks
#   --commit    what the results belong to, where the checkout came without .git
#   --dry-run   the same steps on a machine without a GPU: nothing skipped but what needs one
#
# A kernel that crashes or hangs costs the process that ran it, and no other: tests run file by file, benchmarks go on
# behind it in a new process. Without nvcc or CUTLASS's headers the library comes along built: vlmo_fast/_lib is enough.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-gpu-session} limit=570 wheels=.whl only=install,build,tests,sanitizer,benchmarks commit='' dry=''
while (($#)); do
    case $1 in
        --out) out=$2 && shift ;;
        --limit) limit=$2 && shift ;;
        --wheels) wheels=$2 && shift ;;
        --only) only=$2 && shift ;;
        --commit) commit=$2 && shift ;;
        --dry-run) dry=yes ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit ;;
        *) echo "$0: unknown option $1; see --help" >&2 && exit 2 ;;
    esac
    shift
done
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET
mkdir -p "$out"
out=$(cd "$out" && pwd)
: >"$out/log.txt"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
table=()
reserved=0 # seconds that the steps before the benchmarks leave them
[[ ,$only, != *,benchmarks,* ]] || reserved=$((limit / 3))

left() { echo $((limit > SECONDS ? limit - SECONDS : 0)); }

# step NAME LIMIT COMMAND...: run into the log; what fails is told, and the rest goes on
step() {
    local name=$1 allowed=$2 began=$SECONDS status=0 state most
    shift 2
    [[ ,$only, == *,${name%%-*},* ]] || return 0
    most=$(left)
    [[ $name == benchmarks ]] || most=$((most - reserved))
    ((allowed < most)) || allowed=$most
    if ((allowed < 5)); then
        table+=("$(printf '%-40s %5s    no time left' "$name" -)")
        return 0
    fi
    printf '\n=== %s (at most %d s)\n' "$name" "$allowed" | tee -a "$out/log.txt"
    timeout --kill-after=5 "$allowed" "$@" >>"$out/log.txt" 2>&1 || status=$?
    case $status in 0) state=ok ;; 5) state='nothing to run' ;; 124 | 137) state='out of time' ;; *) state="failed ($status)" ;; esac
    tail -n 12 "$out/log.txt"
    table+=("$(printf '%-40s %5d s  %s' "$name" $((SECONDS - began)) "$state")")
    return "$status"
}

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,temperature.gpu --format=csv
    nvcc --version | tail -n 1
    "$python" - <<'END'
import sys
from importlib.metadata import PackageNotFoundError, version

found, absent = [f"python {sys.version.split()[0]}"], []
for name in "torch triton transformers setuptools pytest pytest-benchmark pytest-timeout hypothesis scipy matplotlib ninja nvidia-cutlass".split():
    try:
        found.append(f"{name} {version(name)}")
    except PackageNotFoundError:
        absent.append(name)
print(", ".join(found))
print("absent (wheels bring them along):", ", ".join(absent) or "nothing")
END
    true
}

install() {
    local pip=("$python" -m pip install --disable-pip-version-check --quiet --no-index --no-deps --target "$site")
    if compgen -G "$wheels/*.whl" >/dev/null; then "${pip[@]}" --upgrade "$wheels"/*.whl || return; fi
    mkdir "$site/checkout" # a copy: building leaves files behind
    tar -c --exclude=./.git --exclude=./.venv --exclude="./$wheels" --exclude='*.egg-info' . | tar -x -C "$site/checkout"
    "${pip[@]}" --no-build-isolation "$site/checkout" || return
    cd / && PYTHONPATH=$site "$python" -c 'import vlmo_fast, vlmo_fast.ops; print(vlmo_fast.__file__, vlmo_fast.__version__)'
}

build() { # what is there already, built from the same sources, is taken if this machine can load it
    "$python" -m vlmo_fast build "$@" || return
    "$python" -c 'from vlmo_fast import extensions as e; [e.load(name) for name in e.NAMES if e.is_built(name)]' \
        || "$python" -m vlmo_fast build "$@" --force
}

smoke() { # a process for each op
    local status=0 op
    for op in mome_ffn packed_attention contrastive_loss; do "$python" tools/gpu_smoke.py --small "$op" || status=1; done
    return "$status"
}

sanitize() { # one tool
    compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 5 "$python" tools/gpu_smoke.py --small
}

benchmarks() { # LIMIT JSON OPTION...: start none after LIMIT; what took its process along is not tried again
    local limit=$1 json=$2 before='' now='' failed=0 status
    shift 2
    while ((limit - SECONDS > 20)); do
        status=0
        "$python" -m pytest benchmarks "$@" --time-limit $((limit - SECONDS)) --results "$json" --resume -q \
            -p no:cacheprovider || status=$?
        ((status == 0 || status == 5)) && break # all passed, or nothing is left
        failed=1 before=$now now=$(cksum "$json")
        [[ $now != "$before" ]] || break
    done
    return "$failed"
}

# part FUNCTION ARGUMENT...: the command that runs one of these functions in a shell of its own, for `timeout`
part() { command=(bash -c "$(declare -f "$1"); python='$python' site='$site' wheels='$wheels'; \"\$@\"" bash "$@"); }

export PYTHONPATH=$site
table+=("$(date -u +%FT%TZ) ${commit:-$(git rev-parse --short HEAD 2>/dev/null)}")
machine 2>&1 | tee -a "$out/log.txt"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)

part install
step install 60 "${command[@]}"
targets=(cpu cuda)
[[ -z $dry ]] || targets=(cpu --optional)
part build "${targets[@]}"
step build 200 "${command[@]}"
part smoke
step tests-smoke 90 "${command[@]}"
collect=()
[[ -z $dry ]] || collect=(--collect-only)
for file in $(grep -l 'pytest\.mark\.gpu' tests/test_*.py); do # a thread ends a test that hangs, and its process
    step "tests-$(basename "$file" .py)" 100 "$python" -m pytest "$file" -m gpu -k 'not sanitizer' -q -o addopts= \
        -p no:cacheprovider --timeout 45 --timeout-method thread "${collect[@]}"
done
if [[ -n $dry ]]; then
    profile=(--quick --seconds 0 -k import)
else
    profile=(--gpu)
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck initcheck; do
            part sanitize $tool
            step "sanitizer-$tool" 60 "${command[@]}"
        done
    else
        table+=("$(printf '%-40s %5s    compute-sanitizer is not on PATH' sanitizer -)")
    fi
fi
[[ -z $commit ]] || profile+=(--commit "$commit")
rm -f "$out/benchmarks.json"
part benchmarks $(($(left) > 90 ? $(left) - 60 : 30)) "$out/benchmarks.json" "${profile[@]}"
step benchmarks $(($(left) - 10)) "${command[@]}"

if [[ -s $out/benchmarks.json ]]; then
    "$python" -m benchmarks.report "$out/benchmarks.json" --table
    "$python" -m benchmarks.report "$out/benchmarks.json" --page "$out/benchmarks.html" 2>>"$out/log.txt" \
        || echo "no page: $(tail -n 1 "$out/log.txt")"
fi
printf '\n%s, %d s in all; the log is %s\n' "${gpu:-no GPU}" "$SECONDS" "$out/log.txt"
printf '%s\n' "${table[@]}" | tee "$out/table.txt"
! grep -qE 'failed|out of time' "$out/table.txt"
