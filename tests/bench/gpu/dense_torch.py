#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Dense attention of one decoding step by PyTorch, beside bench_cuda_attention: one JSON line for each
number of tokens, q_heads / kv_heads / dim in bf16, layers in turn, a written-over cache between steps.
Every fused kernel that takes grouped heads is tried; the fastest is named.

usage: dense_torch.py [--layers N] [--steps N] [--heads Q KV DIM] TOKENS...
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--heads", type=int, nargs=3, default=[28, 4, 128])
    parser.add_argument("tokens", type=int, nargs="+")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("dense_torch.py: skipped: no GPU")
        sys.exit(77)
    q_heads, kv_heads, dim = options.heads
    flush = torch.empty(1 << 28, dtype=torch.int32, device="cuda")
    for tokens in options.tokens:
        q = torch.randn(1, q_heads, 1, dim, dtype=torch.bfloat16, device="cuda")
        kv = [[torch.randn(1, kv_heads, tokens, dim, dtype=torch.bfloat16, device="cuda")
               for _ in range(2)] for _ in range(options.layers)]
        # One row a query head, or the heads of a group as the rows of their KV head.
        rows = q.view(1, kv_heads, q_heads // kv_heads, dim)
        found = {}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION,
                        SDPBackend.EFFICIENT_ATTENTION):
            for name, query, grouped in (("gqa", q, True), ("rows", rows, False)):
                try:
                    with sdpa_kernel(backend):
                        found[f"{backend.name.lower()} {name}"] = median_ms(
                            lambda i: scaled_dot_product_attention(query, *kv[i],
                                                                   enable_gqa=grouped),
                            options.layers, options.steps, flush)
                except RuntimeError:
                    continue
        best = min(found, key=found.get)
        bytes_read = 4 * kv_heads * tokens * dim
        print(json.dumps({"bench": "torch_sdpa", "torch": torch.__version__, "tokens": tokens,
                          "q_heads": q_heads, "kv_heads": kv_heads, "dim": dim, "kernel": best,
                          "ms": round(found[best], 4), "bytes": bytes_read,
                          "gbps": round(bytes_read / found[best] / 1e6, 1),
                          "all_ms": {k: round(v, 4) for k, v in found.items()}}), flush=True)
        del kv


if __name__ == "__main__":
    main()
