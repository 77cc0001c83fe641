#!/usr/bin/env bash
# try-agent.sh [IMAGE]: start the agent of an image as Kubernetes would: a non-root user, no
# capabilities, a read-only root file system, and separate namespaces. Prints the time until it is
# ready, and ends with its exit status after SIGTERM. Needs root and buildah.
set -euo pipefail

image=${1:-localhost/memkv-agent}
buildah=(buildah --storage-driver "${STORAGE_DRIVER:-vfs}")
work=$(mktemp -d)
container=$("${buildah[@]}" from "$image")
finish() {
  "${buildah[@]}" umount "$container" >/dev/null
  "${buildah[@]}" rm "$container" >/dev/null
  rm -rf "$work"
}
trap finish EXIT
root=$("${buildah[@]}" mount "$container")
mapfile -t environment < <(
  "${buildah[@]}" inspect --type image --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$image" |
    grep .
)
install -d -o 1000 -g 1000 -m 0700 "$work/run" "$work/cache"

begin=$(date +%s%N)
# shellcheck disable=SC2016  # expanded by the inner shell
unshare --mount --pid --fork --net --kill-child bash -c '
  set -e
  root=$1 work=$2
  shift 2
  ip link set lo up 2>/dev/null || true
  mount --bind "$root" "$root"
  mount --bind "$work/run" "$root/run/memkv"
  mount --bind "$work/cache" "$root/var/cache/memkv"
  mount -t proc proc "$root/proc"
  mount -t tmpfs tmpfs "$root/tmp"
  mount -o remount,bind,ro "$root"
  exec chroot "$root" setpriv --reuid 1000 --regid 1000 --clear-groups --bounding-set=-all \
    --inh-caps=-all --no-new-privs env -i "$@" MEMKV_NVME_CAPACITY=64MiB \
    /opt/memkv/bin/memkv agent --supervise
' bash "$root" "$work" "${environment[@]}" 2>"$work/log" &
started=$!
until grep -q 'event="agent ready"' "$work/log"; do
  kill -0 "$started" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
  sleep 0.02
done
echo "ready after $(( ($(date +%s%N) - begin) / 1000000 )) ms"
supervisor=$(pgrep -P "$started")
! touch "/proc/$supervisor/root/opt/memkv/probe" 2>/dev/null || { echo "the root file system is writable" >&2; exit 1; }
grep -E '^(Uid|CapBnd|NoNewPrivs|Seccomp):' "/proc/$supervisor/status"
kill -TERM "$supervisor"
wait "$started"
echo "stopped in order"
