#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes on a bare CUDA machine with torch: install from this
# checkout without network, build the extension (or take the one that is there), GPU tests, compute-sanitizer, benchmarks
# by priority. Results are written as they come; the last lines are a short table. The GPU's settings are left alone.
#
#   tools/gpu_session.sh [--out FOLDER] [--limit SECONDS] [--wheels FOLDER] [--only STEP,...] [--dry-run]
#
#   --out       where logs, JSON and the report go (default: $OUT, else gpu-session/)
#   --limit     for everything, in seconds (default 570)
#   --wheels    wheels to install first, without looking at an index (default: .whl, where there is one)
#   --only      some of: install, build, tests, sanitizer, benchmarks
#   --dry-run   the same steps on a machine without a GPU: nothing skipped but what needs one
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-gpu-session} limit=570 wheels=.whl only=install,build,tests,sanitizer,benchmarks dry=
while (($#)); do
    case $1 in
        --out) out=$2 && shift ;;
        --limit) limit=$2 && shift ;;
        --wheels) wheels=$2 && shift ;;
        --only) only=$2 && shift ;;
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
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
table=()

left() { echo $((limit > SECONDS ? limit - SECONDS : 0)); }

# step NAME LIMIT COMMAND...: run with a log of its own; what fails is told, and the rest goes on
step() {
    local name=$1 allowed=$2 began=$SECONDS status=0 state
    shift 2
    [[ ,$only, == *,${name%%-*},* ]] || return 0
    ((allowed < $(left))) || allowed=$(left)
    if ((allowed < 5)); then
        table+=("$(printf '%-22s %5s    no time left' "$name" -)")
        return 0
    fi
    printf '\n=== %s (at most %d s)\n' "$name" "$allowed"
    timeout --kill-after=5 "$allowed" "$@" >"$out/$name.log" 2>&1 || status=$?
    case $status in 0) state=ok ;; 5) state='nothing to run' ;; 124 | 137) state='out of time' ;; *) state="failed ($status)" ;; esac
    tail -n 12 "$out/$name.log"
    table+=("$(printf '%-22s %5d s  %s' "$name" $((SECONDS - began)) "$state")")
    return "$status"
}

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,temperature.gpu --format=csv
    nvcc --version | tail -n 1
    "$python" -c 'import sys, torch; print(sys.version, "torch", torch.__version__, "CUDA", torch.version.cuda)'
    "$python" -c 'import triton; print("triton", triton.__version__)'
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

build() { # what is there already, built from the same sources, is taken
    "$python" -m vlmo_fast build "$@"
}

sanitize() { # one tool; a machine that does not let it attach is told apart from a finding
    compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 5 "$python" tools/gpu_smoke.py --small
}

export PYTHONPATH=$site
table+=("$(date -u +%FT%TZ) $(git rev-parse --short HEAD 2>/dev/null)")
machine 2>&1 | tee "$out/machine.txt"
step install 60 bash -c "$(declare -f install); python='$python' site='$site' wheels='$wheels' install"
targets='cpu cuda'
[[ -z $dry ]] || targets='cpu --optional'
step build 200 bash -c "$(declare -f build); python='$python' build $targets"
if [[ -n $dry ]]; then
    step tests 120 "$python" -m pytest tests -m gpu -q -p no:cacheprovider --timeout 60 -o addopts= --collect-only
    step sanitizer 60 "$python" tools/gpu_smoke.py --small
    profile=(--quick --seconds 0 -k import)
else
    step tests 140 "$python" -m pytest tests -m gpu -q -p no:cacheprovider --timeout 60 -o addopts=
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck initcheck; do
            step "sanitizer-$tool" 60 bash -c "$(declare -f sanitize); python='$python' sanitize $tool"
        done
    else
        table+=("$(printf '%-22s %5s    compute-sanitizer is not on PATH' sanitizer -)")
    fi
    profile=(--gpu --time-limit $(($(left) > 90 ? $(left) - 60 : 30)))
fi
step benchmarks "$(($(left) - 5))" "$python" -m pytest benchmarks "${profile[@]}" -q -p no:cacheprovider \
    --results "$out/benchmarks.json"

if [[ -s $out/benchmarks.json ]]; then
    "$python" -m benchmarks.report "$out/benchmarks.json" --table
    "$python" -m benchmarks.report "$out/benchmarks.json" --page "$out/benchmarks.html" 2>"$out/page.log" \
        || echo "no page: $(tail -n 1 "$out/page.log")"
fi
printf '\n%s, %d s in all; logs in %s\n' "$(grep -m 1 NVIDIA "$out/machine.txt" || echo 'no GPU')" "$SECONDS" "$out"
printf '%s\n' "${table[@]}" | tee "$out/table.txt"
! grep -qE 'failed|out of time' "$out/table.txt"
