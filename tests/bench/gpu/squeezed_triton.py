#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The published Triton kernels of Squeezed Attention (arXiv 2411.09688), beside bench_cuda_attention --squeezed.

usage: squeezed_triton.py KERNELS [--tokens N] [--heads N] [--dim N] [--rows N] [--share S] [--layers N] [--steps N]

KERNELS is squeezedattention/kernels.py of github.com/SqueezeAILab/SqueezedAttention, which has no licence and
stays out of this repository. They know neither grouped heads nor batches: every query head has keys and values of its
own. There is one centroid for 20 keys; which keys a centroid has is drawn, and the threshold is such that `share` of
them are kept. One step of a layer: scores of centroids, mask of the keys (PyTorch), indices of the kept ones, attention
over them cut in blocks, whose number the host must wait for, the merge. Layers in turn, a written-over cache between
steps, the fastest of several block sizes. ms: median of all of it; ms_known: where the host knew the number of blocks.
One JSON line; error is that of one head against plain attention over the same keys.
"""
import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import types

try:
    import torch
    import triton
except ImportError as error:
    print(f"squeezed_triton.py: skipped: {error}")
    sys.exit(77)

KEYS_OF_CENTROID = 20
COMPACT = 1024


def load_kernels(path):
    sys.modules.setdefault("pytest", types.ModuleType("pytest"))  # imported there, not used
    spec = importlib.util.spec_from_file_location("squeezed_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Layer:
    def __init__(self, options):
        heads, tokens, dim = options.heads, options.tokens, options.dim
        centroids = tokens // KEYS_OF_CENTROID
        half = {"dtype": torch.bfloat16, "device": "cuda"}
        self.k = torch.randn(1, heads, tokens, dim, **half)
        self.v = torch.randn(1, heads, tokens, dim, **half)
        self.centroids = torch.randn(1, heads, centroids, dim, **half)
        self.labels = torch.randint(0, centroids, (heads, tokens), device="cuda")
        sizes = torch.zeros(heads, centroids, device="cuda")
        self.sizes = sizes.scatter_add_(1, self.labels, torch.ones_like(self.labels, dtype=torch.float32))


class Step:
    """What one layer's attention needs, for one choice of block sizes."""

    def __init__(self, kernels, options, blocks):
        self.kernels, self.rows = kernels, options.rows
        self.heads, self.tokens, self.dim = options.heads, options.tokens, options.dim
        self.block_n, self.block_kv = blocks
        self.block_m = max(16, triton.next_power_of_2(min(options.rows, 64)))
        self.tiles = triton.cdiv(self.rows, self.block_m)
        self.scale = self.dim ** -0.5
        self.score = torch.empty(1, self.heads, self.tokens // KEYS_OF_CENTROID, self.tiles, device="cuda")
        self.index = torch.empty(1, self.heads, self.tokens, dtype=torch.int32, device="cuda")

    def score_centroids(self, q, layer):
        c, s = layer.centroids, self.score
        self.kernels._fwd_centroid_simple_kernel_qk[(self.tiles, self.heads)](
            q, c, layer.sizes, layer.labels, self.scale, s, s, 0.0, *q.stride(), *c.stride(), *s.stride(), *s.stride(),
            1, self.heads, self.rows, self.tokens, c.shape[2], BLOCK_M=self.block_m, BLOCK_N=self.block_n,
            BLOCK_DMODEL=self.dim)
        return s.mean(dim=3)[0]

    def threshold(self, q, layer, share):
        """What keeps about `share` of the keys."""
        score, order = self.score_centroids(q, layer).flatten().sort(descending=True)
        held = layer.sizes.flatten()[order].cumsum(0)
        return score[int((held < share * self.heads * self.tokens).sum())]

    def compact(self, mask):
        count = torch.zeros(1, self.heads, dtype=torch.int32, device="cuda")
        self.kernels.compact_indices_kernel[(1, self.heads, triton.cdiv(self.tokens, COMPACT))](
            mask, self.index, count, self.tokens, self.heads, BLOCK_SIZE=COMPACT)
        return count[0]

    def attend(self, q, layer, count, start, blocks):
        k, v, index = layer.k, layer.v, self.index
        part = torch.empty(1, blocks, self.rows, self.dim, device="cuda")
        sums, tops = (torch.empty(blocks, self.rows, device="cuda") for _ in range(2))
        self.kernels._fwd_kernel_qk[(self.tiles, blocks)](
            q, k, v, index, self.scale, part, *q.stride(), *k.stride(), *v.stride(), *index.stride(), *part.stride(),
            start, count, sums, tops, 1, self.heads, self.rows, self.tokens, self.tokens, NUMHEADS=self.heads,
            BLOCK_M=self.block_m, BLOCK_N=self.block_n, BLOCK_KV=self.block_kv, BLOCK_DMODEL=self.dim)
        out = torch.zeros(1, self.heads, self.rows, self.dim, device="cuda")
        out_sum = torch.zeros(self.heads, self.rows, device="cuda")
        out_top = torch.full((self.heads, self.rows), float("-inf"), device="cuda")
        self.kernels._reduce_kernel_qk[(self.tiles, self.heads)](
            part, out, *part.stride(), *out.stride(), start, count, sums, tops, out_sum, out_top, self.rows,
            BLOCK_M=self.block_m, BLOCK_N=self.block_n, BLOCK_KV=self.block_kv, BLOCK_DMODEL=self.dim)
        return out

    def run(self, q, layer, threshold, blocks=None):
        """The output, the kept keys of each head, the number of blocks."""
        kept = self.score_centroids(q, layer) > threshold
        count = self.compact(kept.gather(1, layer.labels))
        each = (count + (self.block_kv - 1)) // self.block_kv
        start = (each.cumsum(0) - each).to(torch.int32)
        if blocks is None:
            blocks = int(each.sum())
        return self.attend(q, layer, count, start, blocks), count, blocks


def timed(call, flush):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.fill_(1)
    begin.record()
    result = call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), result


def check(step, q, layer, threshold):
    """Relative error of head 0 against attention over the keys that were kept."""
    out, count, _ = step.run(q, layer, threshold)
    keys = step.index[0, 0, :int(count[0])].long()
    weights = torch.softmax(q[0, 0].float() @ layer.k[0, 0, keys].float().T * step.scale, dim=-1)
    plain = weights @ layer.v[0, 0, keys].float()
    return float((out[0, 0] - plain).norm() / plain.norm())


def measure(kernels, options, blocks, layers, queries, flush):
    step = Step(kernels, options, blocks)
    thresholds = [step.threshold(q, layer, options.share) for q, layer in zip(queries, layers)]
    error = check(step, queries[0], layers[0], thresholds[0])
    times, known, kept = [], [], []
    for i in range(options.steps + 3):
        at = i % len(layers)
        both = (queries[at], layers[at], thresholds[at])
        ms, (_, count, number) = timed(lambda: step.run(*both), flush)
        times.append(ms)
        known.append(timed(lambda: step.run(*both, number), flush)[0])
        kept.append(float(count.float().mean()) / options.tokens)
    return {"ms": round(statistics.median(times[3:]), 4), "ms_known": round(statistics.median(known[3:]), 4),
            "kept": round(statistics.mean(kept), 4), "block_n": blocks[0], "block_kv": blocks[1],
            "error": round(error, 5)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kernels")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("squeezed_triton.py: skipped: no GPU")
        sys.exit(77)
    kernels = load_kernels(options.kernels)
    flush = torch.empty(1 << 28, dtype=torch.int32, device="cuda")
    layers = [Layer(options) for _ in range(options.layers)]
    queries = [torch.randn(1, options.heads, options.rows, options.dim, dtype=torch.bfloat16, device="cuda")
               for _ in layers]
    found = [measure(kernels, options, blocks, layers, queries, flush)
             for blocks in itertools.product((64, 128), (512, 1024))]
    best = min(found, key=lambda x: x["ms_known"])
    print(json.dumps({"bench": "squeezed_triton", "torch": torch.__version__, "triton": triton.__version__,
                      "tokens": options.tokens, "heads": options.heads, "dim": options.dim, "rows": options.rows,
                      "layers": options.layers, "share": options.share, **best,
                      "all_ms_known": [x["ms_known"] for x in found]}), flush=True)


if __name__ == "__main__":
    main()
