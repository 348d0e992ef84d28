#!/usr/bin/env bash
# Builds on a machine with an NVIDIA GPU, runs the tests on CUDA tensors, then every kernel and whole generations under
# compute-sanitizer, and prints one table. Needs Python with torch, transformers and pytest, a C++ compiler and the CUDA
# toolkit's compute-sanitizer; no network. The exit status is 0 if all tests pass and no tool reports an error.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export TORCH_FUSED_STRICT=1

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "gpu-check: torch sees no CUDA device")'
"$python" setup.py -q build_ext --inplace

log=$(mktemp)
trap 'rm -f "$log"' EXIT
table=$(printf '%-22s %-34s %s' gpu-check result seconds)
failed=0

# check NAME PATTERN COMMAND...: runs the command; the result is the last line of its output that matches the pattern.
check() {
  local name=$1 pattern=$2 status=0 start=$SECONDS result
  shift 2
  "$@" 2>&1 | tee "$log" || status=$?
  result=$(grep -Eo "$pattern" "$log" | tail -n 1 || true)
  if [ $status != 0 ] || [ -z "$result" ]; then
    failed=1
    result="FAILED: ${result:-no result, exit status $status}"
  fi
  table+=$(printf '\n%-22s %-34s %d' "$name" "$result" $((SECONDS - start)))
}

check tests '([0-9]+ failed, )?[0-9]+ passed' "$python" -m pytest -q tests -k cuda

# Small cases that still reach every kernel, with torch's caching allocator off so that each tensor has its own bounds.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for script in kernels generate; do
  for tool in memcheck racecheck synccheck initcheck; do
    check "$script, $tool" '[0-9]+ errors?' \
      compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 "$python" "tools/gpu_$script.py"
  done
done

echo
echo "$table"
exit $failed
