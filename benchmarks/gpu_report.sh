#!/usr/bin/env bash
# What the CUDA kernels do on this machine's NVIDIA GPU: builds them, tests them, and times them against others.
#
#   bash benchmarks/gpu_report.sh [--wheels FOLDER] [--quick] [--out FOLDER]
#
#   --wheels FOLDER  takes build and test tools that are missing from wheels in FOLDER, and nothing from the network
#   --quick          under 3 minutes instead of under 9: fewer tests and rows, memcheck alone of the sanitizers
#   --out FOLDER     for logs and results (default: gpu_report); its *.json are what benchmarks/compare.py reads
#
# Needs an environment with torch for CUDA, and nvcc. PYTHON names its interpreter (default: python3). A stage that
# fails does not stop the next; the exit status is 0 if none failed.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "no interpreter '${PYTHON:-python3}': set PYTHON" >&2; exit 2; }
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") # links stay: a virtual environment is one
wheels='' quick='' out=gpu_report
usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
while (($#)); do
  case $1 in
    --help) usage; exit 0 ;;
    --quick) quick=yes ;;
    --wheels | --out)
      [[ -n ${2:-} ]] || { echo "$1: expected a folder, got nothing" >&2; exit 2; }
      if [[ $1 == --out ]]; then out=$2; else wheels=$2; fi
      shift
      ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
done
if [[ -n $wheels ]]; then
  [[ -d $wheels ]] || { echo "--wheels: expected a folder, got '$wheels'" >&2; exit 2; }
  wheels=$(cd "$wheels" && pwd)
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2

# Everything below runs in $out, so that the package that was built is imported and not its sources.
cd "$out" || exit 2
: >stages
rm -rf package/lstm_ext package/lstm_ext-* benchmarks.json flashrnn.json initcheck.finds.log # of an earlier run
export PATH="$out/tools/bin:$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" PYTHONPATH="$out/package:$out/tools" PYTHONUNBUFFERED=1
total=$((${#quick} ? 165 : 525))

record() { printf '%-12s %-28s %4d s  %s\n' "$1" "$2" "$3" "$4" | tee -a stages; }

# stage NAME SECONDS COMMAND...: the command with a time limit, its output in NAME.log. The status is the command's.
stage() {
  local name=$1 limit=$2 start=$SECONDS status=0 left=$((total - SECONDS)) outcome
  shift 2
  if ((left < 5)); then
    record "$name" 'FAILED: no time left' 0 ''
    return 1
  fi
  timeout --kill-after=10 $((limit < left ? limit : left)) "$@" >"$name.log" 2>&1 </dev/null || status=$?
  case $status in
    0) outcome=ok ;;
    124 | 137) outcome='FAILED: time limit' ;;
    *) outcome="FAILED: status $status" ;;
  esac
  record "$name" "$outcome" $((SECONDS - start)) "$(grep -v '^[[:space:]]*$' "$name.log" | tail -n 1 | cut -c1-110)"
  return "$status"
}

skip() { record "$1" "left out: $2" 0 ''; }

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# ---- Tools and build -----------------------------------------------------------------------------------------------

# NAME>=MAJOR of what is missing or too old, of what building, testing and timing need beside torch.
missing=$("$python" - <<'PY'
from importlib.metadata import PackageNotFoundError, version

for name, major in {"setuptools": 77, "pybind11": 3, "cmake": 3, "ninja": 1, "numpy": 1, "pytest": 8,
                    "hypothesis": 6, "tqdm": 4, "rich": 13}.items():
    try:
        found = int(version(name).split(".")[0])
    except PackageNotFoundError:
        found = -1
    if found < major:
        print(f"{name}>={major}")
PY
)
if [[ -n $missing ]]; then
  mapfile -t missing <<<"$missing"
  source_of_wheels=()
  [[ -n $wheels ]] && source_of_wheels=(--no-index --find-links "$wheels")
  stage tools 60 "$python" -m pip install --upgrade --target tools "${source_of_wheels[@]}" "${missing[@]}"
fi

stage build $((${#quick} ? 90 : 180)) env LSTM_EXT_BUILD=cuda \
  "$python" -m pip install -v --no-build-isolation --no-deps --no-index --upgrade --target package "$root"

stage available 30 "$python" -c '
import sys, lstm_ext, torch
cuda = lstm_ext.backends()["cuda"]
print(lstm_ext.build_info())
print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "finds no CUDA device")
sys.exit("" if cuda.available and torch.cuda.is_available() else f"not available: {cuda.reason}")'

# ---- Tests ---------------------------------------------------------------------------------------------------------

tests=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q -m gpu)
tests+=("$root/tests/test_gpu.py")
few='not long_sequences and not two_to_the_31 and not ten_thousand and not several_processes and not derivative'
few+=' and not compiled'
# Each way through a layer and each strategy.
small='matches_the_oracle and (float32 or bfloat16) and not chosen and (T9-B7-I5-H33 or T6-B9-I17-H33-P7)'

if [[ -n $quick ]]; then
  stage tests 45 "${tests[@]}" -k "$few"
else
  stage tests 180 "${tests[@]}"
fi

# sanitize TOOL OPTION...: with each tensor in an allocation of its own, so that its end is known.
sanitize() {
  local tool=$1
  shift
  stage "$tool" $((${#quick} ? 40 : 90)) env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "$sanitizer" --tool "$tool" --report-api-errors no "$@" "${tests[@]}" -k "$small"
}

# initcheck must see all kernels, or what they wrote would count as never written; of its finds, ours count.
initcheck() {
  sanitize initcheck --log-file initcheck.finds.log
  if grep -A 3 Uninitialized initcheck.finds.log 2>/dev/null | grep -q lstm_ext; then
    record initcheck 'FAILED: uninitialized reads' 0 "see $out/initcheck.finds.log"
  fi
}

sanitizer=$(command -v compute-sanitizer)
if [[ -z $sanitizer ]]; then
  skip sanitizers 'no compute-sanitizer'
else
  ours=(--error-exitcode 86 --kernel-regex kns=lstm_ext)
  sanitize memcheck "${ours[@]}" &
  if [[ -z $quick ]]; then
    sanitize racecheck "${ours[@]}" &
    sanitize synccheck "${ours[@]}" &
    initcheck &
  fi
  wait
fi

# ---- Benchmarks ----------------------------------------------------------------------------------------------------

# measure NAME SECONDS OPTION...: rows until the seconds are over, and one more.
measure() {
  local name=$1 left=$((total - SECONDS - 25)) seconds=$2
  shift 2
  ((seconds > left)) && seconds=$left
  stage "$name" $((seconds + 25)) "$python" "$root/benchmarks/run.py" --limit "$((seconds > 0 ? seconds : 1))" \
    --json "$name.json" "$@"
}

arms=(--arms lstm_ext torch lstm_ext-graph torch-graph)
if [[ -n $quick ]]; then
  measure benchmarks 30 --preset gpu-quick "${arms[@]}"
else
  measure benchmarks 200 --preset gpu "${arms[@]}"
fi
if [[ -n $quick ]]; then
  skip flashrnn 'compiles for minutes'
elif has flashrnn; then
  measure flashrnn 60 --preset gpu --suite gpu_flashrnn --arms lstm_ext torch flashrnn
else
  skip flashrnn 'not installed'
fi

# ---- Report --------------------------------------------------------------------------------------------------------

PYTHONPATH="$PYTHONPATH:$root/benchmarks" "$python" - <<'PY'
from pathlib import Path

from lstm_bench import report, rows

found = [path for path in map(Path, ("benchmarks.json", "flashrnn.json")) if path.exists()]
done = [row for path in found for row in rows.load(path)[1]]
console = report.make_console()
if done:
    for table in (report.results(done), report.targets(done)):
        if table:
            report.show(console, table)
    report.notes(console, done)
else:
    console.print("No row was measured.")
PY
echo "Logs, kernels that ran and results: $out ($SECONDS s in all)"
! grep -q FAILED stages
