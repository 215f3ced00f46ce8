#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes a Llama of random bf16 weights as a Hugging Face folder, and as GGUF for llama.cpp.

  random_model.py SHAPE FOLDER [--gguf FILE] [--layers N] [--words]     SHAPE: 30m, 500m, 1b, 7b, 8b

7b is a Qwen2.5-7B, with biases (zeros). For speed and memory, not for answers: norms are ones,
matrices are drawn from one block of normal numbers, so a folder of 16 GB is written as fast as the
disk takes it. The tokenizer has a token for each byte and with --words one for each word of the
prompts and of what bench_questions writes; the rest of its vocabulary is words that no text
becomes, so that every id has a text. Needs numpy; --gguf also the gguf package.
"""
import argparse
import json
import os
import struct

import numpy as np

# hidden, layers, q heads, KV heads, intermediate, vocabulary; width of heads
SHAPES = {
    "30m": (512, 8, 8, 4, 1408, 8192, 64),
    "500m": (1024, 24, 16, 2, 4608, 32768, 64),
    "1b": (2048, 16, 16, 4, 5632, 32768, 128),
    "7b": (3584, 28, 28, 4, 18944, 152064, 128),
    "8b": (4096, 32, 32, 8, 14336, 128256, 128),
}
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ri so tu va".split()  # as in bench_questions.c
PROMPT = """Answer the question from the documents alone as briefly you can If do not hold answer
    reply Not in"""
POSITIONS = 262144
BLOCK = 1 << 22
BOS, EOS = 0, 1


def config_of(name, layers=None):
    hidden, all_layers, q_heads, kv_heads, intermediate, vocab, head_dim = SHAPES[name]
    layers = layers or all_layers
    family = "Qwen2" if name == "7b" else "Llama"
    return {
        "architectures": [family + "ForCausalLM"], "model_type": family.lower(),
        "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": q_heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "hidden_act": "silu", "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": "bfloat16",
    }


def byte_letters():
    """The letter that byte-level BPE writes for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(b) if b in plain else chr(256 + others.index(b)) for b in range(256)]


def merges_of(words):
    """Pairs that make a token of each word with a space before it, letter by letter."""
    merges = {}
    for word in words:
        for end in range(1, len(word) + 1):
            merges["\u0120" + word[:end - 1] + " " + word[end - 1]] = None
    return list(merges)


def tokenizer_of(vocab, words):
    special = ["<bos>", "<eos>"]
    merges = merges_of(words)
    tokens = special + byte_letters() + [pair.replace(" ", "") for pair in merges]
    tokens += [f"word{i}" for i in range(vocab - len(tokens))]
    added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, text in enumerate(special)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {text: i for i, text in enumerate(tokens)}, "merges": merges}}


def shapes_of(config):
    """(name, name in GGUF, shape) of every tensor."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", "token_embd.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer, block = f"model.layers.{i}.", f"blk.{i}."
        yield layer + "input_layernorm.weight", block + "attn_norm.weight", (hidden,)
        yield layer + "self_attn.q_proj.weight", block + "attn_q.weight", (q, hidden)
        yield layer + "self_attn.k_proj.weight", block + "attn_k.weight", (kv, hidden)
        yield layer + "self_attn.v_proj.weight", block + "attn_v.weight", (kv, hidden)
        if config["model_type"] == "qwen2":
            yield layer + "self_attn.q_proj.bias", block + "attn_q.bias", (q,)
            yield layer + "self_attn.k_proj.bias", block + "attn_k.bias", (kv,)
            yield layer + "self_attn.v_proj.bias", block + "attn_v.bias", (kv,)
        yield layer + "self_attn.o_proj.weight", block + "attn_output.weight", (hidden, q)
        yield layer + "post_attention_layernorm.weight", block + "ffn_norm.weight", (hidden,)
        yield layer + "mlp.gate_proj.weight", block + "ffn_gate.weight", (intermediate, hidden)
        yield layer + "mlp.up_proj.weight", block + "ffn_up.weight", (intermediate, hidden)
        yield layer + "mlp.down_proj.weight", block + "ffn_down.weight", (hidden, intermediate)
    yield "model.norm.weight", "output_norm.weight", (hidden,)
    yield "lm_head.weight", "output.weight", (config["vocab_size"], hidden)


def to_bf16(values):
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Weights:
    """bf16 values of each tensor, the same whenever they are asked for."""

    def __init__(self):
        self.normal = np.random.default_rng(1).standard_normal(BLOCK, dtype=np.float32)
        self.scaled = {}

    def pieces(self, number, name, shape):
        """The tensor's values, in arrays of at most BLOCK values."""
        count = int(np.prod(shape))
        if len(shape) == 1:
            yield to_bf16(np.full(count, 0.0 if name.endswith("bias") else 1.0))
            return
        if shape[1] not in self.scaled:
            self.scaled = {shape[1]: to_bf16(self.normal * shape[1] ** -0.5)}
        block = np.roll(self.scaled[shape[1]], 7919 * number)
        for at in range(0, count, BLOCK):
            yield block[:min(BLOCK, count - at)]

    def whole(self, number, name, shape):
        return np.concatenate(list(self.pieces(number, name, shape))).reshape(shape)


def write_folder(folder, config, weights, words):
    os.makedirs(folder, exist_ok=True)
    for name, content in (("config.json", config),
                          ("tokenizer.json", tokenizer_of(config["vocab_size"], words))):
        with open(os.path.join(folder, name), "w") as file:
            json.dump(content, file, indent=1)
    header, at = {}, 0
    for name, _, shape in shapes_of(config):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    with open(os.path.join(folder, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, (name, _, shape) in enumerate(shapes_of(config)):
            for piece in weights.pieces(number, name, shape):
                file.write(memoryview(piece))
    return at // 2


def rotated_pairs(values, heads):
    """Rows of a query or key projection, for llama.cpp's rotation of neighbours instead of
    halves."""
    return values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def write_gguf(path, config, weights):
    import gguf
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    for number, (_, name, shape) in enumerate(shapes_of(config)):
        values = weights.whole(number, name, shape)
        if len(shape) == 1:  # llama.cpp takes vectors in f32 only
            writer.add_tensor(name, (values.astype(np.uint32) << 16).view(np.float32))
            continue
        for part, heads in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
            if part in name:
                values = rotated_pairs(values, config[heads])
        writer.add_tensor(name, np.ascontiguousarray(values).view(np.uint8),
                          raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(shape, folder, gguf_path=None, layers=None, words=()):
    """Number of parameters."""
    config, weights = config_of(shape, layers), Weights()
    parameters = write_folder(folder, config, weights, words)
    if gguf_path:
        write_gguf(gguf_path, config, weights)
    return parameters


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder")
    parser.add_argument("--gguf")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--words", action="store_true")
    options = parser.parse_args()
    words = [a + b for a in SYLLABLES for b in SYLLABLES] + PROMPT.split() if options.words else ()
    count = write(options.shape, options.folder, options.gguf, options.layers, words)
    print(json.dumps({"model": options.shape, "parameters": count}))


if __name__ == "__main__":
    main()
