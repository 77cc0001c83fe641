#!/usr/bin/env bash
# debian-base.sh [NAME]: make a base image from Debian packages, without an image registry.
# Needs root, debootstrap and buildah. NAME is the image's name; the default is memkv-debian.
set -euo pipefail

name=${1:-memkv-debian}
buildah=(buildah --storage-driver "${STORAGE_DRIVER:-vfs}")
work=$(mktemp -d)
container=
finish() {
  [ -z "$container" ] || "${buildah[@]}" rm "$container" >/dev/null
  rm -rf "$work"
}
trap finish EXIT

debootstrap --variant=minbase --include=python3,ca-certificates bookworm "$work/root" >"$work/log" 2>&1 ||
  { tail -5 "$work/log" >&2; exit 1; }
rm -rf "$work"/root/var/{cache/apt,lib/apt/lists,log}/* "$work"/root/usr/share/{doc,man,locale,info}/*
container=$("${buildah[@]}" from scratch)
"${buildah[@]}" add --quiet "$container" "$work/root" / >/dev/null
"${buildah[@]}" config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
"${buildah[@]}" commit --quiet "$container" "$name" >/dev/null
echo "$name"
