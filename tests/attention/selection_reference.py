#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The selection rules of attention/README.md in NumPy, and the maker of their golden file.

    test_lookup --write-corpus corpus.bin
    selection_reference.py corpus.bin tests/data/attention/selection.bin

A corpus file is "LOCISEL1"; uint32 head_dim, kv_heads, q_heads, rows, extents; for each extent uint32
tokens and segments and, for each KV head, uint64 blob bytes and header hash, uint64
live[(tokens + 63) / 64] and the blob; float32 q[rows][q_heads][head_dim] and steady[rows][q_heads].
The golden file is the corpus file, uint32 cases, and for each: uint32 mode; float32 top_p, roots,
candidates, threshold[2]; uint32 budget, roots_min, candidates_min, count; count selected tokens of
uint32 extent, kv_head, row, slot.
"""
import math
import struct
import sys

import numpy as np

HIERARCHICAL, SQUEEZED = 2, 1


class Pair:
    """One blob: nodes and codes as arrays, live bits by slot."""

    def __init__(self, blob, live):
        magic, version, self.dim, self.tokens, leaves, roots = struct.unpack_from("<6I", blob)
        assert magic == 0x5250434C and version == 3
        at = struct.unpack_from("<6Q", blob, 32)
        roots_at, blocks_at, leaf_nodes_at, records_at = at[1], at[2], at[3], at[5]
        dim = self.dim
        floats = np.frombuffer(blob, "<f4", 2 * dim + 16 * dim, 144)
        self.mean, self.code_scale = floats[:dim], floats[dim : 2 * dim]
        self.book = floats[2 * dim :].reshape(dim // 4, 4, 16)
        self.live = np.unpackbits(np.frombuffer(live, "u1"), bitorder="little")[: self.tokens] > 0
        self.roots, self.leaves = [], []
        self.sketches = np.zeros((self.tokens, dim // 4), int)
        self.root_of = np.zeros(self.tokens, int)
        self.codes = np.zeros((self.tokens, dim))
        first = 0
        for r in range(roots):
            begin, count, tokens, block = struct.unpack_from("<4I", blob, roots_at + 40 * r)
            node = self.node(blob, roots_at + 40 * roots, r)
            node.update(begin=begin, count=count, live=int(self.live[first : first + tokens].sum()))
            self.roots.append(node)
            block = blocks_at + 8 * block
            for l in range(count):
                slot, n = struct.unpack_from("<2I", blob, block + 8 * l)
                leaf = self.node(blob, leaf_nodes_at, begin + l)
                leaf.update(begin=slot, count=n, live=int(self.live[slot : slot + n].sum()))
                self.leaves.append(leaf)
            stride = dim // 2 + 8
            raw = np.frombuffer(blob, "u1", tokens * stride, records_at + first * stride)
            raw = raw.reshape(tokens, stride)[:, : dim // 2]
            self.codes[first : first + tokens, 0::2] = raw & 15
            self.codes[first : first + tokens, 1::2] = raw >> 4
            groups = (tokens + 31) // 32
            raw = np.frombuffer(blob, "u1", groups * dim * 4, block + 8 * count)
            raw = raw.reshape(groups, dim // 4, 16)
            words = np.concatenate([raw & 15, raw >> 4], axis=2).transpose(0, 2, 1)
            self.sketches[first : first + tokens] = words.reshape(-1, dim // 4)[:tokens]
            self.root_of[first : first + tokens] = r
            first += tokens

    def node(self, blob, at, index):
        start = at + index * (8 + 2 * self.dim)
        centroid_scale, variance_scale = struct.unpack_from("<2f", blob, start)
        centroid = np.frombuffer(blob, "i1", self.dim, start + 8).astype(float)
        variance = np.frombuffer(blob, "u1", self.dim, start + 8 + self.dim).astype(float)
        return {"c": centroid_scale * centroid, "var": variance_scale * variance}


def rounded(x):
    """8-bit rounding, in float32 as stated."""
    top = np.float32(np.abs(x).max())
    if top == 0:
        return np.zeros(len(x))
    return np.rint(x * (np.float32(127) / top)).astype(float) * float(top / np.float32(127))


def node_scores(q, pair, nodes, variance):
    q8, qq8 = rounded(q), rounded(q * q * np.float32(0.5))
    base = q.astype(float) @ pair.mean.astype(float)
    return [base + q8 @ x["c"] + (qq8 @ x["var"] if variance else 0.0) for x in nodes]


def token_scores(q, pair, slots):
    base = q.astype(float) @ pair.mean.astype(float)
    return base + (pair.codes[slots] - 7.5) @ rounded(q * pair.code_scale)


def sketch_scores(q, pair):
    """Of all tokens; the table is rounded to 8 bits in float32 as stated."""
    entry = np.zeros(pair.book.shape[::2], np.float32)
    for c in range(4):
        entry += q.reshape(-1, 4)[:, c, None] * pair.book[:, c]
    low = entry.min(1, keepdims=True)
    widest = np.float32((entry.max(1, keepdims=True) - low).max())
    inverse = np.float32(255) / widest if widest > 0 else np.float32(0)
    table = np.floor((entry - low) * inverse + np.float32(0.5)).astype(float)
    sums = table[np.arange(len(table)), pair.sketches].sum(1)
    roots = np.array(node_scores(q, pair, pair.roots, False))[pair.root_of]
    return roots + low.astype(float).sum() + float(widest / np.float32(255)) * sums


def log_sum(*parts):
    x = np.concatenate([np.ravel(p) for p in parts])
    top = x.max() if len(x) else -math.inf
    return top if top == -math.inf else top + math.log(np.exp(x - top).sum())


def choose(p, target, most):
    mass = count = 0
    taken = np.zeros(len(p), bool)
    for i in np.argsort(-p, kind="stable"):
        if mass >= target or count >= most:
            break
        taken[i] = True
        mass += p[i]
        count += 1
    return taken


def kth(scores, k):
    return np.sort(scores)[-k] if k <= len(scores) else -math.inf


def live_slots(pair, leaf):
    slots = np.arange(leaf["begin"], leaf["begin"] + leaf["count"])
    return slots[pair.live[slots]]


def count_of(rate, spread, least):
    return max(1, least, math.ceil(rate * spread))


def select_row(q, pairs, steady, par):
    """q [g][dim]; pairs of one KV head by extent. Yields (extent, slot)."""
    live = sum(int(x.live.sum()) for x in pairs)
    spread = sum(math.sqrt(x.live.sum()) for x in pairs)
    roots = [(e, i) for e, p in enumerate(pairs) for i, x in enumerate(p.roots) if x["live"]]
    s = np.array([[y + math.log(x["live"]) for p in pairs
                   for x, y in zip(p.roots, node_scores(v, p, p.roots, True)) if x["live"]] for v in q])
    slack = math.log((1 - par["top_p"]) / 10)
    floor = np.array([max(kth(x, count_of(par["roots"], spread, par["roots_min"])), t + slack)
                      for x, t in zip(s, steady)])
    kept = {root for root, k in zip(roots, (s >= floor[:, None]).any(0)) if k}
    by_token = [[sketch_scores(v, pair) for pair in pairs] for v in q]
    leaves = [(e, x) for e, r in sorted(kept)
              for x in pairs[e].leaves[pairs[e].roots[r]["begin"]:][: pairs[e].roots[r]["count"]]
              if x["live"]]
    if not leaves:
        return []
    k = count_of(par["candidates"], math.sqrt(live), par["candidates_min"])
    floor = []
    for of, t in zip(by_token, steady):
        tops = np.array([of[e][live_slots(pairs[e], x)].max() for e, x in leaves])
        reach = math.log(live / (1 - par["top_p"]))
        floor.append(max(kth(tops, k), max(tops.max(), t) - reach))
    tokens = [(e, t) for e, x in leaves for t in live_slots(pairs[e], x)
              if any(of[e][t] >= least for of, least in zip(by_token, floor))]
    s = np.array([[token_scores(v, pairs[e], [t])[0] for e, t in tokens] for v in q])
    p = np.mean([np.exp(x - log_sum(x, [t])) for x, t in zip(s, steady)], axis=0)
    taken = choose(p, p.sum() - (1 - par["top_p"]), par["budget"] or math.inf)
    return [x for x, k in zip(tokens, taken) if k]


def select_squeezed(q, pairs, par):
    """q [vectors][dim] of all rows and heads."""
    def mean_share(level):
        live = np.array([x["live"] for p in pairs for x in getattr(p, level)])
        total = np.zeros(len(live))
        for v in q:
            c = np.array([y for p in pairs for y in node_scores(v, p, getattr(p, level), False)])
            z = log_sum(c[live > 0] + np.log(live[live > 0]))
            total += np.where(live > 0, np.exp(c - z), 0.0) / len(q)
        parts = np.split(total, np.cumsum([len(getattr(p, level)) for p in pairs])[:-1])
        return parts

    roots, leaves = mean_share("roots"), mean_share("leaves")
    out = []
    for e, p in enumerate(pairs):
        for r, root in enumerate(p.roots):
            if not roots[e][r] > par["threshold"][0]:
                continue
            for l in range(root["begin"], root["begin"] + root["count"]):
                leaf = p.leaves[l]
                if leaves[e][l] > par["threshold"][1]:
                    out += [(e, t) for t in range(leaf["begin"], leaf["begin"] + leaf["count"])
                            if p.live[t]]
    return out


def read_corpus(data):
    assert data[:8] == b"LOCISEL1"
    dim, kv_heads, q_heads, rows, extents = struct.unpack_from("<5I", data, 8)
    at, pairs = 28, []
    for _ in range(extents):
        tokens, _segments = struct.unpack_from("<2I", data, at)
        at += 8
        row = []
        for _ in range(kv_heads):
            size, _hash = struct.unpack_from("<2Q", data, at)
            at += 16
            words = (tokens + 63) // 64 * 8
            row.append(Pair(data[at + words : at + words + size], data[at : at + words]))
            at += words + size
        pairs.append(row)
    q = np.frombuffer(data, "<f4", rows * q_heads * dim, at).reshape(rows, q_heads, dim)
    at += q.nbytes
    steady = np.frombuffer(data, "<f4", rows * q_heads, at).reshape(rows, q_heads)
    assert at + steady.nbytes == len(data)
    return pairs, q * np.float32(1 / np.float32(math.sqrt(dim))), steady


def cases():
    f = lambda x: float(np.float32(x))
    base = {"mode": HIERARCHICAL, "roots": f(0.1), "candidates": f(1.5), "threshold": (0.0, 0.0),
            "roots_min": 2, "candidates_min": 20}
    for top_p in (0.5, 0.9, 0.99):
        for budget in (0, 20, 100):
            yield dict(base, top_p=f(top_p), budget=budget)
    yield dict(base, top_p=f(0.9), budget=0, roots_min=1, candidates_min=100)
    for threshold in ((1e-5, 3e-5), (1e-4, 1e-3), (1e-3, 1e-3)):
        yield dict(base, mode=SQUEEZED, top_p=1.0, budget=0, threshold=tuple(map(f, threshold)))


def main():
    data = open(sys.argv[1], "rb").read()
    pairs, q, steady = read_corpus(data)
    kv_heads, g = len(pairs[0]), q.shape[1] // len(pairs[0])
    out = [data, struct.pack("<I", len(list(cases())))]
    for par in cases():
        found = []
        for h in range(kv_heads):
            mine = [row[h] for row in pairs]
            part = slice(h * g, h * g + g)
            if par["mode"] == SQUEEZED:
                kept = select_squeezed(q[:, part].reshape(-1, q.shape[2]), mine, par)
                found += [(e, h, r, t) for r in range(len(q)) for e, t in kept]
                continue
            for r in range(len(q)):
                kept = select_row(q[r, part], mine, [float(x) for x in steady[r, part]], par)
                found += [(e, h, r, t) for e, t in kept]
        found.sort()
        out.append(struct.pack("<I5f4I", par["mode"], par["top_p"], par["roots"],
                               par["candidates"], *par["threshold"], par["budget"],
                               par["roots_min"], par["candidates_min"], len(found)))
        out += [struct.pack("<4I", *x) for x in found]
        print(par["mode"], round(par["top_p"], 2), par["budget"], len(found))
    open(sys.argv[2], "wb").write(b"".join(out))


if __name__ == "__main__":
    main()
