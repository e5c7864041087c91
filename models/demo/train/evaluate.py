"""Measures the exported model with mlx-lm on generated conversations whose tools, names and values were held out.

    python evaluate.py --cases 200          figures
    python evaluate.py --say "hello"        one answer, greedy
"""

import argparse
import collections
import json
import pathlib
import random
import re
import time

import mlx.core as mx
from mlx_lm import load, stream_generate
from mlx_lm.sample_utils import make_sampler
from tokenizers import Tokenizer

import data

CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.S)


def answer(model, tokenizer, messages, tools=None, limit=400, **options):
    prompt = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False, **options)
    out = [r for r in stream_generate(model, tokenizer, prompt, max_tokens=limit, sampler=make_sampler(temp=0.0))]
    return "".join(r.text for r in out), out[-1].finish_reason == "stop"


def calls(text):
    """The calls in a text, or None where one is no valid JSON object with a name and an object of arguments."""
    found = []
    for body in CALL.findall(text):
        try:
            call = json.loads(body)
        except ValueError:
            return None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
            return None
        found.append((call["name"], call["arguments"]))
    return found if text.count("<tool_call>") == len(found) else None


def nll(model, tokenizer, items):
    """Mean loss on the assistant's tokens, in nats."""
    total = count = 0
    for item in items:
        ids, weights = data.encode(tokenizer, data.render(item), 0.0)
        logits = model(mx.array(ids[:-1])[None])[0]
        each = mx.logsumexp(logits, -1) - mx.take_along_axis(logits, mx.array(ids[1:])[:, None], -1)[:, 0]
        own = mx.array(weights[1:])
        total, count = total + (each * own).sum().item(), count + own.sum().item()
    return total / count


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", type=pathlib.Path, default=data.MODEL)
    ap.add_argument("--cases", type=int, default=200, help="conversations")
    ap.add_argument("--seed", type=int, default=20_000_001)
    ap.add_argument("--failures", type=int, default=0, help="how many wrong answers to print")
    ap.add_argument("--say")
    args = ap.parse_args()
    model, tokenizer = load(str(args.model))
    if args.say:
        print(answer(model, tokenizer, [{"role": "user", "content": args.say}])[0])
        return
    rng, begun = random.Random(args.seed), time.time()
    items = [data.conversation(rng, holdout=True) for _ in range(args.cases)]
    loss = nll(model, Tokenizer.from_file(str(args.model / "tokenizer.json")), items)
    hit, of = collections.Counter(), collections.Counter()

    def score(what, good):
        of[what] += 1
        hit[what] += bool(good)
        return good

    for item in items:
        for i, message in enumerate(item["messages"]):
            if message["role"] != "assistant":
                continue
            text, ended = answer(model, tokenizer, item["messages"][:i], item["tools"])
            score("ends by itself", ended)
            wanted = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
            got = calls(text)
            if wanted:
                good = score("call: valid", got)
                score("call: right name", got and [g[0] for g in got] == [x[0] for x in wanted])
                good = score("call: right name and arguments", got == wanted)
                if len(wanted) == 1:
                    score("call, one at a time: right name and arguments", got == wanted)
            else:
                after = item["messages"][i - 1]["role"] == "tool"
                kind = "answer from a tool's result" if after else "answer without a tool, tools offered" if item["tools"] else "answer: " + item["case"]
                if item["tools"] and not after:
                    score("no call where none fits", got == [])
                said = text.split("</think>")[-1].strip()
                good = score(kind + ", exact", said == message["content"].strip())
            if not good and args.failures > 0:
                args.failures -= 1
                print("Q:", json.dumps(item["messages"][i - 1]["content"][-300:], ensure_ascii=False), "\nWANTED:", wanted or message["content"], "\nGOT:", text, "\n")
    print(f"loss {loss:.4f} nats per token of the assistant, {args.cases} conversations, seed {args.seed}, {time.time() - begun:.0f} s")
    for what in sorted(of):
        print(f"{what}: {hit[what]}/{of[what]} = {100 * hit[what] / of[what]:.1f} %")


if __name__ == "__main__":
    main()
