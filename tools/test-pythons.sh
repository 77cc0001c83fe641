#!/usr/bin/env bash
# Build a wheel for each supported Python and run the fast tests with it; see `make test-python`.
#
# tools/test-pythons.sh                   every supported version that is installed here
# tools/test-pythons.sh 3.12              this version, which must be installed
# PYTEST_ARGS="-x -k name" ...            more arguments for pytest
#
# The tests need neither SGLang nor torch. A version that is missing is reported and skipped, unless it
# was named. Looks in PATH, in uv's own installations and in pyenv's.
set -euo pipefail
cd "$(dirname "$0")/.."

SUPPORTED=(3.11 3.12 3.13)
TESTS=(tests/tiers tests/engine tests/config tests/agent tests/encryption)
WORK=build/pythons

# Use the system's certificates, which may include a private authority's.
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}" UV_NATIVE_TLS="${UV_NATIVE_TLS:-1}"
export UV_PYTHON_DOWNLOADS=never
unset VIRTUAL_ENV

find_uv() {
  local candidate
  for candidate in "$(command -v uv || true)" .venv/bin/uv "$WORK/uv/bin/uv"; do
    if [ -x "$candidate" ]; then echo "$candidate"; return; fi
  done
  python3 -m venv "$WORK/uv" && "$WORK/uv/bin/pip" install -q --disable-pip-version-check uv
  echo "$WORK/uv/bin/uv"
}

find_python() {
  local version=$1 candidate
  for candidate in "$("$UV" python find --no-project --system "$version" 2>/dev/null || true)" \
    "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
    if [ -x "$candidate" ]; then echo "$candidate"; return; fi
  done
  return 1
}

test_with() {
  local version=$1 python=$2 folder="$WORK/$1"
  rm -rf "$folder"
  mkdir -p "$folder/checkout"
  "$UV" build -q --wheel --python "$python" --out-dir "$folder" "$WORK"/sglang_memkv-*.tar.gz
  local wheel=("$PWD/$folder"/*.whl)
  echo "python $version: $("$python" -V), $(basename "${wheel[0]}")"
  "$UV" venv -q --no-project --python "$python" "$folder/venv"
  "$UV" pip install -q --python "$folder/venv/bin/python" --no-verify-hashes \
    --constraint locks/requirements.txt \
    "sglang-memkv[encryption,testing] @ file://${wheel[0]}" pytest-timeout pytest-xdist
  # A copy without memkv_sglang, so that the tests import the wheel.
  cp -r tests docs cpu-platform pyproject.toml "$folder/checkout"
  # In the environment instead of PYTHONPATH, which tests change for the processes they start.
  echo "$PWD/$folder/checkout/cpu-platform" > "$folder/venv/lib/python$version/site-packages/testbed.pth"
  (
    cd "$folder/checkout"
    # shellcheck disable=SC2086  # several arguments
    PATH="$PWD/../venv/bin:$PATH" ../venv/bin/python -m pytest -q \
      -n 2 --dist loadscope -m "not slow" ${PYTEST_ARGS:-} "${TESTS[@]}"
  )
}

mkdir -p "$WORK"
rm -f "$WORK"/*.tar.gz
UV=$(find_uv)
[[ "$UV" = /* ]] || UV="$PWD/$UV"
"$UV" build -q --sdist --out-dir "$WORK" .

missing=() failed=() passed=()
for version in "${@:-${SUPPORTED[@]}}"; do
  if ! python=$(find_python "$version"); then
    missing+=("$version")
    continue
  fi
  # Not as a condition: `set -e` would not apply inside.
  set +e
  (set -e; test_with "$version" "$python")
  status=$?
  set -e
  if [ $status -eq 0 ]; then passed+=("$version"); else failed+=("$version"); fi
done

echo "passed: ${passed[*]:-none}; failed: ${failed[*]:-none}; not installed here: ${missing[*]:-none}"
[ -z "${failed[*]}" ] && [ -n "${passed[*]}" ] && { [ $# -eq 0 ] || [ -z "${missing[*]}" ]; }
