#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds the image and checks that it does what docker/ promises: an address that others reach is
# refused unless asked for; the daemon runs as a plain user with a read-only root, no capabilities
# and bounded memory; it turns healthy; a folder registered over the published port is answered
# from, and still is by the next container on the same volume; SIGTERM ends it in order.
#
#   docker/check.sh [ARGUMENT OF build...]
#
# Takes docker or podman, whichever works, or CONTAINER_ENGINE. The image loci:check stays. Where
# podman may not make namespaces while building, BUILDAH_ISOLATION=chroot helps.
set -eu
cd "$(dirname "$0")/.."
image=loci:check
name=loci-check-$$
work=$(mktemp -d)
export BUILDAH_FORMAT=docker # podman's own format has no HEALTHCHECK

say() { printf '== %s\n' "$*" >&2; }
fail() {
    printf 'check.sh: %s\n' "$*" >&2
    ! "$engine" inspect "$name" >/dev/null 2>&1 || "$engine" logs "$name" 2>&1 | tail -n 20 >&2
    exit 1
}
cleanup() {
    [ -z "$engine" ] || "$engine" rm -f "$name" >/dev/null 2>&1 || true
    [ -z "$engine" ] || "$engine" volume rm "$name" >/dev/null 2>&1 || true
    rm -rf "$work"
}

engine=${CONTAINER_ENGINE:-}
for candidate in docker podman; do
    [ -n "$engine" ] || ! "$candidate" info >/dev/null 2>&1 || engine=$candidate
done
trap cleanup EXIT
trap 'exit 130' INT TERM
[ -n "$engine" ] || { echo "check.sh: neither docker nor podman works here" >&2; exit 1; }

start() { # a container on the volume; returns when it is healthy
    "$engine" run -d --name "$name" -v "$name:/data" -p 127.0.0.1::7411 \
        -e LOCI_SERVER_LISTEN=0.0.0.0:7411 -e LOCI_SERVER_INSECURE=true \
        --read-only --cap-drop ALL --security-opt no-new-privileges --memory 1g "$image" >/dev/null
    for _ in $(seq 120); do
        case $("$engine" --version) in
        podman*) "$engine" healthcheck run "$name" >/dev/null 2>&1 && state=healthy || state=no ;;
        *) state=$("$engine" inspect -f '{{.State.Health.Status}}' "$name") ;;
        esac
        [ "$state" != healthy ] || break
        [ "$("$engine" inspect -f '{{.State.Running}}' "$name")" = true ] || fail "locid has ended"
        sleep 1
    done
    [ "$state" = healthy ] || fail "not healthy after two minutes"
    address=$("$engine" port "$name" 7411/tcp | head -n 1)
}
stop() { # must drain and end with 0
    "$engine" stop -t 30 "$name" >/dev/null
    code=$("$engine" inspect -f '{{.State.ExitCode}}' "$name")
    [ "$code" = 0 ] || fail "SIGTERM: exit status $code"
    "$engine" logs "$name" 2>&1 | grep -q 'stopped$' || fail "SIGTERM: no orderly end in the log"
    "$engine" rm "$name" >/dev/null
}
loci() { # the command line in a container of its own, through the published port
    "$engine" run --rm --no-healthcheck --network host -e "LOCI_ADDRESS=$address" \
        -v "$work:/notes:ro,z" --entrypoint loci "$image" "$@"
}
ask() {
    answer=$(loci ask notes "What is the code of the boat house?") || fail "ask failed"
    printf '%s\n' "$answer" | grep -q 4417 || fail "not the answer: $answer"
}

say "building $image with $engine"
"$engine" build "$@" -f docker/Dockerfile -t "$image" \
    --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" .
say "image: $(($("$engine" inspect -f '{{.Size}}' "$image") / 1000000)) MB; version, addresses"
version='{{index .Config.Labels "org.opencontainers.image.version"}}'
[ "$("$engine" run --rm --no-healthcheck "$image" --version)" = \
    "locid $("$engine" inspect -f "$version" "$image")" ] || fail "not the version of the label"
if "$engine" run --rm --no-healthcheck -e LOCI_SERVER_LISTEN=0.0.0.0:7411 "$image" \
    --check-config 2>"$work/log"
then fail "listens on every interface without being told that this is meant"; fi
grep -q -e --insecure "$work/log" || fail "unexpected: $(cat "$work/log")"

say "first container: rights, memory, register, ask"
printf '# Notices\n\nThe code of the boat house is 4417.\n' >"$work/notices.md"
printf '# Keys\n\nThe keeper of the keys is Ada Greenaway.\n' >"$work/keys.md"
chmod -R a+rX "$work"
start
[ "$("$engine" exec "$name" id -u)" = 10001 ] || fail "not the user 10001"
"$engine" exec "$name" grep -Eq ' / [^ ]+ ro[, ]' /proc/mounts || fail "root is writable"
loci status --json | grep -Eq '"memory_budget_bytes": *536870912' ||
    fail "the budget is not half of 1 GiB"
loci register notes /notes --create
ask
stop
say "second container on the same volume"
start
ask
stop
say "all good"
