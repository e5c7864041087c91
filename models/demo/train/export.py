"""Checkpoint → model directory in MLX's layout: config.json, model.safetensors, generation_config.json.

    python export.py RUN/model.pt --preset cpu
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np
import torch
from safetensors.numpy import save_file

import data
from model import GROUP, PRESETS, affine

BITS, ROUTER_BITS = 4, 8


def pack(weight, bits):
    """weight [..., n] → codes packed into uint32 words [..., n·bits/32] (first code in the lowest bits), scales, biases [..., n/GROUP]"""
    codes, scale, bias = affine(weight, bits)
    codes = codes.reshape(*weight.shape[:-1], -1, 32 // bits).numpy().astype(np.uint32)
    words = (codes << (np.arange(32 // bits, dtype=np.uint32) * bits)).sum(-1, dtype=np.uint32)
    flat = lambda x: x.squeeze(-1).contiguous().numpy()
    return {"weight": words, "scales": flat(scale), "biases": flat(bias)}


def tensors(state):
    """The checkpoint's tensors under the names that mlx-lm gives to qwen3_moe."""
    out = {}
    for name, value in state.items():
        value = value.detach().float().cpu()
        name = "model." + name.replace("mlp.experts.", "mlp.switch_mlp.")
        if value.dim() == 1:
            out[name + ".weight"] = value.numpy()
        else:
            for part, array in pack(value, ROUTER_BITS if name.endswith("mlp.gate") else BITS).items():
                out[f"{name}.{part}"] = array
    return out


def config(cfg, tokenizer_config, vocab):
    quantization = {"group_size": GROUP, "bits": BITS, "mode": "affine"}
    for n in range(cfg.num_hidden_layers):
        quantization[f"model.layers.{n}.mlp.gate"] = {"group_size": GROUP, "bits": ROUTER_BITS}
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": None, "eos_token_id": vocab["<|im_end|>"], "pad_token_id": vocab["<|endoftext|>"],
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "hidden_act": "silu", "initializer_range": 0.02,
        "intermediate_size": 4 * cfg.hidden_size, "output_router_logits": False, "router_aux_loss_coef": 0.01, "rope_scaling": None,
        "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True, "torch_dtype": "float32", "use_cache": True,
        **dataclasses.asdict(cfg), "quantization": quantization, "quantization_config": quantization,
    }


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("checkpoint", type=pathlib.Path)
    ap.add_argument("--preset", choices=PRESETS, default="cpu")
    ap.add_argument("--out", type=pathlib.Path, default=data.MODEL)
    args = ap.parse_args()
    tokenizer = json.loads((data.MODEL / "tokenizer.json").read_text())
    vocab = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if args.out != data.MODEL:
            (args.out / name).write_bytes((data.MODEL / name).read_bytes())
    save_file(tensors(torch.load(args.checkpoint, map_location="cpu")), str(args.out / "model.safetensors"), metadata={"format": "mlx"})
    write = lambda name, value: (args.out / name).write_text(json.dumps(value, indent=2) + "\n")
    write("config.json", config(PRESETS[args.preset], tokenizer, vocab))
    write("generation_config.json", {"do_sample": True, "eos_token_id": [vocab["<|im_end|>"], vocab["<|endoftext|>"]], "pad_token_id": vocab["<|endoftext|>"],
                                     "temperature": 0.3, "top_k": 20, "top_p": 0.9})
    print(args.out, sum(f.stat().st_size for f in args.out.iterdir()), "bytes")


if __name__ == "__main__":
    main()
