#!/usr/bin/env bash
# Makes the virtual environment and finds or builds MinIO. Called by make; safe to run again.
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
  echo "setup: making $VENV"
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

# Whoever trusts an authority of their own has told the system.
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}" UV_NATIVE_TLS="${UV_NATIVE_TLS:-1}"
echo "setup: installing locked dependencies (SGLang among them: about 7 GB)"
"$UV" pip install -q -p "$VENV/bin/python" --no-deps --require-hashes --compile-bytecode \
  -r locks/requirements.txt
# Not from uv's cache, which does not know what else is compiled.
"$UV" pip install -q -p "$VENV/bin/python" --no-deps --refresh-package sglang-memkv \
  -e . -e cpu-platform
"$VENV/bin/python" -c "import memkv_sglang.tiers.minio.http.receive_loop" 2>/dev/null || cat >&2 <<'TEXT'
setup: no compiled loop loads from MinIO (memkv doctor says why); all works, with more CPU a page.
setup: For a C compiler with Python's headers: apt-get install gcc python3-dev, then
setup: make --always-make setup
TEXT
PATH="$PWD/$VENV/bin:$PATH" "$VENV/bin/python" -m sglang_cpu_platform.prepare
"$VENV/bin/python" -m memkv_testbed.minio_binary >/dev/null
