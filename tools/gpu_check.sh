#!/usr/bin/env bash
# Builds on a machine with an NVIDIA GPU, runs the op tests on CUDA tensors, then every kernel under compute-sanitizer.
# Needs Python with torch and pytest, a C++ compiler and the CUDA toolkit's compute-sanitizer; no network.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export TORCH_FUSED_STRICT=1

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "gpu-check: torch sees no CUDA device")'
"$python" setup.py -q build_ext --inplace
"$python" -m pytest -q tests -k cuda

# Small cases that still reach every kernel, with torch's caching allocator off so that each tensor has its own bounds.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck synccheck initcheck; do
  echo "compute-sanitizer: $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 "$python" tools/gpu_kernels.py
done
echo "gpu-check: tests passed, four sanitizers clean"
