#!/usr/bin/env bash
# build.sh agent|sglang [BASE]: build an image from this checkout; prints its name and size.
#
# BASE     base image; the default is in the Containerfile
# PYTHON   interpreter that builds the wheels; must have the version of the base image's Python.
#          The default is python3.11. For SGLang's image, run `python3 --version` in it
# ENGINE   buildah (default), podman or docker
#
# Wheels are built here, so the image needs no compiler.
set -euo pipefail
cd "$(dirname "$0")/../.."

kind=${1:?agent or sglang}
base=${2:-}
python=${PYTHON:-python3.11}
engine=${ENGINE:-buildah}
name="memkv-$kind"
context="build/container/$kind"

rm -rf "$context"
mkdir -p "$context/wheels"
# The versions of the lock file. pip rejects hashes for the wheel of a local directory.
sed -E '/^ +--hash/d; s/ *\\$//' locks/requirements.txt >"$context/constraints.txt"
"$python" -m pip wheel --quiet --disable-pip-version-check --wheel-dir "$context/wheels" \
  --constraint "$context/constraints.txt" ".[encryption]" pip

options=(--file "deploy/container/Containerfile.$kind" --tag "$name")
[ -z "$base" ] || options+=(--build-arg "BASE=$base")
case "$engine" in
  buildah)
    # Needs no daemon, and no privileges except a user namespace.
    buildah --storage-driver "${STORAGE_DRIVER:-vfs}" build --quiet --isolation chroot \
      "${options[@]}" "$context" >/dev/null
    size=$(buildah --storage-driver "${STORAGE_DRIVER:-vfs}" images --format '{{.Size}}' "$name")
    ;;
  *)
    "$engine" build --quiet "${options[@]}" "$context" >/dev/null
    size=$("$engine" images --format '{{.Size}}' "$name")
    ;;
esac
echo "$name: $size"
