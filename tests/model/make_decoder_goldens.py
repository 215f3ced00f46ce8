# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/model/tiny-*/ (random models) and decoder_*.bin (expected logits and keys).

Needs torch, transformers, tokenizers and safetensors; the tests themselves do not. Arguments name
what is to be made anew (tiny-llama built-in ...); without any, everything is.
The reference is transformers' class of each architecture with eager attention, in float32.

A golden file is a run of little-endian records, each u32 kind, then
  kind 1, logits:  u32 count, u32 tokens[count], u32 rows, u32 position[rows],
                   f32 logits[rows][vocab]
  kind 2, segment: u32 count, u32 tokens[count], u32 values, f32 k[values], f32 v[values]
                   (values = retrieval layers * kv_heads * count * head_dim, in that order)
"""
import json
import os
import struct
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
DATA = os.path.join(ROOT, "tests", "data", "model")
BUILT_IN = os.path.join(ROOT, "model", "default")


def tiny_config(hidden, q_heads, kv_heads, head_dim, ff, vocab, window, layers, full, tied):
    return {
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": ff, "num_hidden_layers": layers,
        "num_attention_heads": q_heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "use_sliding_window": True, "sliding_window": window,
        "no_rope_layers": [0 if i in full else 1 for i in range(layers)],
        "no_rope_layer_interval": 3,
        "layer_types": ["full_attention" if i in full else "sliding_attention"
                        for i in range(layers)],
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": True,
    }


def stock_config(architecture, kind, hidden, q_heads, kv_heads, head_dim, ff, vocab, layers, tied,
                 **more):
    return {
        "architectures": [architecture], "model_type": kind, "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": ff, "num_hidden_layers": layers,
        "num_attention_heads": q_heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": tied, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, **more,
    }


# Positions up to 300 are far beyond the 64 that the llama3 rule stretches; head_dim differs from
# hidden_size / num_attention_heads in Mistral and Qwen3; all head counts and vocabularies are odd.
MODELS = {
    "tiny-3heads": (1, torch.float32,
                    tiny_config(48, 3, 1, 16, 44, 271, 13, 4, (1, 3), True)),
    "tiny-untied": (2, torch.bfloat16,
                    tiny_config(64, 4, 2, 32, 48, 281, 24, 3, (2,), False)),
    "tiny-llama": (3, torch.bfloat16, stock_config(
        "LlamaForCausalLM", "llama", 48, 3, 3, 16, 38, 265, 3, False, attention_bias=False,
        mlp_bias=False, rope_scaling={
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64, "rope_type": "llama3"})),
    "tiny-mistral": (4, torch.bfloat16, stock_config(
        "MistralForCausalLM", "mistral", 40, 3, 1, 24, 34, 267, 2, False, sliding_window=19)),
    "tiny-qwen2": (5, torch.bfloat16, stock_config(
        "Qwen2ForCausalLM", "qwen2", 56, 7, 1, 8, 46, 269, 3, True, use_sliding_window=True,
        sliding_window=23, max_window_layers=1)),
    "tiny-qwen3": (6, torch.bfloat16, stock_config(
        "Qwen3ForCausalLM", "qwen3", 40, 5, 5, 32, 36, 273, 2, False, use_sliding_window=False,
        sliding_window=None, max_window_layers=2, rope_scaling=None, attention_bias=False)),
}


def save_tokenizer(path, vocab):
    """A byte-level BPE with a few special tokens and every byte."""
    special = ["<pad>", "<bos>", "<eos>", "<doc>", "<q>", "<ev>", "<a>", "<none>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = special + alphabet
    assert len(tokens) <= vocab
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(os.path.join(path, "tokenizer.json"))


def make_tiny(name, seed, config, dtype):
    path = os.path.join(DATA, name)
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "config.json"), "w") as file:
        json.dump(config, file, indent=1)
        file.write("\n")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path),
                                             dtype=torch.float32)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(".bias"):
                p.copy_(0.5 * torch.randn_like(p))
            elif p.dim() == 1:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (0.5 if "embed" in key else p.shape[1] ** -0.5))
    from safetensors.torch import save_file
    state = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items()
             if not (config["tie_word_embeddings"] and k == "lm_head.weight")}
    save_file(state, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})
    save_tokenizer(path, config["vocab_size"])


def load(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32,
                                                 attn_implementation="eager")
    return model.eval()


def pack(fmt, values):
    return struct.pack(f"<{len(values)}{fmt}", *values)


@torch.no_grad()
def logits_record(model, tokens, rows):
    out = model(torch.tensor([tokens])).logits[0].float()
    head = [1, len(tokens)] + tokens + [len(rows)] + rows
    return pack("I", head) + out[rows].contiguous().numpy().astype("<f4").tobytes()


def retrieval_layers(config):
    """The layers without positions that see everything, else all that see everything, else all."""
    every = range(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    sliding = [types[i] == "sliding_attention" if types else window is not None for i in every]
    full = [i for i in every if not sliding[i]]
    nope = getattr(config, "no_rope_layers", None)
    return [i for i in full if nope and not nope[i]] or full or list(every)


@torch.no_grad()
def segment_record(model, tokens):
    """K and V of the retrieval layers, as they are cached: K is rotated, where it has positions."""
    layers = retrieval_layers(model.config)
    cache = DynamicCache()  # not made for the model: it would forget what leaves the window
    model(torch.tensor([tokens]), use_cache=True, past_key_values=cache)
    keys = [cache.layers[i].keys[0] for i in layers]      # [kv_heads][tokens][head_dim]
    values = [cache.layers[i].values[0] for i in layers]
    assert keys[0].shape[1] == len(tokens)
    k, v = torch.stack(keys).float().contiguous(), torch.stack(values).float().contiguous()
    return (pack("I", [2, len(tokens)] + tokens + [k.numel()]) + k.numpy().astype("<f4").tobytes()
            + v.numpy().astype("<f4").tobytes())


def random_tokens(seed, count, vocab, low=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, vocab, (count,), generator=generator).tolist()


def write(name, records):
    data = b"".join(records)
    with open(os.path.join(DATA, name), "wb") as file:
        file.write(data)
    print(name, len(data), file=sys.stderr)


def make_golden(name, vocab):
    """Fewer rows for the stock architectures: the windows, chunks and records are the same."""
    model = load(os.path.join(DATA, name))
    stock = "SmolLM3" not in type(model).__name__
    records = [logits_record(model, random_tokens(n, n, vocab), list(range(n))[-4 if stock else -12:])
               for n in (1, 7, 70)]
    rows = [18, 255, 256, 299] if stock else [0, 12, 13, 14, 255, 256, 257, 299]
    records += [logits_record(model, random_tokens(9, 300, vocab), rows)]
    lengths = (1, 45) if stock else (1, 5, 33, 90)
    records += [segment_record(model, random_tokens(20 + n, n, vocab)) for n in lengths]
    write(f"decoder_{name}.bin", records)


def make_built_in():
    model = load(BUILT_IN)
    vocab = model.config.vocab_size
    write("decoder_built-in.bin", [
        logits_record(model, [4] + random_tokens(31, 18, vocab, 32) + [6], [0, 19]),
        logits_record(model, [3] + random_tokens(32, 299, vocab, 32), [255, 256, 299]),
        logits_record(model, [3] + random_tokens(33, 699, vocab, 32), [511, 699]),
        segment_record(model, [3]),
        segment_record(model, [3] + random_tokens(34, 24, vocab, 32)),
    ])


def main():
    for name in sys.argv[1:] or [*MODELS, "built-in"]:
        if name == "built-in":
            make_built_in()
            continue
        seed, dtype, config = MODELS[name]
        make_tiny(name, seed, config, dtype)
        make_golden(name, config["vocab_size"])


main()
