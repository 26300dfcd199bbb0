#!/usr/bin/env bash
# All that needs a GPU, in one command on the GPU machine:   bash .gpu/run.sh [quick|full|STEP ...]
#
# Every step has its own limit, goes on after a failure of another, and leaves its output in logs.txt under $OUT.  The
# table of verdicts is printed last.  Without a GPU it runs as well, to be tried: the steps then fail or are skipped.
set -u
START=$(date +%s)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$PWD
[ -f "$root/pyproject.toml" ] || root=$(cd "$here/.." && pwd)
cd "$root"
mode=${1:-full}
case $mode in
  quick) LIMIT=${GPU_SECONDS:-115} ; STEPS="smoke kernels selftest" ;;
  full) LIMIT=${GPU_SECONDS:-475} ; STEPS="smoke selftest kernels job pytest solvers bench sanitizer bench8" ;;
  *) LIMIT=${GPU_SECONDS:-475} ; STEPS="$*" ; mode=chosen ;;
esac
PY=${PY:-python3}
WORK=$(mktemp -d)
OUT=${OUT:-$WORK/out}
mkdir -p "$OUT" "$WORK/logs" "$WORK/verdicts" "$WORK/site"
cleanup() { rm -rf "$WORK/model" "$WORK/compressed" "$WORK/compressed-default" "$WORK/site"; }
trap cleanup EXIT

export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false CI=1
export COSPADI_CACHE=$WORK/cache CUPY_CACHE_DIR=$WORK/cupy HF_HOME=$WORK/hf TRITON_CACHE_DIR=$WORK/triton
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} COLUMNS=160 NO_COLOR=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH=$WORK/site:$root:$root/cli${PYTHONPATH:+:$PYTHONPATH}

left() { echo $((LIMIT - ($(date +%s) - START))); }

# step NUMBER NAME SECONDS COMMAND...: at most SECONDS, and no more than is left of the whole.
step() {
  local number=$1 name=$2 most=$3 rest begun took rc verdict last
  shift 3
  rest=$(left)
  [ "$rest" -lt "$most" ] && most=$rest
  local log=$WORK/logs/$number-$name.log
  if [ "$most" -lt 8 ]; then
    printf '%s %-12s %-9s %5s  %s\n' "$number" "$name" "no time" - "" >"$WORK/verdicts/$number"
    return 0
  fi
  begun=$(date +%s)
  echo "[$((begun - START)) s] $name (at most $most s)"
  timeout -k 5 "$most" "$@" >"$log" 2>&1 </dev/null
  rc=$?
  took=$(($(date +%s) - begun))
  case $rc in
    0) verdict=ok ;;
    3) verdict=skipped ;;
    124 | 137) verdict="TIMED OUT" ;;
    *) verdict="FAILED $rc" ;;
  esac
  last=$(grep -v '^ *$' "$log" | tail -1 | tr -d '\r' | cut -c1-110)
  printf '%s %-12s %-9s %4ss  %s\n' "$number" "$name" "$verdict" "$took" "$last" >"$WORK/verdicts/$number"
  collect
  return 0
}

# All logs in one file, written again after each step, so that a run that is killed has them too.
collect() {
  for log in "$WORK"/logs/*.log; do
    [ -f "$log" ] || continue
    printf '\n======== %s ========\n' "$(basename "$log")"
    tail -c 1500000 "$log"
  done >"$WORK/logs.txt" 2>/dev/null
  mv "$WORK/logs.txt" "$OUT/logs.txt" 2>/dev/null
  cat "$WORK"/verdicts/* >"$OUT/table.txt" 2>/dev/null
}

wants() { case " $STEPS " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

export PY WORK OUT LIMIT START here root mode

echo "mode $mode, at most $LIMIT s: $STEPS"
step 00 nvidia-smi 15 bash "$here/steps.sh" smi
step 01 setup 60 bash "$here/steps.sh" setup
wants smoke && step 02 smoke "$([ "$mode" = quick ] && echo 50 || echo 75)" "$PY" "$here/smoke.py"
wants selftest && [ "$mode" != quick ] && step 03 selftest 120 bash "$here/steps.sh" selftest
wants kernels && step 04 kernels 65 bash "$here/steps.sh" kernels
# These two measure no speed and mostly wait for the host: side by side.
wants job && { step 05 job 170 bash "$here/steps.sh" job & }
wants pytest && { step 06 pytest 120 bash "$here/steps.sh" run_pytest & }
wait
wants solvers && step 07 solvers 110 bash "$here/steps.sh" solvers
wants bench && step 08 bench 60 bash "$here/steps.sh" bench speed-cuda.json --quiet
wants sanitizer && step 09 sanitizer 80 bash "$here/steps.sh" sanitizer
wants bench8 && step 10 bench-int8 60 bash "$here/steps.sh" bench speed-cuda-int8.json "--value-dtype int8 --quiet"
# In the quick mode the package's own checks take what is left, and may not come to their end.
wants selftest && [ "$mode" = quick ] && step 03 selftest 60 bash "$here/steps.sh" selftest
collect

echo
echo "================ what was measured ================"
[ -s "$OUT/selftest.json" ] && grep -hE '^(failed|skipped) ' "$WORK/logs/03-selftest.log" | cut -c1-260 | head -25
[ -f "$WORK/logs/02-smoke.log" ] && grep -E '^FAILED' "$WORK/logs/02-smoke.log" | cut -c1-260
[ -f "$WORK/logs/02-smoke.log" ] && echo "smoke: $(grep -c '^ok' "$WORK/logs/02-smoke.log") checks ok"
[ -f "$WORK/logs/04-kernels.log" ] && cut -c1-116 "$WORK/logs/04-kernels.log" | tail -50
for file in speed-cuda.json speed-cuda-int8.json; do [ -s "$OUT/$file" ] && "$PY" "$here/summary.py" speed "$OUT/$file"; done
[ -f "$WORK/logs/07-solvers.log" ] && cut -c1-140 "$WORK/logs/07-solvers.log" | tail -12
[ -f "$WORK/logs/05-job.log" ] && grep -E '^ *[a-z]+: perplexity|perplexities|^totals|^default' "$WORK/logs/05-job.log" | cut -c1-300
[ -f "$WORK/logs/06-pytest.log" ] && grep -E '^(FAILED|ERROR)|passed|failed' "$WORK/logs/06-pytest.log" | cut -c1-200 | tail -15
echo
echo "================ verdicts, $(($(date +%s) - START)) s ================"
cat "$WORK"/verdicts/*
exit 0
