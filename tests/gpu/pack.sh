#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Packs what tests/gpu/run.sh needs on a GPU machine that has no libraries of ours: the programs of
# the cuda build, stripped, and the shared libraries that they load, but those of the C library and
# the compiler, into build/gpu/pack.tar.xz. Prints its size; more than the limit is an error.
#
#   tests/gpu/pack.sh [BUILD]      (default build/cuda)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
build=${1:-build/cuda}
limit=$((60 << 20))
out=build/gpu
rm -rf "$out"
mkdir -p "$out/pack/bin" "$out/pack/lib"
programs=()
for path in "$build"/tests/attention/test_cuda_* "$build"/tests/model/test_cuda_* \
    "$build"/tests/bench/bench_cuda_* "$build"/tests/bench/bench_recall \
    "$build"/tests/bench/bench_questions "$build"/locid "$build"/loci; do
    if [ -f "$path" ] && [ -x "$path" ]; then programs+=("$path"); fi
done
[ ${#programs[@]} -gt 0 ] || {
    echo "pack.sh: $build holds no programs: cmake --preset cuda && cmake --build --preset cuda" >&2
    exit 1
}
for path in "${programs[@]}"; do
    strip -o "$out/pack/bin/$(basename "$path")" "$path"
    ldd "$path" | awk '$2 == "=>" && $3 ~ /^\// {print $3}'
done | sort -u |
    grep -Ev '/(libc|libm|libdl|librt|libpthread|libresolv|libstdc\+\+|libgcc_s|ld-linux[^/]*)\.so' |
    while read -r library; do
        strip --strip-unneeded -o "$out/pack/lib/$(basename "$library")" "$library"
    done
# The programs hold the same kernels: a dictionary as large as all of them finds that.
tar -C "$out" -c pack | xz --lzma2=preset=6,dict=256MiB >"$out/pack.tar.xz"
rm -rf "$out/pack"
size=$(stat -c %s "$out/pack.tar.xz")
echo "$out/pack.tar.xz: $size bytes, ${#programs[@]} programs"
[ "$size" -le "$limit" ] || {
    echo "pack.sh: more than $limit bytes" >&2
    exit 1
}
