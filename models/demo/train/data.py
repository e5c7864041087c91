"""Conversations → token sequences with loss weights, all from a seed.

    python data.py --show 3        prints a few rendered conversations
"""

import argparse
import json
import pathlib
import random

import jinja2
import jinja2.sandbox

import chat
import known
import tools

MODEL = pathlib.Path(__file__).resolve().parent.parent / "model"
START, END, ASSISTANT = "<|im_start|>", "<|im_end|>", "assistant\n"


def template():
    """The model's own chat template, compiled the way Hugging Face's transformers does it."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return env.from_string((MODEL / "chat_template.jinja").read_text())


TEMPLATE = template()


def conversation(rng, holdout=False, length=1.0):
    """One conversation: {"tools", "messages", "case"}. `length` scales how long the look-up texts are."""
    kind = rng.random()
    if kind < 0.66:
        return tools.tool_talk(rng, holdout, chat.chat, known.known)
    if kind < 0.80:
        return chat.lookup(rng, holdout, max(1, int(rng.choice([2, 4, 8, 14, 22]) * length * rng.uniform(0.5, 1.2))))
    return chat.talk(rng, holdout)


def render(item, thinking=True):
    """The text of the conversation. Where the model has to write, the text is what generation makes:
    the last answer stands behind the very prompt that the template builds."""
    head = TEMPLATE.render(messages=item["messages"][:-1], tools=item["tools"], add_generation_prompt=True, enable_thinking=thinking)
    whole = TEMPLATE.render(messages=item["messages"], tools=item["tools"])
    plain = TEMPLATE.render(messages=item["messages"][:-1], tools=item["tools"], add_generation_prompt=True)
    assert whole.startswith(plain), (whole, plain)
    return head + whole[len(plain):]


def encode(tokenizer, text, other_weight):
    """(ids, weights): weight 1 for what the assistant writes, `other_weight` for the rest; weights[i] belongs to ids[i] as a target."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    opener = tokenizer.encode(ASSISTANT, add_special_tokens=False).ids
    think = tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False).ids
    weights, i = [other_weight] * len(ids), 0
    while i < len(ids):
        if ids[i] == start and ids[i + 1:i + 1 + len(opener)] == opener:
            i += 1 + len(opener)
            if ids[i:i + len(think)] == think:
                i += len(think)
            while i < len(ids) and ids[i] != end:
                weights[i] = 1.0
                i += 1
            if i < len(ids):
                weights[i] = 1.0
        i += 1
    return ids, weights


def sample(rng, tokenizer, length, limit, other_weight, holdout=False):
    """An encoded conversation of at most `limit` tokens."""
    while True:
        item = conversation(rng, holdout, length)
        thinking = rng.random() > 0.2 or "reasoning_content" in item["messages"][-1]
        ids, weights = encode(tokenizer, render(item, thinking), other_weight)
        if len(ids) <= limit:
            return ids, weights


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--show", type=int, default=3)
    args.add_argument("--seed", type=int, default=1)
    args.add_argument("--holdout", action="store_true")
    args = args.parse_args()
    rng = random.Random(args.seed)
    for _ in range(args.show):
        print(render(conversation(rng, args.holdout)), end="\n======\n")


if __name__ == "__main__":
    main()
