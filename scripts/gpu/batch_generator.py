#!/usr/bin/env python3
"""mlx-lm's BatchGenerator on one model folder, greedy: tokens per second by number of streams, prefill, peak memory.

    batch_generator.py FOLDER [--streams 1,4,8] [--prompt-tokens 256] [--tokens 256] [--prefill 2048,8192]
    batch_generator.py FOLDER --asked

One JSON line per measurement. Decoding is timed from the step after all streams have joined to the last step. With --asked it
measures what standard input asks for, a line each: {"streams": 4, "prompt_tokens": 256, "tokens": 128} or {"prefill": 2048}.
"""
import argparse, json, pathlib, random, sys, time
import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import load_model


def prompts(streams, length, seed):
    rng = random.Random(seed)
    return [[rng.randrange(10, 1000) for _ in range(length)] for _ in range(streams)]


def decode(model, streams, length, tokens, seed):
    mx.reset_peak_memory()
    generator = BatchGenerator(model, max_tokens=tokens + 1)
    generator.insert(prompts(streams, length, seed))
    began, first, produced, steps = time.perf_counter(), None, 0, 0
    while True:
        responses = generator.next_generated()
        if not responses:
            break
        now = time.perf_counter()
        if len(responses) == streams:
            if first is None:
                first = now
            else:
                produced += len(responses)
                steps += 1
                last = now
        if all(r.finish_reason for r in responses):
            break
    generator.close()
    return dict(tok_s=produced / (last - first), step_ms=(last - first) / steps * 1e3, ttft_ms=(first - began) * 1e3,
                peak_gb=mx.get_peak_memory() / 1e9)


def prefill(model, length, seed):
    mx.reset_peak_memory()
    generator = BatchGenerator(model, max_tokens=2)
    generator.insert(prompts(1, length, seed))
    began = time.perf_counter()
    generator.next_generated()
    took = time.perf_counter() - began
    generator.close()
    return dict(tok_s=length / took, ms=took * 1e3, peak_gb=mx.get_peak_memory() / 1e9)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("folder", type=pathlib.Path)
    args.add_argument("--streams", default="1,4,8")
    args.add_argument("--prompt-tokens", type=int, default=256)
    args.add_argument("--tokens", type=int, default=256)
    args.add_argument("--prefill", default="2048,8192")
    args.add_argument("--rounds", type=int, default=2, help="the best of so many is kept, after one to warm up")
    args.add_argument("--asked", action="store_true", help="measure what standard input asks for")
    a = args.parse_args()
    began = time.perf_counter()
    model, _ = load_model(a.folder)
    mx.eval(model.parameters())
    base = dict(engine="mlx-lm BatchGenerator", model=a.folder.name)
    print(json.dumps(base | dict(load_s=round(time.perf_counter() - began, 1), weights_gb=mx.get_active_memory() / 1e9)), flush=True)
    for seed, line in enumerate(sys.stdin if a.asked else (), 1):
        wish = json.loads(line)
        if "prefill" in wish:
            found = prefill(model, wish["prefill"], seed)
        else:
            found = decode(model, wish["streams"], wish["prompt_tokens"], wish["tokens"], seed)
        print(json.dumps(base | wish | {k: round(v, 3) for k, v in found.items()}), flush=True)
    if a.asked:
        return
    for streams in [int(n) for n in a.streams.split(",") if n]:
        decode(model, streams, a.prompt_tokens, 32, 1)
        best = max((decode(model, streams, a.prompt_tokens, a.tokens, 2 + n) for n in range(a.rounds)), key=lambda r: r["tok_s"])
        print(json.dumps(base | dict(streams=streams) | {k: round(v, 3) for k, v in best.items()}), flush=True)
    for length in [int(n) for n in a.prefill.split(",") if n]:
        prefill(model, length, 1)
        best = max((prefill(model, length, 2 + n) for n in range(a.rounds + 1)), key=lambda r: r["tok_s"])
        print(json.dumps(base | dict(prefill=length) | {k: round(v, 3) for k, v in best.items()}), flush=True)


if __name__ == "__main__":
    main()
