# SPDX-License-Identifier: Apache-2.0
"""The model: a SmolLM3-shaped decoder over packed segments, and its losses.

Sliding-window layers have rotary positions; the retrieval layers have none and see, besides a row's
own segment, the contexts that its query group may see. Parameters are a dictionary under their
Hugging Face names. On a GPU one layer is compiled (twice: window and retrieval) and attention goes
through flex_attention with block masks; on a CPU it is plain and dense, for tests.
"""
import math

import torch
import torch.nn.functional as F

from packing import ANSWER_TYPES, ANSWERING_ROWS, passages_max

CUDA = torch.cuda.is_available()
if CUDA:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

SPREAD_QUESTIONS = 16  # of a slot whose rows' spread is looked at
BLOCK = 128  # rows and columns of a mask block
LAYER_WEIGHTS = ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                 "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj",
                 "mlp.down_proj"]
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"


class ModelConfig:
    """[model] of the TOML, as attributes."""

    def __init__(self, settings):
        self.__dict__.update(settings)
        self.retrieval_layers = tuple(self.retrieval_layers)


def layer_name(layer, weight):
    return f"model.layers.{layer}.{weight}.weight"


def parameter_shapes(c):
    """Name -> shape of all parameters, in the order in which they are stored."""
    queries, keys = c.heads * c.head_width, c.key_heads * c.head_width
    of_layer = [(c.width,), (queries, c.width), (keys, c.width), (keys, c.width),
                (c.width, queries), (c.width,), (c.feed_forward, c.width),
                (c.feed_forward, c.width), (c.width, c.feed_forward)]
    shapes = {EMBEDDING: (c.vocabulary, c.width), FINAL_NORM: (c.width,)}
    for layer in range(c.layers):
        shapes.update({layer_name(layer, w): s for w, s in zip(LAYER_WEIGHTS, of_layer)})
    return shapes


def initial_parameters(c, seed):
    """Normal with deviation 0.02; matrices that write to the residual stream smaller with depth."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in parameter_shapes(c).items():
        if len(shape) == 1:
            parameters[name] = torch.ones(shape)
            continue
        scale = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale /= math.sqrt(2 * c.layers)
        parameters[name] = torch.randn(shape, generator=generator) * scale
    return parameters


# --- layers ----------------------------------------------------------------------------------

def rms_norm(x, weight, epsilon):
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + epsilon)
    return y.to(x.dtype) * weight.to(x.dtype)


def rotary_tables(c, positions):
    width = torch.arange(0, c.head_width, 2, device=positions.device).float() / c.head_width
    angles = positions.float()[..., None] / c.rope_theta ** width
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    y = x.float()
    half = y.shape[-1] // 2
    return (y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin).to(x.dtype)


def dense_attention(q, k, v, mask):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    return (logits.masked_fill(~mask, -1e30).softmax(-1) @ v.float()).to(q.dtype)


def make_layer(c, with_dropout):
    """One decoder layer as a function of tensors alone, to be compiled once for all layers."""
    heads, key_heads, head_width = c.heads, c.key_heads, c.head_width
    queries = heads * head_width
    keys = key_heads * head_width

    def dropped(y, dropout):
        if not with_dropout:
            return y
        kept = torch.rand_like(y, dtype=torch.float32) >= dropout
        return y * (kept.to(y.dtype) * (1 / (1 - dropout)).to(y.dtype))

    def layer(x, cos, sin, mask, scale, retrieval, dropout, norm_1, w_q, w_k, w_v, w_o, norm_2,
              w_gate, w_up, w_down):
        batch, tokens, _ = x.shape
        dtype = x.dtype
        h = rms_norm(x, norm_1, c.norm_epsilon)
        projected = F.linear(h, torch.cat([w_q, w_k, w_v], 0).to(dtype))
        q = projected[..., :queries].view(batch, tokens, heads, head_width).transpose(1, 2)
        k = projected[..., queries:queries + keys].view(batch, tokens, key_heads, head_width)
        v = projected[..., queries + keys:].view(batch, tokens, key_heads, head_width)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if retrieval:
            seeking = q * scale[:, None].to(dtype)
        else:
            seeking, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if CUDA:
            out = flex_attention(seeking, k, v, block_mask=mask, scale=head_width ** -0.5,
                                 enable_gqa=True)
        else:
            out = dense_attention(seeking, k, v, mask)
        out = F.linear(out.transpose(1, 2).reshape(batch, tokens, queries), w_o.to(dtype))
        x = x + dropped(out, dropout)
        h = rms_norm(x, norm_2, c.norm_epsilon)
        gate, up = F.linear(h, torch.cat([w_gate, w_up], 0).to(dtype)).chunk(2, -1)
        x = x + dropped(F.linear(F.silu(gate) * up, w_down.to(dtype)), dropout)
        # Copies: views of one projection, returned by a compiled layer, come back wrong.
        return (x, q.contiguous(), k.contiguous()) if retrieval else x

    return layer


def spread(logits, kept, weights):
    """Mean entropy, in nats, of rows of logits over the columns kept. logits: [slots, heads,
    questions, rows, columns]; kept: [slots, columns]; weights: [slots, questions, rows]."""
    logits = logits.masked_fill(~kept[:, None, None, None], -1e30)
    total = torch.logsumexp(logits, -1)
    share = (logits - total[..., None]).exp()
    entropy = total - (share * logits).sum(-1)
    weights = weights[:, None].expand_as(entropy)
    return (entropy * weights).sum() / weights.sum().clamp(min=1.0)


def language_loss(x, norm, embedding, targets, weights, epsilon):
    logits = F.linear(rms_norm(x, norm, epsilon), embedding.to(x.dtype)).float()
    loss = F.cross_entropy(logits, targets, reduction="none")
    return (loss * weights).sum() / weights.sum().clamp(min=1.0)


class Masks:
    """Attention masks of packs of a fixed size. On a GPU: two block masks, updated in place, so that
    compiled code sees the same tensors at every step."""

    def __init__(self, tokens, device, window):
        self.tokens, self.window = tokens, window
        self.segment = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.context_group = torch.zeros_like(self.segment)
        self.query_group = torch.zeros_like(self.segment)
        self.local = self.retrieval = None
        segment, context, query = self.segment, self.context_group, self.query_group

        def sees_retrieval(b, h, row, column):
            own = (segment[row] == segment[column]) & (row >= column)
            return own | (query[row] == context[column])

        def sees_local(b, h, row, column):
            own = (segment[row] == segment[column]) & (row >= column)
            return own & (row - column < window)

        self.sees_local, self.sees_retrieval = sees_local, sees_retrieval

    def update(self, batch):
        self.segment.copy_(batch["segment"])
        self.context_group.copy_(batch["context_group"])
        self.query_group.copy_(batch["query_group"])
        if CUDA:
            self.update_blocks()
            return
        index = torch.arange(self.tokens)
        self.local = self.sees_local(0, 0, index[:, None], index[None])
        self.retrieval = self.sees_retrieval(0, 0, index[:, None], index[None])

    def update_blocks(self):
        """Which blocks hold anything to see (partial), and which are seen whole (full)."""
        count = self.tokens // BLOCK
        segment = self.segment.view(count, BLOCK)
        context = self.context_group.view(count, BLOCK)
        query = self.query_group.view(count, BLOCK)
        first, last = segment[:, 0], segment[:, -1]
        context_of, query_of = context.amax(1), query.amax(1)
        all_context = (context == context_of[:, None]).all(1) & (context_of >= 0)
        all_query = (query == query_of[:, None]).all(1) & (query_of >= 0)
        index = torch.arange(count, device=segment.device)
        own = (last[None] >= first[:, None]) & (index[None] <= index[:, None])
        near = own & (index[:, None] - index[None] <= (self.window + BLOCK - 1) // BLOCK)
        cross = query_of[:, None] == context_of[None]
        full = cross & all_query[:, None] & all_context[None]
        partial = (own | cross) & ~full
        none = torch.zeros_like(full)
        self.local = self.update_mask(self.local, self.sees_local, near, none)
        self.retrieval = self.update_mask(self.retrieval, self.sees_retrieval, partial, full)

    @staticmethod
    def update_mask(mask, sees, partial, full):
        def ordered(blocks):
            counts = blocks.sum(-1, dtype=torch.int32)[None, None]
            order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
            return counts.contiguous(), order.int()[None, None].contiguous()

        rows = ordered(partial) + ordered(full)
        columns = ordered(partial.T) + ordered(full.T)
        if mask is None:
            mask = BlockMask.from_kv_blocks(*rows, BLOCK_SIZE=BLOCK, mask_mod=sees)
        fields = [mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks,
                  mask.full_kv_indices, mask.q_num_blocks, mask.q_indices,
                  mask.full_q_num_blocks, mask.full_q_indices]
        for field, value in zip(fields, rows + columns):
            field.copy_(value)
        return mask


# --- the network -----------------------------------------------------------------------------

class Network:
    """Forward pass and losses over packs of a fixed number of tokens."""

    def __init__(self, c, parameters, loss_config, batch_tokens, with_dropout):
        self.c, self.parameters, self.loss_config = c, parameters, loss_config
        self.device = parameters[EMBEDDING].device
        self.masks = Masks(batch_tokens, self.device, c.window)
        self.dropout = torch.zeros((), device=self.device)
        self.dtype = torch.bfloat16 if CUDA else torch.float32
        layer = make_layer(c, with_dropout)
        self.layer, self.language_loss, self.spread = layer, language_loss, spread
        if CUDA:
            self.layer = torch.compile(layer, dynamic=False, fullgraph=True)
            self.language_loss = torch.compile(language_loss, dynamic=False, fullgraph=True)
            self.spread = torch.compile(spread, dynamic=False, fullgraph=True)
        weights = [loss_config["answer_weights"].get(kind, 0.0) for kind in ANSWER_TYPES]
        self.answer_weights = torch.tensor(weights, device=self.device)

    def forward(self, batch):
        """Last hidden states (before the norm), and (q, k) of each retrieval layer, q unscaled."""
        c, p = self.c, self.parameters
        self.masks.update(batch)
        x = F.embedding(batch["tokens"], p[EMBEDDING]).to(self.dtype)[None]
        cos, sin = rotary_tables(c, batch["position"])
        seen = []
        for number in range(c.layers):
            weights = [p[layer_name(number, name)] for name in LAYER_WEIGHTS]
            retrieval = number in c.retrieval_layers
            mask = self.masks.retrieval if retrieval else self.masks.local
            x = self.layer(x, cos, sin, mask, batch["scale"], retrieval, self.dropout, *weights)
            if retrieval:
                x, q, k = x
                seen.append((q[0], k[0]))
        return x[0], seen

    def losses(self, batch):
        """Dictionary of losses (language, answer; mass, ranking and spread of each retrieval layer;
        pointing) and of figures without gradient."""
        c, p = self.c, self.parameters
        x, seen = self.forward(batch)
        targets = torch.roll(batch["tokens"], -1)
        out = {"language": self.language_loss(x, p[FINAL_NORM], p[EMBEDDING], targets,
                                              batch["language_weight"], c.norm_epsilon)}
        rows = batch["answer_rows"]
        h = rms_norm(x.index_select(0, rows), p[FINAL_NORM], c.norm_epsilon)
        logits = F.linear(h, p[EMBEDDING].to(h.dtype)).float()
        loss = F.cross_entropy(logits, targets[rows], reduction="none")
        weights = self.answer_weights[batch["answer_types"]]
        out["answer"] = (loss * weights).sum() / weights.sum().clamp(min=1e-6)
        out["answer_losses"] = loss.detach()
        out["answer_right"] = (logits.detach().argmax(-1) == targets[rows]).float()
        results = [self.retrieval_losses(batch, q, k) for q, k in seen]
        for key in ("mass", "ranking", "spread", "found", "gold_mass"):
            out[key] = torch.stack([r[key] for r in results])
        pointed = torch.stack([r["pointed"] for r in results]).amax(0)
        there = (batch["pointers"][..., 0] >= 0).float()
        out["pointing"] = -((pointed + 1e-6).log() * there).sum() / there.sum().clamp(min=1)
        return out

    def score_logits(self, batch, q, k):
        """Logits of the score rows over their slots, [slots, heads, questions, rows, tokens]. Those
        of answering rows are scaled, as the layer attends; the question's tokens' are not."""
        c, rows = self.c, batch["score_rows"].long()
        slots, count, width = rows.shape
        q = q.index_select(1, rows.reshape(-1)).view(c.heads, slots, count, width, c.head_width)
        factor = batch["scale"][rows].clone()
        factor[:, :, ANSWERING_ROWS:] = 1.0
        q = q.float() * (factor * c.head_width ** -0.5)[None, ..., None]
        q = q.permute(1, 0, 2, 3, 4).reshape(slots, c.key_heads, -1, c.head_width)
        k = k.view(c.key_heads, slots, -1, c.head_width).transpose(0, 1).float()
        return (q @ k.transpose(-1, -2)).view(slots, c.heads, count, width, -1)

    def retrieval_losses(self, batch, q, k):
        """Of one retrieval layer: A, the answering rows' attention on the gold passage (scaled
        logits, as the layer attends), and B, the late-interaction score of the gold passage among
        the slot's passages (unscaled logits); the spread of attention over contexts; and the
        greatest share that a head gives to the token to be copied."""
        c = self.c
        gold, weights = batch["gold"].long(), batch["score_weights"]
        slots, count, width = weights.shape
        slot_tokens = len(batch["tokens"]) // slots
        passages = passages_max(slot_tokens) - 1
        member = batch["passage"].long().view(slots, slot_tokens)
        one_hot = torch.zeros(slots, slot_tokens, passages + 1, device=q.device)
        one_hot = one_hot.scatter_(2, member[..., None], 1.0)[..., :-1]
        there = one_hot.amax(1) > 0
        logits = self.score_logits(batch, q, k)
        z = (logits - logits.detach().amax(-1, keepdim=True)).exp()
        # log of the passages' summed exp, up to a constant a row
        mass = (z.view(slots, -1, slot_tokens) @ one_hot + 1e-30).log()
        mass = mass.view(slots, c.heads, count, width, passages)

        asked = (gold >= 0).float()
        total = asked.sum().clamp(min=1)
        target = gold.clamp(min=0)[..., None]
        answering = weights[:, :, :ANSWERING_ROWS]
        share = mass[:, :, :, :ANSWERING_ROWS].softmax(-1).mean(1)
        gold_share = share.gather(-1, target[:, :, None].expand(-1, -1, ANSWERING_ROWS, -1))[..., 0]
        score = mass[:, :, :, ANSWERING_ROWS:].mean(1)
        score = (score * weights[:, :, ANSWERING_ROWS:, None]).sum(2)
        score = score * self.loss_config["score_temperature"]
        score = score.masked_fill(~there[:, None], -1e9)
        ranking = F.cross_entropy(score.reshape(-1, passages), target.reshape(-1),
                                  reduction="none").view(slots, count)
        found = (score.detach().argmax(-1) == target[..., 0]).float()
        return {"mass": -((gold_share + 1e-6).log() * answering).sum() / answering.sum().clamp(min=1),
                "ranking": (ranking * asked).sum() / total,
                "spread": self.slot_spread(batch, logits[:, :, :SPREAD_QUESTIONS]),
                "pointed": self.pointed(batch, z[:, :, :, :ANSWERING_ROWS]),
                "found": (found * asked).sum() / total,
                "gold_mass": (gold_share.detach()[:, :, 0] * asked).sum() / total}

    def slot_spread(self, batch, logits):
        """Entropy of the rows' attention, as the layer attends, over context tokens but <doc>."""
        slots, _, count, _, tokens = logits.shape
        kept = ((batch["context_group"] >= 0) & (batch["position"] > 0)).view(slots, tokens)
        factor = batch["scale"][batch["score_rows"][:, :count].long()].clone()
        factor[:, :, :ANSWERING_ROWS] = 1.0  # scaled already
        return self.spread(logits * factor[:, None, ..., None], kept,
                           batch["score_weights"][:, :count])

    def pointed(self, batch, z):
        """Of answering rows: the greatest share, over heads, on the token to be copied."""
        pointers = batch["pointers"].long()
        places = pointers.clamp(min=0)[:, None].expand(-1, z.shape[1], -1, -1, -1)
        seen = (batch["context_group"] >= 0).float().view(len(z), -1)
        total = torch.einsum("shqrt,st->shqr", z, seen).clamp(min=1e-30)  # a slot may have none
        share = z.gather(-1, places) / total[..., None]
        return (share * (pointers >= 0)[:, None]).sum(-1).amax(1)
