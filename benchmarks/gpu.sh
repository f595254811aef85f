#!/usr/bin/env bash
# Everything that a short stay on a machine with a GPU should do, most valuable first:
#
#   benchmarks/gpu.sh [--dry-run] [GROUP ...]
#
# Groups, all of them by default and always in this order:
#   machine         names, versions, clocks
#   probe           what kernels and plans count on
#   kernels         compiles what the next steps need, on all cores
#   parity          the quick parity list and the gpu-marked tests
#   vectors         the asm wrappers' golden vectors
#   sanitize        compute-sanitizer on a few cases
#   a .. g, sweep   the benchmark suite
#   report          plots of what was measured
#
# A step that fails or runs out of its time costs the others nothing. All of it ends within BUDGET seconds (480): a step
# gets at most what is left, less a 24th of BUDGET for each group of the suite that is still to come; those share the rest;
# what no longer fits is reported as skipped. Results come as they are made into OUT (benchmarks/results), what the steps
# print into OUT/gpu.log. PYTHON (python3) needs CuPy; the rest of the environment is its own. No setting of the GPU is
# changed.
#
# --dry-run needs no GPU: every step as far as the launches, its results into a folder of its own unless OUT is set.
#
# Exit code 1 where a step failed, 2 for wrong usage.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set -/{s/^# \{0,1\}//p}' "$0"; }

suite=(a b c d e f g sweep)
all=(machine probe kernels parity vectors sanitize "${suite[@]}" report)
dry=
groups=()
for argument in "$@"; do
  case $argument in
    --dry-run) dry=--dry-run ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      if [[ " ${all[*]} " != *" $argument "* ]]; then
        echo "gpu.sh: a group must be one of ${all[*]}. Received: $argument" >&2
        exit 2
      fi
      groups+=("$argument")
      ;;
  esac
done
((${#groups[@]})) || groups=("${all[@]}")

budget=${BUDGET:-480}
if ! [[ $budget =~ ^[1-9][0-9]*$ ]]; then
  echo "gpu.sh: BUDGET must be a number of seconds. Received: $budget" >&2
  exit 2
fi
python=${PYTHON:-python3}
command -v "$python" >/dev/null || {
  echo "gpu.sh: PYTHON must be a Python interpreter. Received: $python" >&2
  exit 2
}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [[ $dry ]]; then out=${OUT:-$(mktemp -d)}; else out=${OUT:-benchmarks/results}; fi
mkdir -p "$out"
log=$out/gpu.log
: >"$log"

# --- Steps -------------------------------------------------------------------------------------------------------

reserve=$((budget / 24)) # seconds of each group of the suite that is still to come
least=5                  # seconds; with less a step is not begun
names=() times=() results=()
failed=0

wanted() { [[ " ${groups[*]} " == *" $1 "* ]]; }

to_come() { # how many groups of the suite are wanted and not yet done
  local count=0 group
  for group in "${suite[@]}"; do
    if wanted "$group" && [[ " ${names[*]-} " != *" suite-$group "* ]]; then count=$((count + 1)); fi
  done
  echo "$count"
}

noted() { # name, seconds, result
  names+=("$1") times+=("$2") results+=("$3")
}

# step NAME SECONDS COMMAND...   within SECONDS and what the budget leaves; its output goes to the log, its end is shown.
# NEEDS: a word without which that output is no success. In COMMAND, @N@ stands for N hundredths of the time it has.
step() {
  local name=$1 limit=$2 from=$SECONDS status=0 begin argument
  shift 2
  local arguments=()
  local left=$((budget - SECONDS - reserve * $(to_come)))
  if [[ $name == suite-* ]]; then
    left=$(((budget - SECONDS) / $(to_come)))
    if ((left < least)); then left=$least; fi
    if ((left > budget - SECONDS)); then left=$((budget - SECONDS)); fi
  fi
  if ((left < limit)); then limit=$left; fi
  if ((limit < least)); then
    noted "$name" 0 "skipped: no time left"
    return
  fi
  printf '\n=== %s (at %d of %d s, %d s at most)\n' "$name" "$SECONDS" "$budget" "$limit" | tee -a "$log"
  begin=$(wc -c <"$log")
  for argument in "$@"; do
    if [[ $argument =~ ^@([0-9]+)@$ ]]; then argument=$((limit * BASH_REMATCH[1] / 100)); fi
    arguments+=("$argument")
  done
  timeout --kill-after=3 "$limit" "${arguments[@]}" >>"$log" 2>&1 </dev/null || status=$?
  tail -c "+$((begin + 1))" "$log" | tail -n "${SHOWN:-12}"
  if [[ ${NEEDS-} && $status == 0 ]]; then
    tail -c "+$((begin + 1))" "$log" | grep "$NEEDS" >/dev/null || status=missing
  fi
  case $status in
    missing) noted "$name" $((SECONDS - from)) "FAILED: nothing $NEEDS" ;;
    0) noted "$name" $((SECONDS - from)) ok ;;
    124 | 137) noted "$name" $((SECONDS - from)) "FAILED: not done after $limit s" ;;
    *) noted "$name" $((SECONDS - from)) "FAILED: exit code $status" ;;
  esac
  if [[ $status != 0 ]]; then failed=1; fi
}

# absent NAME PROGRAM   true, and a line in the summary, where a program is not installed; a dry run needs none
absent() {
  if [[ $dry ]] || command -v "$2" >/dev/null; then return 1; fi
  noted "$1" 0 "skipped: $2 is not installed"
}

# shellcheck disable=SC2329  # on EXIT
finish() {
  local i
  {
    printf '\n%-24s %8s  %s\n' step seconds result
    for i in "${!names[@]}"; do printf '%-24s %8d  %s\n' "${names[i]}" "${times[i]}" "${results[i]}"; done
    printf '%-24s %8d  %s\n' "in all, of $budget s" "$SECONDS" "$out"
  } | tee -a "$log"
}
trap finish EXIT

# --- What they run -----------------------------------------------------------------------------------------------

# A warning of a library is no reason to fail there. Compiling takes most of the time, so it is done side by side.
tests=(-m pytest -m gpu -q -W default -p no:cacheprovider -p no:benchmark)
if "$python" -c 'import xdist' 2>/dev/null >&2; then tests+=(-n "$(($(nproc) < 8 ? $(nproc) : 8))"); fi
marked=()
while IFS= read -r file; do marked+=("$file"); done < <(grep -l '^@pytest\.mark\.gpu' tests/test_*.py)
if [[ $dry ]]; then ran=collected; else ran=passed; fi # where all are skipped, pytest is content
vectors=tests/test_ptx_wrappers.py
others=()
for file in "${marked[@]}"; do if [[ $file != "$vectors" ]]; then others+=("$file"); fi; done

# Every so many cases of the quick parity list, on the GPU or, in a dry run, on the CPU.
few_cases='
import sys
import numpy
from cuconv import parity
from cuconv.cuda import runtime

place, every = (numpy.asarray if sys.argv[1] else runtime.device_array), int(sys.argv[2])
outcomes = list(parity.run(parity.cases(quick=True)[::every], place))
for outcome in outcomes:
    if not outcome.passed:
        print(outcome.case, outcome.problem)
print(len(outcomes), "cases,", sum(not outcome.passed for outcome in outcomes), "failed")
sys.exit(not all(outcome.passed for outcome in outcomes))
'
facts=name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit
facts+=,temperature.gpu,memory.total,memory.used,mig.mode.current
# What the CSV of a GPU is called: "NVIDIA H200" -> h200.
gpu="dry-run"
if [[ ! $dry ]] && command -v nvidia-smi >/dev/null; then
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr '[:upper:]' '[:lower:]' |
    sed 's/nvidia//; s/[^a-z0-9]\{1,\}/-/g; s/^-//; s/-$//') || gpu=
fi
csv=$out/gpu-${gpu:-unknown}.csv

if wanted machine; then
  absent nvidia-smi nvidia-smi || step nvidia-smi 15 ${dry:+echo} nvidia-smi "--query-gpu=$facts" --format=csv
  step doctor 30 "$python" -m cuconv doctor
fi
if wanted probe; then
  SHOWN=120 step probe 160 "$python" -m benchmarks.probe $dry --json "$out/probe.json"
fi
if wanted kernels; then
  step kernels 60 "$python" -m benchmarks.warm $dry
fi
if wanted parity; then
  # shellcheck disable=SC2016  # the arguments of the inner shell
  step parity 100 bash -c '"$1" -m cuconv parity --quick --json ${2:+--device cpu} >"$3" ||
    { status=$?; cat "$3"; exit $status; }' - "$python" "$dry" "$out/parity.json"
  NEEDS=$ran step tests 60 "$python" "${tests[@]}" ${dry:+--collect-only} "${others[@]}"
fi
if wanted vectors; then
  NEEDS=$ran step vectors 40 "$python" "${tests[@]}" ${dry:+--collect-only} "$vectors"
fi
if wanted sanitize; then
  for tool in memcheck racecheck initcheck synccheck; do
    checked=(compute-sanitizer --target-processes all --tool "$tool" --error-exitcode 1)
    if [[ $dry ]]; then checked=(); fi
    absent "$tool" compute-sanitizer || step "$tool" 30 "${checked[@]}" "$python" -c "$few_cases" "$dry" 40
  done
fi
for group in "${suite[@]}"; do
  if wanted "$group"; then
    step "suite-$group" "$budget" "$python" -m benchmarks.run $dry --group "$group" --csv "$csv" \
      --limit-seconds @75@ --compile-seconds @25@
  fi
done
if wanted report; then
  if [[ $dry ]]; then
    step report 40 "$python" -m benchmarks.report --check
  elif [[ -s $csv ]]; then
    step report 40 "$python" -m benchmarks.report --plots "$out" "$csv"
  else
    noted report 0 "skipped: nothing is measured"
  fi
fi
exit "$failed"
