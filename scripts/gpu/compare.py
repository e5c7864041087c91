#!/usr/bin/env python3
"""mlxworker, asked through HTTP, beside mlx-lm's BatchGenerator, called directly, on one device in interleaved rounds.

    compare.py MODEL --bin FOLDER --peer 'COMMAND' [--streams 1,4,8 | --streams ''] [--tokens 128] [--rounds 3] [--prefill 2048,8192] [-- FLAGS]

FOLDER has mlxworker and mlx-bench. COMMAND starts batch_generator.py in an environment that has mlx-lm, as in
'python3 scripts/gpu/batch_generator.py'; MODEL and --asked are appended. FLAGS go to mlxworker. Both keep the model loaded all
the time, and only one of them works at a time. Greedy, the worker without penalties; then once more with its defaults, eight
prompts alone and together, and new prompts. Prints JSON lines and, at the end, a table of medians.
"""
import argparse
import concurrent.futures
import json
import pathlib
import random
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

GREEDY = {"temperature": 0, "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1.0}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def say(**what):
    print(json.dumps(what), flush=True)


class Worker:
    def __init__(self, options):
        self.load, self.base = options.bin / "mlx-bench", f"http://127.0.0.1:{free_port()}"
        command = [options.bin / "mlxworker", "serve", options.model, "--port", self.base.rsplit(":", 1)[1],
                   "--served-model-name", "model", *options.flags]
        began = time.monotonic()
        self.process = subprocess.Popen([str(part) for part in command])
        while not self.up():
            if self.process.poll() is not None:
                sys.exit(f"mlxworker ended with {self.process.returncode}")
            time.sleep(0.2)
        say(what="mlxworker is ready", seconds=round(time.monotonic() - began, 1), decoding=self.get("/status")["limits"]["engine"].get("decoding"))

    def up(self):
        try:
            return self.get("/health") is not None
        except OSError:
            return False

    def get(self, path):
        with urllib.request.urlopen(self.base + path, timeout=10) as answer:
            return json.load(answer)

    def bench(self, body, *more):
        """mlx-bench's report of one round."""
        command = [self.load, f"w={self.base}#model", "--warmup", 0, "--rounds", 1, "--body", json.dumps(body), "--json", *more]
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout)["endpoints"][0]

    def rate(self, streams, options, body):
        """Tokens a second of all streams while all of them are being written."""
        found = self.bench(body, "--streams", streams, "--requests", 2 * streams, "--prompt-tokens", options.prompt_tokens,
                           "--tokens", options.tokens)
        return found["full_tokens_per_second"]["median"]

    def prompt_rate(self, length):
        """Tokens a second of a new prompt of exactly so many tokens, until the first token has come: the whole reply, which
        has one. On CUDA MLX makes an attention for each new length, some 100 ms, whoever asks first."""
        prompt = [random.randrange(10, 1000) for _ in range(length)]
        began = time.perf_counter()
        self.complete(prompt, 1)
        return length / (time.perf_counter() - began)

    def complete(self, prompt, tokens):
        body = dict(GREEDY, model="model", prompt=prompt, max_tokens=tokens, ignore_eos=True)
        request = urllib.request.Request(self.base + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["choices"][0]["text"]

    def alone_and_together(self, count, tokens):
        """How many of `count` replies are the same alone and beside the others; none of the prompts shares a block."""
        prompts = [f"{n} {'abcdefgh'[n % 8]} " * (5 + 3 * n) for n in range(count)]
        alone = [self.complete(prompt, tokens) for prompt in prompts]
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            together = list(pool.map(lambda prompt: self.complete(prompt, tokens), prompts))
        return sum(a == b for a, b in zip(alone, together))


class Peer:
    def __init__(self, options):
        command = [*shlex.split(options.peer), str(options.model), "--asked"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        print(self.process.stdout.readline().strip(), flush=True)

    def ask(self, **wish):
        self.process.stdin.write(json.dumps(wish) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit("the peer has ended")
        return json.loads(line)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=pathlib.Path)
    arguments.add_argument("--bin", type=pathlib.Path, required=True)
    arguments.add_argument("--peer", required=True)
    arguments.add_argument("--streams", default="1,4,8")
    arguments.add_argument("--prompt-tokens", type=int, default=256)
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--prefill", default="")
    given = sys.argv[1:]
    mine = given.index("--") if "--" in given else len(given)
    options = arguments.parse_args(given[:mine])
    options.flags = given[mine + 1:]
    all_streams = [int(n) for n in options.streams.split(",") if n]
    worker = Worker(options)
    peer = None
    try:
        peer = Peer(options)
        measure(worker, peer, all_streams, options)
    finally:
        worker.process.terminate()
        worker.process.wait()
        if peer:
            peer.process.kill()


def measure(worker, peer, all_streams, options):
    ours, theirs = {n: [] for n in all_streams}, {n: [] for n in all_streams}
    # One of each that does not count: both compile what they need at first use.
    for round_ in range(options.rounds + 1):
        for streams in all_streams:
            for side in ("worker", "peer") if round_ % 2 else ("peer", "worker"):
                if side == "worker":
                    found = worker.rate(streams, options, GREEDY)
                else:
                    found = peer.ask(streams=streams, prompt_tokens=options.prompt_tokens, tokens=options.tokens)["tok_s"]
                say(round=round_, streams=streams, side=side, tokens_per_second=round(found, 1))
                if round_:
                    (ours if side == "worker" else theirs)[streams].append(found)
    middle = statistics.median
    for n in all_streams:
        say(streams=n, mlxworker=round(middle(ours[n]), 1), peer=round(middle(theirs[n]), 1),
            ratio=round(middle(a / b for a, b in zip(ours[n], theirs[n])), 2))
    if all_streams:
        defaults = {n: worker.rate(n, options, {}) for n in all_streams}
        say(what="with the default sampling's penalties, greedy", tokens_per_second=defaults)
        say(what="replies equal alone and together", equal=worker.alone_and_together(8, 64), of=8)
    if not all_streams:
        # On CUDA a long prompt as the peer's very first work was not answered within a minute, once.
        peer.ask(streams=1, prompt_tokens=64, tokens=4)
    for length in [int(n) for n in options.prefill.split(",") if n]:
        found = {"mlxworker": [], "peer": []}
        # The first of each compiles, and does not count.
        for round_ in range(options.rounds + 1):
            found["mlxworker"].append(worker.prompt_rate(length))
            asked = peer.ask(prefill=length)
            found["peer"].append(asked["tok_s"])
            say(what="a new prompt", tokens=length, round=round_, mlxworker=round(found["mlxworker"][-1], 1),
                peer=asked["tok_s"], peers_peak_gb=asked["peak_gb"])
        ours, theirs = found["mlxworker"][1:], found["peer"][1:]
        say(what="new prompts", tokens=length, mlxworker=round(middle(ours), 1), peer=round(middle(theirs), 1),
            ratio=round(middle(a / b for a, b in zip(ours, theirs)), 2))


if __name__ == "__main__":
    main()
