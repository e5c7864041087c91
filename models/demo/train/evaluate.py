"""Measures the exported model with mlx-lm on generated conversations whose tools, names and values were held out.

    python evaluate.py --cases 400 --generate 60    figures
    python evaluate.py --say "hello"                one answer, greedy

Every conversation is read once: an assistant turn counts as exact if each of its tokens is the most likely one, which is
the same as greedy generation giving that very text. The first `--generate` conversations are also really generated, turn
by turn, and the calls in the text parsed.
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
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler
from tokenizers import Tokenizer

import data

CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.S)


class Speaker:
    """Greedy generation that reads the common beginning of two prompts once."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.cache, self.held = make_prompt_cache(model), []

    def answer(self, messages, tools=None, limit=400, **options):
        """(text, did it end by itself)"""
        prompt = self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False, **options)
        same = 0
        while same < min(len(prompt) - 1, len(self.held)) and prompt[same] == self.held[same]:
            same += 1
        trim_prompt_cache(self.cache, self.cache[0].offset - same)
        out = list(stream_generate(self.model, self.tokenizer, prompt[same:], max_tokens=limit, sampler=make_sampler(temp=0.0), prompt_cache=self.cache))
        self.held = prompt
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


def kind_of(item, i):
    """What the assistant has to do in message i."""
    message = item["messages"][i]
    if message.get("tool_calls"):
        return "one call" if len(message["tool_calls"]) == 1 else "several calls in one turn"
    if item["messages"][i - 1]["role"] == "tool":
        return "answer from a tool's result"
    return "answer in words though tools are offered" if item["tools"] else {"lookup": "look-up in a text"}.get(item["case"], "talk")


class Score:
    def __init__(self, title):
        self.title, self.hit, self.of = title, collections.Counter(), collections.Counter()

    def add(self, what, good):
        self.of[what] += 1
        self.hit[what] += bool(good)
        return good

    def show(self):
        print(f"\n{self.title}\n")
        for what in sorted(self.of):
            print(f"- {what}: {self.hit[what]}/{self.of[what]} = {100 * self.hit[what] / self.of[what]:.1f} %")


def read(model, tokenizer, items):
    """(mean loss on the assistant's tokens in nats, share of those tokens that are the most likely one, exact turns)"""
    score, total, right, count = Score("Exact turns (greedy, held-out tools, names and values):"), 0.0, 0, 0
    for item in items:
        ids, weights = data.encode(tokenizer, data.render(item), 0.0)
        logits = model(mx.array(ids[:-1])[None])[0]
        target = mx.array(ids[1:])
        each = (mx.logsumexp(logits, -1) - mx.take_along_axis(logits, target[:, None], -1)[:, 0]).tolist()
        best = (mx.argmax(logits, -1) == target).tolist()
        spans, position = [], 1
        while position < len(ids):
            if weights[position]:
                span = []
                while position < len(ids) and weights[position]:
                    span.append(position - 1)
                    position += 1
                spans.append(span)
            position += 1
        turns = [i for i, m in enumerate(item["messages"]) if m["role"] == "assistant"]
        assert len(turns) == len(spans)
        for i, span in zip(turns, spans):
            total, right, count = total + sum(each[p] for p in span), right + sum(best[p] for p in span), count + len(span)
            score.add(kind_of(item, i), all(best[p] for p in span))
    return total / count, right / count, score


def generate(speaker, items, failures):
    score = Score("Generated turns:")
    for item in items:
        for i, message in enumerate(item["messages"]):
            if message["role"] != "assistant":
                continue
            text, ended = speaker.answer(item["messages"][:i], item["tools"])
            score.add("turn ends by itself", ended)
            got, wanted = calls(text), [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
            if wanted:
                score.add("call wanted: valid JSON call", got)
                score.add("call wanted: right name", got and [g[0] for g in got] == [x[0] for x in wanted])
                good = score.add("call wanted: right name and right arguments", got == wanted)
            else:
                good = text.split("</think>")[-1].strip() == message["content"].strip()
                if item["tools"]:
                    score.add("words wanted, tools offered: no call made", got == [])
            if not good and failures > 0:
                failures -= 1
                print("Q:", json.dumps(item["messages"][i - 1]["content"][-300:], ensure_ascii=False), "\nWANTED:", wanted or message["content"], "\nGOT:", text, "\n")
    return score


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", type=pathlib.Path, default=data.MODEL)
    ap.add_argument("--cases", type=int, default=400, help="conversations")
    ap.add_argument("--generate", type=int, default=60, help="conversations that are also generated")
    ap.add_argument("--seed", type=int, default=20_000_001)
    ap.add_argument("--failures", type=int, default=0, help="how many wrong answers to print")
    ap.add_argument("--say", nargs="*")
    args = ap.parse_args()
    model, tokenizer = load(str(args.model))
    speaker, begun = Speaker(model, tokenizer), time.time()
    for text in args.say or []:
        print(f"> {text}\n{speaker.answer([{'role': 'user', 'content': text}])[0]}")
    if args.say:
        return
    rng = random.Random(args.seed)
    items = [data.conversation(rng, holdout=True) for _ in range(args.cases)]
    loss, right, exact = read(model, Tokenizer.from_file(str(args.model / "tokenizer.json")), items)
    print(f"{args.cases} conversations, seed {args.seed}: loss {loss:.4f} nats per token of the assistant, {100 * right:.2f} % of the tokens right")
    exact.show()
    generate(speaker, items[:args.generate], args.failures).show()
    print(f"\n{time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
