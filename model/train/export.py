#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A training checkpoint -> a Hugging Face folder (SmolLM3ForCausalLM, bf16, shards of <= 16 MiB).

  export.py --checkpoint FILE --out FOLDER [--tokenizer FILE] [--weights average|last]

Of several checkpoints (or folders) of one shape it writes the mean of the weights. Of runs that went
on from the same weights that is better than each of them (Wortsman et al. 2022).
"""
import argparse
import json
import os
import shutil
import tomllib

import torch
from safetensors.torch import load_file, save_file

from network import ModelConfig, parameter_shapes

HERE = os.path.dirname(os.path.abspath(__file__))
SHARD_BYTES = int(14.5 * 2**20)


def hugging_face_config(c):
    """config.json; "loci" holds what stock code does not know."""
    retrieval = set(c.retrieval_layers)
    config = {
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3",
        "vocab_size": c.vocabulary, "hidden_size": c.width,
        "intermediate_size": c.feed_forward, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.key_heads,
        "head_dim": c.head_width, "hidden_act": "silu", "max_position_embeddings": 32768,
        "initializer_range": 0.02, "rms_norm_eps": c.norm_epsilon, "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "rope_scaling": None, "tie_word_embeddings": True, "use_sliding_window": True,
        "sliding_window": c.window,
        "no_rope_layers": [int(layer not in retrieval) for layer in range(c.layers)],
        "no_rope_layer_interval": 3,
        "layer_types": ["full_attention" if layer in retrieval else "sliding_attention"
                        for layer in range(c.layers)],
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "use_cache": True, "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    if c.attention_scale_tokens:
        config["loci"] = {"attention_scale_tokens": c.attention_scale_tokens}
    return config


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def write_folder(parameters, c, folder, tokenizer=None, dtype=torch.bfloat16):
    """Writes weights, index, config.json and (if given) the tokenizer."""
    os.makedirs(folder, exist_ok=True)
    shards, size = [{}], 0
    for name in parameter_shapes(c):
        tensor = parameters[name].detach().to("cpu", dtype).contiguous()
        count = tensor.numel() * tensor.element_size()
        if size + count > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += count
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, os.path.join(folder, file_name), metadata={"format": "pt"})
        weight_map.update({name: file_name for name in shard})
        total += sum(t.numel() * t.element_size() for t in shard.values())
    write_json(folder, "model.safetensors.index.json",
               {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder, "config.json", hugging_face_config(c))
    if tokenizer:
        shutil.copyfile(tokenizer, os.path.join(folder, "tokenizer.json"))


def read_folder(folder, c):
    """Parameters (float32) of a Hugging Face folder."""
    stored = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            stored.update(load_file(os.path.join(folder, name)))
    parameters = {}
    for name, shape in parameter_shapes(c).items():
        if name not in stored or tuple(stored[name].shape) != shape:
            raise ValueError(f"{folder}: no {name} of shape {shape}")
        parameters[name] = stored[name].float()
    return parameters


def read_checkpoint(path, weights="average"):
    """(parameters, ModelConfig) of a checkpoint: averaged weights where it has them."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    average = state["optimizer"]["average"]
    chosen = average if weights == "average" and average is not None else state["parameters"]
    return chosen, ModelConfig(state["config"]["model"])


def read_any(path, config_path=None, weights="average"):
    """Parameters and configuration of a checkpoint file or a Hugging Face folder."""
    if not os.path.isdir(path):
        return read_checkpoint(path, weights)
    with open(config_path or os.path.join(HERE, "default.toml"), "rb") as file:
        c = ModelConfig(tomllib.load(file)["model"])
    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        stored = json.load(file)
    c.attention_scale_tokens = stored.get("loci", {}).get("attention_scale_tokens", 0)
    return read_folder(path, c), c


def read_mean(paths, weights="average"):
    """(mean of the parameters, configuration of the first) of checkpoints and folders."""
    first, c = read_any(paths[0], weights=weights)
    for path in paths[1:]:
        other, _ = read_any(path, weights=weights)
        first = {name: p + other[name] for name, p in first.items()}
    return {name: p / len(paths) for name, p in first.items()}, c


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, nargs="+")
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokenizer", help="tokenizer.json to put beside the weights")
    parser.add_argument("--weights", choices=["average", "last"], default="average")
    options = parser.parse_args()
    parameters, c = read_mean(options.checkpoint, options.weights)
    write_folder(parameters, c, options.out, options.tokenizer)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
