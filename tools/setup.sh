#!/usr/bin/env bash
# Create the virtual environment, and find or build a MinIO server. `make setup` runs this; running it
# again is safe.
set -euo pipefail

missing() {
  echo "setup: $1 is missing. Install it: $2" >&2
  exit 1
}

command -v "$PYTHON" >/dev/null || missing "$PYTHON" "apt-get install python3 python3-venv"
"$PYTHON" - <<'PY' || missing "Python 3.11 to 3.13 (this is $("$PYTHON" -V 2>&1))" \
  "apt-get install python3.11 python3.11-venv, then make PYTHON=python3.11"
import sys
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PY
command -v c++ >/dev/null || missing "a C++ compiler" "apt-get install g++"

if [ ! -x "$VENV/bin/python" ]; then
  echo "setup: creating $VENV"
  if command -v uv >/dev/null; then
    uv venv -q --python "$PYTHON" "$VENV"
  else
    "$PYTHON" -m venv "$VENV" 2>/dev/null || missing "the venv module" "apt-get install python3-venv"
  fi
fi
if command -v uv >/dev/null; then
  UV=uv
else
  UV="$VENV/bin/uv"
  [ -x "$UV" ] || "$VENV/bin/python" -m pip install -q --disable-pip-version-check uv
fi

# Use the system's certificates, which may include a private authority's.
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}" UV_NATIVE_TLS="${UV_NATIVE_TLS:-1}"
echo "setup: installing locked dependencies, including SGLang (about 7 GB)"
"$UV" pip install -q -p "$VENV/bin/python" --no-deps --require-hashes --compile-bytecode \
  -r locks/requirements.txt
# uv's cache does not notice a changed .pyx file or a newly installed compiler.
"$UV" pip install -q -p "$VENV/bin/python" --no-deps --refresh-package sglang-memkv \
  -e . -e cpu-platform
"$VENV/bin/python" -c "import memkv_sglang.tiers.minio.http.bulk_loop" 2>/dev/null || cat >&2 <<'TEXT'
setup: the Cython modules were not compiled (`memkv doctor` says why). Everything works, but loads
setup: from MinIO and uploads use more CPU. To compile them, run apt-get install gcc python3-dev, then
setup: make --always-make setup
TEXT
PATH="$PWD/$VENV/bin:$PATH" "$VENV/bin/python" -m sglang_cpu_platform.prepare
"$VENV/bin/python" -m memkv_testbed.server_binaries >/dev/null
