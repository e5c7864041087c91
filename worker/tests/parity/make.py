#!/usr/bin/env python3
"""Makes the fixtures of tests/parity.rs: tiny random models, and what the Python reference (mlx-lm) computes with them.

    python3 -m venv venv && venv/bin/pip install mlx==0.32.2 mlx-cpu==0.32.2 mlx-lm==0.31.3     # macOS: without mlx-cpu
    venv/bin/python worker/tests/parity/make.py                 # every fixture; or name some

The models are checked in, because a seed gives other numbers on another version of MLX. Each folder has a model in
the layout that mlx-lm reads, and `expected.json`: a prompt, the scores after it (float32, one a vocabulary entry) and
the next 64 tokens, each the likeliest.
"""
import json
import pathlib
import shutil
import sys

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.generate import generate_step
from mlx_lm.models import qwen3, qwen3_moe
from mlx_lm.utils import load_model

HERE = pathlib.Path(__file__).parent
DEMO = HERE.parents[2] / "models/demo/model"

DENSE = dict(
    model_type="qwen3", hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, vocab_size=128, rms_norm_eps=1e-6, rope_theta=10000.0,
    max_position_embeddings=512, tie_word_embeddings=True, rope_scaling=None,
)
MOE = dict(
    DENSE, model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
)
# A hidden size of 128 leaves room for groups of 128.
WIDE = dict(hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_hidden_layers=1)

SHORT, LONG = 7, 150  # LONG: many experts at once, and several chunks of prefill

FIXTURES = {
    # name: (configuration, options)
    "dense-f32-tied": (DENSE, dict(prompt=SHORT)),
    "dense-f32-untied-shards": (dict(DENSE, tie_word_embeddings=False), dict(prompt=LONG, shards=3)),
    "dense-f32-linear-rope": (
        dict(DENSE, num_hidden_layers=1, rope_scaling=dict(rope_type="linear", factor=2.0)), dict(prompt=LONG)),
    "dense-8bit-tied": (DENSE, dict(prompt=SHORT, bits=8, group=32)),
    "dense-4bit-untied": (dict(DENSE, **WIDE, tie_word_embeddings=False), dict(prompt=LONG, bits=4, group=128)),
    "dense-3bit-tied": (dict(DENSE, **WIDE), dict(prompt=SHORT, bits=3, group=64)),
    "moe-f32-tied": (MOE, dict(prompt=LONG)),
    "moe-f32-untied-original": (
        dict(MOE, tie_word_embeddings=False, norm_topk_prob=False), dict(prompt=SHORT, shards=2, original=True)),
    "moe-f32-some-dense": (
        dict(MOE, num_hidden_layers=3, mlp_only_layers=[1], num_experts_per_tok=1), dict(prompt=SHORT)),
    "moe-8bit-untied": (dict(MOE, tie_word_embeddings=False), dict(prompt=SHORT, bits=8, group=32)),
    "moe-4bit-tied": (dict(MOE, **WIDE), dict(prompt=LONG, bits=4, group=64)),
    "moe-mixed-shards": (dict(MOE, **WIDE), dict(
        prompt=LONG, bits=4, group=64, shards=2,
        overrides={"model.layers.0.mlp.gate": (64, 8), "model.layers.0.self_attn.v_proj": (32, 6),
                   "model.layers.0.self_attn.q_proj": (128, 2), "model.embed_tokens": (64, 5)})),
}


def make(name: str, config: dict, options: dict) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    mx.random.seed(sum(name.encode()))
    module = qwen3_moe if config["model_type"] == "qwen3_moe" else qwen3
    model = module.Model(module.ModelArgs.from_dict(config))
    # Larger than a trained model's, so that the likeliest token is far ahead of the next.
    def weight(path, array):
        if path.endswith("norm.weight"):
            return 1.0 + 0.2 * mx.random.normal(array.shape)
        return mx.random.normal(array.shape) * (2.0 / array.shape[-1] ** 0.5)
    model.update(tree_map_with_path(weight, model.parameters()))
    config = dict(config)
    if "bits" in options:
        overrides = options.get("overrides", {})
        def choose(path, layer):
            if not hasattr(layer, "to_quantized"):
                return False
            if path in overrides:
                group, bits = overrides[path]
                return dict(group_size=group, bits=bits)
            return True
        nn.quantize(model, options["group"], options["bits"], class_predicate=choose)
        config["quantization"] = dict(group_size=options["group"], bits=options["bits"], **{
            path: dict(group_size=group, bits=bits) for path, (group, bits) in overrides.items()})
    tensors = dict(tree_flatten(model.parameters()))
    if options.get("original"):
        tensors = one_by_one(tensors)
    save(folder, tensors, options.get("shards", 1))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    prompt = mx.random.randint(0, config["vocab_size"], (options["prompt"],)).tolist()
    (folder / "expected.json").write_text(json.dumps(expected(folder, prompt)) + "\n")


def one_by_one(tensors: dict) -> dict:
    """Experts as the original files have them: a tensor each."""
    result = {}
    for name, tensor in tensors.items():
        if ".switch_mlp." not in name:
            result[name] = tensor
            continue
        before, after = name.split(".switch_mlp.")
        for expert in range(tensor.shape[0]):
            result[f"{before}.experts.{expert}.{after}"] = tensor[expert]
    return result


def save(folder: pathlib.Path, tensors: dict, shards: int) -> None:
    names = sorted(tensors)
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
        return
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in part}, metadata={"format": "mlx"})
        index |= {name: file for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)) + "\n")


def expected(folder: pathlib.Path, prompt: list[int]) -> dict:
    model, _ = load_model(folder)
    logits = model(mx.array([prompt]))[0, -1].astype(mx.float32)
    steps = generate_step(mx.array(prompt), model, max_tokens=64)
    return dict(prompt=prompt, logits=[float(f"{x:.6g}") for x in logits.tolist()],
                greedy=[int(token) for token, _ in steps])


def demo() -> None:
    """The demo model: a rendered chat with a tool."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tools = [dict(type="function", function=dict(
        name="set_lamp", description="Switch a lamp.", parameters=dict(
            type="object", properties=dict(room=dict(type="string"), on=dict(type="boolean")),
            required=["room", "on"])))]
    chat = [dict(role="user", content="Please switch on the lamp in the kitchen.")]
    prompt = tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True, return_dict=False)
    (HERE / "demo.json").write_text(json.dumps(expected(DEMO, list(prompt))) + "\n")


if __name__ == "__main__":
    wanted = sys.argv[1:] or [*FIXTURES, "demo"]
    for name in wanted:
        print(name, flush=True)
        demo() if name == "demo" else make(name, *FIXTURES[name])
