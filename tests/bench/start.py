"""The demo model served by swapd and mlxworker, and by mlx_lm.server: start, first token, one stream.

Rounds are interleaved, each with fresh processes; the median of the rounds is shown. Times are those of a client on
the same machine that reads the stream; the first token is the first event that carries text.
"""
import argparse
import contextlib
import http.client
import itertools
import json
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/demo/model"
# Each request begins with a number of its own: a repeated prompt would measure mlx_lm.server's prompt cache.
PROMPT = "<|im_start|>user\n{number} " + "one two three four five six seven eight nine ten " * 4
NUMBERS = itertools.count(100)
TOKENS = 256
# The tokens that would end a reply are forbidden, so that both generate the same number.
ENDS = json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stream(port: int, model: str, tokens: int, started: float):
    """Seconds from `started` to the first token and to the end of a greedy completion, and its number of tokens."""
    body = json.dumps(dict(model=model, prompt=PROMPT.format(number=next(NUMBERS)), max_tokens=tokens, temperature=0, stream=True,
                           presence_penalty=0, frequency_penalty=0,
                           logit_bias={str(token): -100 for token in ENDS}, stream_options=dict(include_usage=True)))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    reply = connection.getresponse()
    if reply.status != 200:
        raise RuntimeError(f"{reply.status}: {reply.read()[:500]}")
    first = last = None
    count = None
    for line in reply:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("usage"):
            count = event["usage"]["completion_tokens"]
        if event.get("choices") and event["choices"][0].get("text"):
            last = time.perf_counter() - started
            first = first or last
    connection.close()
    return first, last, count


@contextlib.contextmanager
def process(command: list[str], log):
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield child, started
    finally:
        child.terminate()
        child.wait(timeout=30)


def first_answer(port: int, child, started: float, path="/health"):
    """Seconds until the server answers 200."""
    while True:
        if child.poll() is not None:
            raise RuntimeError(f"{child.args[0]} ended with {child.returncode}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return time.perf_counter() - started
        except OSError:
            time.sleep(0.001)
        finally:
            connection.close()


def measure(command: list[str], port: int, model: str, log) -> dict:
    with process(command, log) as (child, started):
        answering = first_answer(port, child, started)
        cold, _, _ = stream(port, model, 1, started)
        results = dict(answering=answering, cold=cold, warm=[], rate=[])
        for _ in range(3):
            begin = time.perf_counter()
            first, last, count = stream(port, model, TOKENS, begin)
            if count != TOKENS:
                raise RuntimeError(f"{command[0]} generated {count} tokens instead of {TOKENS}")
            results["warm"].append(first)
            results["rate"].append((count - 1) / (last - first))
    return dict(answering=results["answering"], cold=results["cold"],
                warm=statistics.median(results["warm"]), rate=statistics.median(results["rate"]))


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--bin", type=pathlib.Path, required=True)
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    swapd, worker = options.bin / "swapd", options.bin / "mlxworker"
    found = {"swapd + mlxworker": [], "mlxworker": [], "mlx_lm.server": []}
    with tempfile.TemporaryDirectory() as folder:
        registry = pathlib.Path(folder) / "registry.yaml"
        registry.write_text(f"models:\n  demo:\n    worker:\n      model: {MODEL}\n")
        with open(pathlib.Path(folder) / "log", "w+") as log:
            try:
                for _ in range(options.rounds):
                    for name, rounds in found.items():
                        port = free_port()
                        if name == "mlx_lm.server":
                            command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(MODEL), "--port", str(port)]
                            model = "default_model"
                        elif name == "mlxworker":
                            command = [str(worker), "serve", str(MODEL), "--port", str(port), "--served-model-name", "demo"]
                            model = "demo"
                        else:
                            command = [str(swapd), "--config", str(registry), "--listen", f"127.0.0.1:{port}"]
                            model = "demo"
                        rounds.append(measure(command, port, model, log))
            except Exception:
                log.seek(0)
                sys.stderr.write(log.read()[-4000:])
                raise
    median = {name: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]} for name, rounds in found.items()}
    peer = median["mlx_lm.server"]
    print(f"{platform.system()} {platform.machine()}, {options.rounds} interleaved rounds, medians\n")
    print("| | start to first answer (s) | start to first token (s) | warm first token (ms) | tokens/s, one stream |")
    print("|---|---|---|---|---|")
    for name, row in median.items():
        print(f"| {name} | {row['answering']:.3f} | {row['cold']:.3f} | {row['warm'] * 1000:.1f} | {row['rate']:.0f} |")
    for name in ("swapd + mlxworker", "mlxworker"):
        row = median[name]
        print(f"| {name} ÷ mlx_lm.server | {row['answering'] / peer['answering']:.2f} | {row['cold'] / peer['cold']:.2f} "
              f"| {row['warm'] / peer['warm']:.2f} | {row['rate'] / peer['rate']:.2f} |")


if __name__ == "__main__":
    main()
