"""The two models of the benchmark, neither of which ends a reply by itself, so that every server generates the same
number of tokens: a 4-bit mixture of experts (the demonstration model with another end) and a dense float32 one.
"""
import json
import pathlib
import shutil

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO = ROOT / "models/demo/model"

# Weights of about 58 MB: one step reads them all, as a step of a large model does.
DENSE = dict(hidden_size=384, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
             intermediate_size=1152)


def endless(folder: pathlib.Path, end: int) -> None:
    """Makes one token the only end of a reply: one that the model does not generate."""
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"eos_token_id": end}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    end_token = tokenizer["added_tokens_decoder"][str(end)]["content"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": end_token}))


def demo(folder: pathlib.Path) -> pathlib.Path:
    """The demonstration model whose replies go on until they are long enough."""
    shutil.copytree(DEMO, folder, dirs_exist_ok=True)
    endless(folder, json.loads((DEMO / "config.json").read_text())["pad_token_id"])
    return folder


def dense(folder: pathlib.Path) -> pathlib.Path:
    """Random float32 weights in the shape of a small Qwen3, with the demonstration model's tokenizer."""
    import mlx.core as mx

    shutil.copytree(DEMO, folder, dirs_exist_ok=True)
    original = json.loads((DEMO / "config.json").read_text())
    config = {key: original[key] for key in ("rope_theta", "rms_norm_eps", "vocab_size", "max_position_embeddings",
                                             "torch_dtype", "hidden_act", "attention_bias", "tie_word_embeddings")}
    config |= DENSE | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    (folder / "config.json").write_text(json.dumps(config))
    endless(folder, original["pad_token_id"])
    mx.random.seed(4)
    hidden, head, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def random(*shape):
        return mx.random.normal(shape) / shape[-1] ** 0.5

    vocabulary = json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"]
    # Only tokens of ASCII letters: every token becomes text at once, and none of them is an end. The others' rows are
    # zero, so that their logit is 0, which is never the largest of so many.
    written = [int(text.isascii() and text.isalpha()) for text, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    written += [0] * (config["vocab_size"] - len(written))
    tensors = {"model.embed_tokens.weight": random(config["vocab_size"], hidden) * mx.array(written)[:, None],
               "model.norm.weight": mx.ones((hidden,))}
    for layer in range(config["num_hidden_layers"]):
        tensors |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in {
            "input_layernorm": mx.ones((hidden,)), "post_attention_layernorm": mx.ones((hidden,)),
            "self_attn.q_proj": random(queries, hidden), "self_attn.k_proj": random(keys, hidden),
            "self_attn.v_proj": random(keys, hidden), "self_attn.o_proj": random(hidden, queries),
            "self_attn.q_norm": mx.ones((head,)), "self_attn.k_norm": mx.ones((head,)),
            "mlp.gate_proj": random(inner, hidden), "mlp.up_proj": random(inner, hidden),
            "mlp.down_proj": random(hidden, inner)}.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    return folder
