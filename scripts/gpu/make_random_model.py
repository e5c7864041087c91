#!/usr/bin/env python3
"""Write a model folder with random weights in the shapes of a published model: for measuring speed, not for talking.

    make_random_model.py SHAPE FOLDER [--tokenizer models/demo/model]

SHAPE: qwen3-0.6b (bfloat16), qwen3-0.6b-4bit, qwen3-30b-a3b-4bit (affine, groups of 64). Needs numpy only. Weights are spread as
trained ones are (deviation 0.02); quantised ones are random integers with fitting scales. Values are cut from one pool of
random numbers, so that 17 GB take seconds and not minutes.
"""
import argparse, json, pathlib, shutil
import numpy as np

COMMON = dict(vocab_size=151936, head_dim=128, rms_norm_eps=1e-6, rope_theta=1000000.0, max_position_embeddings=40960,
              hidden_act="silu", attention_bias=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2)
SMALL = dict(COMMON, model_type="qwen3", architectures=["Qwen3ForCausalLM"], hidden_size=1024, intermediate_size=3072,
             num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True)
SPARSE = dict(COMMON, model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], hidden_size=2048, intermediate_size=6144,
              moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1,
              mlp_only_layers=[], num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, tie_word_embeddings=False)
QUANTISED = dict(quantization=dict(group_size=64, bits=4))
SHAPES = {"qwen3-0.6b": SMALL, "qwen3-0.6b-4bit": SMALL | QUANTISED, "qwen3-30b-a3b-4bit": SPARSE | QUANTISED}
SHARD = 5 * 10**9


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Pool:
    """Slices of one array of random numbers, at random places."""

    def __init__(self, rng: np.random.Generator, values: np.ndarray):
        self.rng, self.values = rng, values

    def take(self, count: int) -> np.ndarray:
        if count > len(self.values):
            return np.resize(np.roll(self.values, int(self.rng.integers(1 << 20))), count)
        start = int(self.rng.integers(len(self.values) - count + 1)) // 64 * 64
        return self.values[start : start + count]


def tensors(config: dict, seed: int):
    """Yields (name, dtype, shape, array)."""
    rng = np.random.default_rng(seed)
    plain = Pool(rng, bfloat16(rng.standard_normal(1 << 24) * 0.02))
    packed = Pool(rng, rng.integers(0, 1 << 32, 1 << 26, dtype=np.uint32))
    near_one = Pool(rng, bfloat16(1 + rng.standard_normal(1 << 14) * 0.1))
    # Integers 0..15 are spread with deviation 4.6 around 7.5.
    scale = Pool(rng, bfloat16(0.02 / 4.6 * (1 + rng.random(1 << 22) * 0.1)))
    quantised = "quantization" in config

    def matrix(name, *shape):
        if not quantised:
            yield f"{name}.weight", "BF16", shape, plain.take(int(np.prod(shape)))
            return
        *outer, inputs = shape
        rows = int(np.prod(outer))
        scales = scale.take(rows * inputs // 64)
        biases = bfloat16((scales.astype(np.uint32) << 16).view(np.float32) * -7.5)
        yield f"{name}.weight", "U32", (*outer, inputs // 8), packed.take(rows * inputs // 8)
        yield f"{name}.scales", "BF16", (*outer, inputs // 64), scales
        yield f"{name}.biases", "BF16", (*outer, inputs // 64), biases

    def norm(name, width):
        yield f"{name}.weight", "BF16", (width,), near_one.take(width)

    hidden, width = config["hidden_size"], config["head_dim"]
    queries, pairs = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    yield from matrix("model.embed_tokens", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield from norm(f"{at}.input_layernorm", hidden)
        yield from norm(f"{at}.post_attention_layernorm", hidden)
        yield from matrix(f"{at}.self_attn.q_proj", queries, hidden)
        yield from matrix(f"{at}.self_attn.k_proj", pairs, hidden)
        yield from matrix(f"{at}.self_attn.v_proj", pairs, hidden)
        yield from matrix(f"{at}.self_attn.o_proj", hidden, queries)
        yield from norm(f"{at}.self_attn.q_norm", width)
        yield from norm(f"{at}.self_attn.k_norm", width)
        if "num_experts" in config:
            experts, wide = config["num_experts"], config["moe_intermediate_size"]
            yield from matrix(f"{at}.mlp.gate", experts, hidden)
            yield from matrix(f"{at}.mlp.switch_mlp.gate_proj", experts, wide, hidden)
            yield from matrix(f"{at}.mlp.switch_mlp.up_proj", experts, wide, hidden)
            yield from matrix(f"{at}.mlp.switch_mlp.down_proj", experts, hidden, wide)
        else:
            wide = config["intermediate_size"]
            yield from matrix(f"{at}.mlp.gate_proj", wide, hidden)
            yield from matrix(f"{at}.mlp.up_proj", wide, hidden)
            yield from matrix(f"{at}.mlp.down_proj", hidden, wide)
    yield from norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        yield from matrix("lm_head", config["vocab_size"], hidden)


def write_shard(path: pathlib.Path, batch: list) -> None:
    header, offset = {"__metadata__": {"format": "mlx"}}, 0
    for name, dtype, shape, array in batch:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for *_, array in batch:
            file.write(np.ascontiguousarray(array).data)


def fill_tokenizer(path: pathlib.Path, vocab: int) -> None:
    """A word for each id that the tokenizer lacks: such a model draws them all, and a token without text is no reply."""
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    known = {*words.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    words.update({f"\u0120w{number}": number for number in range(vocab) if number not in known})
    path.write_text(json.dumps(tokenizer))


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("shape", choices=SHAPES)
    args.add_argument("folder", type=pathlib.Path)
    args.add_argument("--tokenizer", type=pathlib.Path, help="folder whose tokenizer files are copied")
    args.add_argument("--layers", type=int, help="fewer layers, for a try")
    args.add_argument("--seed", type=int, default=0)
    a = args.parse_args()
    config = dict(SHAPES[a.shape])
    if a.layers:
        config["num_hidden_layers"] = a.layers
    a.folder.mkdir(parents=True, exist_ok=True)
    batch, held, shards, places = [], 0, [], {}

    def flush():
        nonlocal batch, held
        if batch:
            path = a.folder / f"model-{len(shards) + 1:05}.safetensors"
            write_shard(path, batch)
            places.update({name: path.name for name, *_ in batch})
            shards.append(path)
            batch, held = [], 0

    for tensor in tensors(config, a.seed):
        if held + tensor[3].nbytes > SHARD:
            flush()
        batch.append(tensor)
        held += tensor[3].nbytes
    flush()
    total = sum(path.stat().st_size for path in shards)
    if len(shards) == 1:
        shards[0].rename(a.folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (a.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (a.folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if a.tokenizer and (a.tokenizer / name).exists():
            shutil.copy(a.tokenizer / name, a.folder / name)
            if name == "tokenizer.json":
                fill_tokenizer(a.folder / name, config["vocab_size"])
    print(f"{a.folder}: {total / 1e9:.2f} GB in {len(shards)} file(s)")


if __name__ == "__main__":
    main()
