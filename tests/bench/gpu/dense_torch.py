#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Dense attention by PyTorch, beside bench_cuda_attention and bench_cuda_prefill: one JSON line for each
number of tokens, q_heads / kv_heads / dim in bf16, layers in turn, a written-over cache between steps.
Every fused kernel that takes grouped heads is tried; the fastest is named.

usage: dense_torch.py [--layers N] [--steps N] [--rows N]... [--heads Q KV DIM] TOKENS...
       dense_torch.py --prefill SEGMENTS [--steps N] [--heads Q KV DIM] TOKENS...

--rows: query tokens, which see all keys. --prefill: so many segments of TOKENS, causal.
"""
import argparse
import json
import statistics
import sys

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
except ImportError as error:
    print(f"dense_torch.py: skipped: {error}")
    sys.exit(77)


def median_ms(run, layers, steps, flush):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for step in range(steps + 3):
        flush.fill_(1)
        begin.record()
        run(step % layers)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def fastest(calls, layers, steps, flush):
    """Milliseconds of each kernel that runs, calls by name over all backends."""
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION,
                    SDPBackend.EFFICIENT_ATTENTION):
        for name, call in calls.items():
            try:
                with sdpa_kernel(backend):
                    found[f"{backend.name.lower()} {name}"] = median_ms(call, layers, steps, flush)
            except RuntimeError:
                continue
    return found


def report(found, **fields):
    best = min(found, key=found.get)
    print(json.dumps({"bench": "torch_sdpa", "torch": torch.__version__, **fields, "kernel": best,
                      "ms": round(found[best], 4),
                      "all_ms": {k: round(v, 4) for k, v in found.items()}}), flush=True)


def decode(options, tokens, flush):
    q_heads, kv_heads, dim = options.heads
    kv = [[torch.randn(1, kv_heads, tokens, dim, dtype=torch.bfloat16, device="cuda")
           for _ in range(2)] for _ in range(options.layers)]
    for rows in options.rows or [1]:
        decode_rows(options, tokens, rows, kv, flush)


def decode_rows(options, tokens, rows, kv, flush):
    q_heads, kv_heads, dim = options.heads
    group = q_heads // kv_heads
    q = torch.randn(1, q_heads, rows, dim, dtype=torch.bfloat16, device="cuda")
    # One row a query head, or the heads of a group as the rows of their KV head.
    packed = q.view(1, kv_heads, group * rows, dim)
    found = fastest(
        {"gqa": lambda i: scaled_dot_product_attention(q, *kv[i], enable_gqa=True),
         "rows": lambda i: scaled_dot_product_attention(packed, *kv[i])},
        options.layers, options.steps, flush)
    report(found, tokens=tokens, rows=rows, q_heads=q_heads, kv_heads=kv_heads, dim=dim,
           bytes=4 * kv_heads * tokens * dim)


def prefill(options, tokens, flush):
    q_heads, kv_heads, dim = options.heads
    shape = (options.prefill, q_heads, tokens, dim)
    q = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(options.prefill, kv_heads, tokens, dim, dtype=torch.bfloat16, device="cuda")
            for _ in range(2))
    found = fastest({"gqa": lambda i: scaled_dot_product_attention(q, k, v, is_causal=True,
                                                                   enable_gqa=True)},
                    1, options.steps, flush)
    report(found, prefill=options.prefill, tokens=tokens, q_heads=q_heads, kv_heads=kv_heads, dim=dim,
           flop=2 * options.prefill * q_heads * tokens * tokens * dim)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--prefill", type=int, default=0)
    parser.add_argument("--heads", type=int, nargs=3, default=[28, 4, 128])
    parser.add_argument("tokens", type=int, nargs="+")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("dense_torch.py: skipped: no GPU")
        sys.exit(77)
    flush = torch.empty(1 << 28, dtype=torch.int32, device="cuda")
    for tokens in options.tokens:
        (prefill if options.prefill else decode)(options, tokens, flush)


if __name__ == "__main__":
    main()
