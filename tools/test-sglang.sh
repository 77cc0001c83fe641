#!/usr/bin/env bash
# Run tests with another version of SGLang, in an environment of its own: build/sglang-VERSION.
# Usage: tools/test-sglang.sh VERSION [arguments of pytest]. `make test-sglang` runs this.
#
# The environment has the locked dependencies, except where that version requires others.
set -euo pipefail

version=${1:-}
if ! [[ $version =~ ^[0-9]+(\.[0-9a-z]+)+$ ]]; then
  echo "test-sglang: which version? For instance: make test-sglang VERSION=0.5.22" >&2
  exit 2
fi
shift
venv="build/sglang-$version"
uv=$(command -v uv || echo .venv/bin/uv)
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}" UV_NATIVE_TLS="${UV_NATIVE_TLS:-1}"

if ! [ "$venv/.ready" -nt locks/requirements.txt ]; then
  echo "test-sglang: creating $venv"
  rm -rf "$venv"
  "$uv" venv -q --python .venv/bin/python "$venv"
  "$uv" pip install -q -p "$venv/bin/python" --no-deps --require-hashes -r locks/requirements.txt
  "$uv" pip install -q -p "$venv/bin/python" --excludes locks/gpu-only.txt --compile-bytecode \
    "sglang==$version"
  "$uv" pip install -q -p "$venv/bin/python" --no-deps -e . -e cpu-platform
  touch "$venv/.ready"
fi

# Each version compiles other page hashes.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/$venv/torch-extensions}"
PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m sglang_cpu_platform.prepare
exec "$venv/bin/python" -m pytest "$@"
