#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs what tests/gpu/pack.sh packed on a machine with a GPU, which needs neither a compiler nor
# libraries of ours: the tests of the cuda backend with fresh random inputs (test), some of them under
# compute-sanitizer where that is installed (sanitize), the service end to end beside the CPU
# (service), the benchmarks (bench). A table of the results comes last; logs go to $OUT (default
# build/gpu/out). Exit code 1: something failed; 77: nothing ran, no GPU.
#
#   tests/gpu/run.sh [test] [service] [bench] [sanitize]      (default: all)
#
# BENCH_TOKENS: corpus sizes of the benchmarks (default 131072 524288). BENCH_ROWS: query tokens of a
# step (default 1 16). BENCH_TEXTS: what a random model of seven billion parameters registers and is
# asked (bench_questions; default words:4096,words:131072), where there are 100 GB of memory and of
# space in BENCH_DATA (default /tmp). BENCH_KV: a key-value dump of a model (bench_recall --dump). BENCH_KERNELS: the
# published kernels of Squeezed Attention (tests/bench/gpu/squeezed_triton.py).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
wanted=${*:-test service bench sanitize}
out=${OUT:-build/gpu/out}
mkdir -p "$out"
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
xz -dc build/gpu/pack.tar.xz | tar -C "$unpacked" -x || exit 1
bin=$unpacked/pack/bin

# cuBLASLt: of the system, of a CUDA toolkit, or of Python's packages.
find_cublaslt() {
    local found
    found=$(ldconfig -p 2>/dev/null | awk '/libcublasLt\.so\.13/ {print $NF; exit}')
    [ -n "$found" ] || found=$(find -L "${CUDA_HOME:-/usr/local/cuda}" -maxdepth 5 \
        -name libcublasLt.so.13 2>/dev/null | head -n 1)
    [ -n "$found" ] || found=$(python3 -c '
import glob, sys
for folder in sys.path:
    for path in glob.glob(folder + "/nvidia/*/lib/libcublasLt.so.13"):
        print(path)' 2>/dev/null | head -n 1)
    [ -n "$found" ] && dirname "$found"
}
cublaslt=$(find_cublaslt) || echo "run.sh: libcublasLt.so.13 was not found" >&2
export LD_LIBRARY_PATH=$unpacked/pack/lib${cublaslt:+:$cublaslt}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LOCI_TEST_SEED=${LOCI_TEST_SEED:-$RANDOM}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
echo "LOCI_TEST_SEED=$LOCI_TEST_SEED"

rows=()
failed=0
ran=0
# check NAME SECONDS COMMAND...: one row of the table
check() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    local verdict="failed ($status)"
    case $status in
    0) verdict=passed ran=$((ran + 1)) ;;
    77) verdict=$(grep -m 1 skipped "$out/$name.log") ;;
    124) verdict="not finished after $limit s" failed=1 ran=$((ran + 1)) ;;
    *) failed=1 ran=$((ran + 1)) ;;
    esac
    rows+=("$(printf '%-28s %4d s  %s' "$name" $((SECONDS - start)) "$verdict")")
    case $status in 0 | 77) ;; *) grep -E 'ERROR|error|FAILED|=====|LINE' "$out/$name.log" | head -n 20 ;; esac
}

bench_seven_billion() {
    local data=${BENCH_DATA:-/tmp} memory disk gpu
    memory=$(awk '/MemAvailable/ {print int($2 / 1000000)}' /proc/meminfo)
    disk=$(df -P "$data" | awk 'NR == 2 {print int($4 / 1000000)}')
    gpu=$(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits 2>/dev/null | head -n 1)
    if [ "$memory" -lt 100 ] || [ "$disk" -lt 100 ] || [ "${gpu:-0}" -lt 90000 ]; then
        rows+=("bench of 7 billion parameters: skipped: $memory GB of memory, $disk of disk, ${gpu:-0} MiB of the GPU's are free")
        return
    fi
    check bench_7b_model 120 python3 tests/bench/random_model.py 7b "$unpacked/7b" --words
    check bench_7b 900 "$bin/bench_questions" --data "$data" "$unpacked/7b" \
        "${BENCH_TEXTS:-words:4096,words:131072}" cuda hierarchical,dense 4 64 1 8
    rm -rf "$unpacked/7b"
}

case " $wanted " in *" test "*)
    for program in "$bin"/test_cuda_*; do
        check "$(basename "$program")" 90 "$program"
    done
    ;;
esac

case " $wanted " in *" service "*)
    check service 240 python3 tests/gpu/service.py "$bin" model/default
    cat "$out/service.log"
    ;;
esac

case " $wanted " in *" sanitize "*)
    if ! command -v compute-sanitizer >/dev/null; then
        rows+=("sanitizers                           skipped: compute-sanitizer is not installed")
    else
        # sanitize TOOL TOPIC TESTS: those whose names match
        sanitize() {
            local part=${3//[!a-z_]/}
            check "$1-$2${part:+-$part}" 90 env LOCI_TEST_FILTER="$3" compute-sanitizer --tool "$1" \
                --error-exitcode 9 "$bin/test_cuda_$2"
        }
        for topic in pointwise sample dense ranking lookup; do sanitize memcheck "$topic" '*'; done
        sanitize memcheck twin 'test_limited_*'
        sanitize memcheck tiers 'test_streams*'
        for tests in 'test_whatever*' test_threads; do sanitize memcheck steps "$tests"; done
        for tests in 'test_figures*' test_sweeps; do
            for tool in memcheck racecheck; do sanitize "$tool" tiers "$tests"; done
        done
        # All of sampling, of look-ups, of the twin and of clusters take longer than that.
        for topic in pointwise dense ranking; do sanitize racecheck "$topic" '*'; done
        sanitize racecheck lookup test_a_single_row
        for tool in memcheck racecheck; do
            sanitize "$tool" clusters test_overlapped_pairs
            sanitize "$tool" clusters test_bundled_pair
        done
    fi
    ;;
esac

case " $wanted " in *" bench "*)
    read -ra tokens <<<"${BENCH_TOKENS:-131072 524288}"
    queries=()
    for count in ${BENCH_ROWS:-1 16}; do queries+=(--rows "$count"); done
    for size in "${tokens[@]}"; do
        check "bench_attention_$size" 240 "$bin/bench_cuda_attention" "${queries[@]}" \
            --reach 1 8 0.9995 --squeezed 0.1 "$size"
    done
    check bench_torch 60 python3 tests/bench/gpu/dense_torch.py "${queries[@]}" "${tokens[@]}"
    check bench_index 90 "$bin/bench_cuda_index"
    check bench_tiers 120 "$bin/bench_cuda_tiers" --keep 0.9 --keep 0.5 --keep 1 "${tokens[-1]}"
    [ -z "${BENCH_KV:-}" ] ||
        check bench_model 120 "$bin/bench_cuda_attention" --rows 1 --rows 2 --kv "$BENCH_KV"
    [ -z "${BENCH_KERNELS:-}" ] ||
        check bench_triton 90 python3 tests/bench/gpu/squeezed_triton.py "$BENCH_KERNELS"
    bench_seven_billion
    check bench_attention_small 60 "$bin/bench_cuda_attention" --heads 6 2 64 131072
    cat "$out"/bench_*.log
    ;;
esac

printf '%s\n' "${rows[@]}"
[ "$failed" -eq 0 ] || exit 1
[ "$ran" -gt 0 ] || exit 77
