# SPDX-License-Identifier: Apache-2.0
"""The model as it is served, in PyTorch: contexts encoded once, queries answered over them.

Only the retrieval layers' keys and values of a context are kept. Rows of a query that sees n
context tokens multiply their logits in those layers by attention_scale(n).
"""
import numpy as np
import torch
import torch.nn.functional as F

from corpus import DOC, EOS, NONE
from network import (CUDA, EMBEDDING, FINAL_NORM, LAYER_WEIGHTS, dense_attention, layer_name,
                     rms_norm, rotary_tables, rotate)
from packing import attention_scale

ENCODE_BATCH = 512  # passages
SHARED_LOGITS = 1 << 28  # of attention over shared keys at once, where there is no flash kernel


class Context:
    """Keys and values, [key heads, tokens, width] a retrieval layer, and where passages begin."""

    def __init__(self, layers, offsets):
        self.layers, self.offsets = layers, offsets

    def __len__(self):
        return int(self.offsets[-1])

    def head(self, passages):
        """The first passages alone."""
        end = int(self.offsets[passages])
        return Context([(k[:, :end], v[:, :end]) for k, v in self.layers],
                       self.offsets[:passages + 1])


class Answers:
    """Token lists, log p(answer), log p(<none>), and the queries' q of each retrieval layer."""

    def __init__(self, tokens, log_probability, none, seeking):
        self.tokens, self.log_probability, self.none = tokens, log_probability, none
        self.seeking = seeking


def merge(parts):
    """Attention over several sets of keys, from (output, log sum exp) of each."""
    sums = torch.stack([total for _, total in parts])
    whole = torch.logsumexp(sums, 0)
    return sum(out.float() * (total - whole).exp()[..., None] for out, total in parts)


class Engine:
    def __init__(self, c, parameters, device=None, dtype=None):
        self.c = c
        self.device = device or ("cuda" if CUDA else "cpu")
        self.dtype = dtype or (torch.bfloat16 if CUDA else torch.float32)
        self.weights = {name: p.to(self.device, self.dtype) for name, p in parameters.items()}
        self.cos, self.sin = rotary_tables(c, torch.arange(4096, device=self.device))

    def layer_weights(self, layer):
        return [self.weights[layer_name(layer, name)] for name in LAYER_WEIGHTS]

    def project(self, layer, x):
        """q, k, v of a layer: [batch, heads, tokens, width]."""
        c, (batch, tokens, _) = self.c, x.shape
        norm, w_q, w_k, w_v = self.layer_weights(layer)[:4]
        h = rms_norm(x, norm, c.norm_epsilon)
        return [F.linear(h, w).view(batch, tokens, heads, c.head_width).transpose(1, 2)
                for w, heads in ((w_q, c.heads), (w_k, c.key_heads), (w_v, c.key_heads))]

    def finish(self, layer, x, out):
        """The rest of a layer after attention."""
        w_o, norm, w_gate, w_up, w_down = self.layer_weights(layer)[4:]
        batch, tokens, _ = x.shape
        x = x + F.linear(out.to(self.dtype).transpose(1, 2).reshape(batch, tokens, -1), w_o)
        h = rms_norm(x, norm, self.c.norm_epsilon)
        return x + F.linear(F.silu(F.linear(h, w_gate)) * F.linear(h, w_up), w_down)

    def logits(self, x):
        h = rms_norm(x, self.weights[FINAL_NORM], self.c.norm_epsilon)
        return F.linear(h, self.weights[EMBEDDING]).float()

    @torch.no_grad()
    def encode(self, passages, layers=None):
        """Context of passages (token lists without <doc>); of the first `layers` retrieval layers."""
        retrieval = self.c.retrieval_layers[:layers]
        parts = [[] for _ in retrieval]
        lengths = [len(p) + 1 for p in passages]
        for begin in range(0, len(passages), ENCODE_BATCH):
            batch = passages[begin:begin + ENCODE_BATCH]
            longest = max(lengths[begin:begin + ENCODE_BATCH])
            tokens = np.zeros((len(batch), longest), np.int64)
            for row, passage in zip(tokens, batch):
                row[0], row[1:len(passage) + 1] = DOC, passage
            size = torch.tensor(lengths[begin:begin + ENCODE_BATCH], device=self.device)
            there = torch.arange(longest, device=self.device)[None] < size[:, None]
            x = self.weights[EMBEDDING][torch.from_numpy(tokens).to(self.device)]
            causal = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
            for layer in range(max(retrieval) + 1):
                q, k, v = self.project(layer, x)
                if layer in retrieval:
                    parts[retrieval.index(layer)].append(
                        [t.transpose(1, 2)[there].transpose(0, 1) for t in (k, v)])
                else:
                    q, k = (rotate(t, self.cos[:longest], self.sin[:longest]) for t in (q, k))
                x = self.finish(layer, x, self.causal(q, k, v, causal))
        layers = [tuple(torch.cat(t, 1).contiguous() for t in zip(*part)) for part in parts]
        return Context(layers, np.concatenate([[0], np.cumsum(lengths)]))

    def causal(self, q, k, v, causal):
        if not CUDA:
            return dense_attention(q, k, v, causal)
        groups = self.c.heads // self.c.key_heads
        return F.scaled_dot_product_attention(q, k.repeat_interleave(groups, 1),
                                              v.repeat_interleave(groups, 1), is_causal=True)

    # --- attention of queries ------------------------------------------------------------------

    def attend(self, q, k, v, seen):
        """Over keys [batch, key heads, n, width]; `seen`: [batch, rows or 1, n]."""
        batch, heads, rows, width = q.shape
        grouped = q.reshape(batch, k.shape[1], -1, width)
        z = (grouped @ k.transpose(-1, -2)).float().view(batch, heads, rows, -1) * width ** -0.5
        z = z.masked_fill(~seen[:, None], -1e30)
        total = torch.logsumexp(z, -1)
        share = (z - total[..., None]).exp().to(self.dtype)
        out = share.view(batch, k.shape[1], -1, share.shape[-1]) @ v
        return out.view(batch, heads, rows, width), total

    def attend_shared(self, q, k, v):
        """Over keys [key heads, n, width] that every row of every query sees."""
        batch, heads, rows, width = q.shape
        groups = heads // k.shape[0]
        flat = q.reshape(batch, k.shape[0], groups * rows, width).transpose(0, 1)
        flat = flat.reshape(k.shape[0], -1, width)
        if CUDA and self.dtype == torch.bfloat16:
            out, total = torch.ops.aten._scaled_dot_product_flash_attention(
                flat[None], k[None], v[None], 0.0, False, False, scale=width ** -0.5)[:2]
            out, total = out[0], total[0][:, :flat.shape[1]]
        else:
            outs, totals, chunk = [], [], max(1, SHARED_LOGITS // (k.shape[0] * k.shape[1]))
            for begin in range(0, flat.shape[1], chunk):
                z = (flat[:, begin:begin + chunk] @ k.transpose(-1, -2)).float() * width ** -0.5
                totals.append(torch.logsumexp(z, -1))
                outs.append((z - totals[-1][..., None]).exp().to(self.dtype) @ v)
            out, total = torch.cat(outs, 1), torch.cat(totals, 1)

        def back(t, *last):
            t = t.reshape(k.shape[0], batch, groups * rows, *last).transpose(0, 1)
            return t.reshape(batch, heads, rows, *last)

        return back(out, width), back(total)

    @torch.no_grad()
    def forward(self, tokens, start, cache, context, extra, scale):
        """Hidden states of tokens [batch, n] at positions start + 0..n-1, and q of the retrieval
        layers. `extra`: a Context of which query i sees the tokens where extra_seen[i]."""
        c, rows = self.c, tokens.shape[1]
        position = start[:, None] + torch.arange(rows, device=self.device)[None]
        batch = torch.arange(len(tokens), device=self.device)[:, None].expand_as(position)
        cos, sin = self.cos[position][:, None], self.sin[position][:, None]
        column = torch.arange(cache[0][0].shape[2], device=self.device)[None, None]
        own = column <= position[:, :, None]
        near = own & (column > position[:, :, None] - c.window)
        x, seeking = self.weights[EMBEDDING][tokens], []
        for layer in range(c.layers):
            q, k, v = self.project(layer, x)
            retrieval = layer in c.retrieval_layers
            if retrieval:
                seeking.append(q)
                q = (q * scale[:, None, None, None]).to(self.dtype)
            else:
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            keys, values = cache[layer]
            keys[batch, :, position] = k.transpose(1, 2)
            values[batch, :, position] = v.transpose(1, 2)
            parts = [self.attend(q, keys, values, own if retrieval else near)]
            if retrieval:
                number = c.retrieval_layers.index(layer)
                if context is not None:
                    parts.append(self.attend_shared(q, *context.layers[number]))
                if extra is not None:
                    k, v = (t[None].expand(len(q), *t.shape) for t in extra[0].layers[number])
                    parts.append(self.attend(q, k, v, extra[1][:, None]))
            x = self.finish(layer, x, merge(parts) if len(parts) > 1 else parts[0][0])
        return x, seeking

    def begin(self, prompts, tokens_max):
        """Prompts side by side [prompts, longest], their lengths, and an empty cache for them and
        `tokens_max` more."""
        c, count = self.c, len(prompts)
        length = torch.tensor([len(p) for p in prompts], device=self.device)
        longest = max(map(len, prompts))
        tokens = np.zeros((count, longest), np.int64)
        for row, prompt in zip(tokens, prompts):
            row[:len(prompt)] = prompt
        shape = (count, c.key_heads, longest + tokens_max, c.head_width)
        cache = [[torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in range(2)]
                 for _ in range(c.layers)]
        return torch.from_numpy(tokens).to(self.device), length, cache

    @torch.no_grad()
    def answer(self, prompts, context=None, extra=None, tokens_max=20, banned=(NONE,)):
        """Greedy answers. `extra`: (Context, seen [queries, its tokens])."""
        c, count = self.c, len(prompts)
        tokens, length, cache = self.begin(prompts, tokens_max)
        visible = torch.full((count,), len(context) if context is not None else 0)
        if extra is not None:
            visible += extra[1].sum(1).cpu()
        scale = torch.tensor([attention_scale(int(n), c.attention_scale_tokens) for n in visible],
                             device=self.device)
        x, seeking = self.forward(tokens, torch.zeros_like(length), cache, context, extra, scale)
        logits = self.logits(x[torch.arange(count, device=self.device), length - 1])
        none = logits.log_softmax(-1)[:, NONE]
        log_probability = torch.zeros(count, device=self.device)
        done = torch.zeros(count, dtype=torch.bool, device=self.device)
        written = []
        for step in range(tokens_max):
            logits[:, list(banned)] = -1e30
            best = torch.where(done, EOS, logits.argmax(-1))
            gained = logits.log_softmax(-1).gather(1, best[:, None])[:, 0]
            log_probability += torch.where(done, 0.0, gained)
            written.append(best)
            done |= best == EOS
            if step % 4 == 3 and bool(done.all()) or step == tokens_max - 1:
                break
            x, _ = self.forward(best[:, None], length + step, cache, context, extra, scale)
            logits = self.logits(x[:, 0])
        rows = torch.stack(written, 1).tolist()
        rows = [row[:row.index(EOS)] if EOS in row else row for row in rows]
        return Answers(rows, log_probability, none, seeking)
