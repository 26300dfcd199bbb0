#!/usr/bin/env bash
# The steps of run.sh, one per function; run.sh sets the variables and calls   bash steps.sh STEP [ARGUMENT ...]
set -u
left() { echo $((LIMIT - ($(date +%s) - START))); }

smi() {
  # Its exit code says whether there is a GPU; nothing of the card's settings is touched.
  command -v nvidia-smi >/dev/null || { echo "no nvidia-smi: no GPU here"; return 3; }
  nvidia-smi
  nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem --format=csv,noheader
}

setup() {
  # Wheels only where something is missing or too old, so that a complete environment stays as it is.
  if ! "$PY" - <<'CODE'
import importlib.util as u, sys
lacking = [n for n in ("array_api_compat", "greenlet", "lazy_loader", "pydantic", "typing_inspection", "transformers") if not u.find_spec(n)]
if not lacking:
    from importlib.metadata import version
    if tuple(map(int, version("transformers").split(".")[:2])) < (5, 20):
        lacking = ["transformers"]
print("lacking:", lacking or "nothing")
sys.exit(bool(lacking))
CODE
  then
    "$PY" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$WORK/site" "$here"/wheels/*.whl || return 1
  fi
  "$PY" "$here/environment.py" "$root" "$WORK/site"
}

cli() { "$PY" -m cospadi_cli "$@"; }

selftest() { "$PY" "$here/self_checks.py" "$OUT/selftest.json"; }

bench() {
  # Tokens of the fused kernels, of the border and of prefill; CUDA graphs and eager calls both come out.
  local shapes="--shape 4096,4096 --shape 4096,14336 --shape 8192,8192" tokens=1,8,16,64,1024 repeats=7
  [ "$mode" = quick ] && { shapes="--shape 4096,4096 --shape 8192,8192"; tokens=1,8,64; repeats=5; }
  # shellcheck disable=SC2086
  cli bench $shapes --ratio 0.3 --tokens $tokens --backend cuda --device cuda --repeats $repeats --out "$OUT/$1" $2
}

job() {
  local device=cuda solver=ksvd-cupy backend=cuda seconds=12 tokens=8192 rc=0
  if [ "${GPU_DRY:-0}" = 1 ]; then device=cpu solver=ksvd-numpy backend=cpu seconds=0 tokens=512; fi
  "$PY" "$here/small_llama.py" "$WORK/model" --seconds $seconds || return 1
  echo "---- compress"
  cli compress "$WORK/model" -o "$WORK/compressed" --ratio 0.2 --solver $solver --solver-option n_iter=10 \
    --storage factors --dictionary learned --side input --value-dtype bfloat16 --backend $backend --device $device \
    --samples 32 --seq-len 128 --eval-tokens $tokens --quiet --log-file "$WORK/logs/05-compress-progress.log" || return 1
  cp "$WORK/compressed/report.json" "$OUT/compress-report.json"
  "$PY" "$here/summary.py" report "$WORK/compressed/report.json"
  echo "---- eval on each backend"
  for one in $backend reference torch auto; do
    cli eval "$WORK/compressed" --backend $one --device $device --tokens $tokens --window 256 --json --quiet >"$WORK/eval-$one.json" &
  done
  wait
  "$PY" "$here/summary.py" perplexities "$WORK/eval-$backend.json" "$WORK"/eval-{reference,torch,auto}.json || rc=1
  echo "---- generate"
  for one in $backend reference; do
    cli generate "$WORK/compressed" --prompt "The history of" --max-new-tokens 40 --backend $one --device $device || rc=1
  done
  if [ "$device" = cuda ]; then
    echo "---- tokens per second of the model"
    cli bench "$WORK/compressed" --device cuda --backend cuda --dtype bfloat16 --prompt-tokens 128 --new-tokens 32 --repeats 3 --quiet || rc=1
  fi
  if [ "$device" = cuda ]; then
    echo "---- compress with the default options: quantised weights and int8 factors too"
    if timeout 60 "$PY" -m cospadi_cli compress "$WORK/model" -o "$WORK/compressed-default" --ratio 0.4 --device $device \
      --samples 16 --seq-len 128 --eval-tokens 0 --quiet >"$WORK/default.txt" 2>&1; then
      echo "default options: compressed"
    else
      cat "$WORK/default.txt"
      echo "default options FAILED: $(grep -v '^ *$' "$WORK/default.txt" | tail -1 | cut -c1-240)"
      rc=1
    fi
  fi
  if [ $rc = 0 ]; then echo "compress, eval and generate done"; else echo "a part of it failed: see logs.txt"; fi
  return $rc
}

run_pytest() {
  local parallel=""
  "$PY" -c "import xdist" 2>/dev/null && [ "${GPU_DRY:-0}" = 0 ] && parallel="-n 4"
  # shellcheck disable=SC2086
  "$PY" -m pytest -o addopts="--strict-markers" -m gpu -q --maxfail=25 --timeout 120 -p no:cacheprovider $parallel -rfEs --tb=short \
    tests/backends/test_backends.py tests/backends/test_output_side.py tests/solvers/test_laws.py
}

kernels() {
  local more=""
  [ "$mode" = quick ] && more="--shape 8192,8192 --shape 4096,4096 --tokens 1,8,64,1024 --seconds 25"
  [ "${GPU_DRY:-0}" = 1 ] && more="--shape 256,256 --shape 192,320 --tokens 1,9 --seconds 20"
  # shellcheck disable=SC2086
  "$PY" "$here/layer_times.py" --out "$OUT/kernels-gpu.json" --seconds 45 $more
}

solvers() {
  local shape=4096,4096
  [ "${GPU_DRY:-0}" = 1 ] && shape=96,128
  "$PY" "$here/solver_times.py" --out "$OUT/solvers-gpu.json" --shape $shape --seconds 70
}

sanitizer() {
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer"; return 3; }
  # Reads and writes out of bounds, then races in shared memory.  torch's memory pool would hide the first; other
  # libraries have findings of their own, so only our kernels are watched.
  local ours="--kernel-name kns=combine_ --kernel-name kns=project_ --kernel-name kns=densify_ --kernel-name kns=finish_"
  local rc=0
  for tool in memcheck racecheck; do
    [ "$(left)" -gt 15 ] || { echo "no time for $tool"; break; }
    # shellcheck disable=SC2086
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool $ours --print-limit 8 --error-exitcode 9 \
      "$PY" "$here/every_kernel.py" || rc=$?
  done
  return $rc
}

"$@"
