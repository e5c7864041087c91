"""mlxworker beside mlx_lm.server and vllm-mlx, on two models, measured by mlx-bench in interleaved rounds; and
mlxworker beside its own bare loop (`mlxworker bench`), which is the same model code without scheduler, text and HTTP.

Every server gets the same prompts, greedy, with no penalties, and generates the same number of tokens. All servers
run all the time; only one is asked at a time. Who is measured has run a round before, the bare loop too.

And mlxworker beside itself: what penalties cost, and what a request costs that says nothing about sampling.
"""
import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

import models
import servers

WORKER, BARE = "mlxworker", "bare loop"
PROMPT, TOKENS, LONG_PROMPT = 32, 192, 500
# Requests in a row at one stream: with fewer, a round is over before the machine has come to rest.
LEAST_REQUESTS = 4
# Speed that this project wants, as ratios to mlx_lm.server by number of streams.
WANTED = {1: 1.3, 4: 1.5, 8: 1.5}
WANTED_EFFICIENCY, WANTED_REPEAT = 0.95, 0.05
PLAIN = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1.0, "top_p": 1.0, "top_k": 0}
# mlx-bench asks for temperature 0 unless a body says otherwise; null is as if it said nothing.
SAMPLING = {"greedy, no penalties": PLAIN, "greedy, the default penalties": {}, "nothing said": {"temperature": None}}
SAMPLING_STREAMS = 1, 8


class Bench:
    """What is measured, and with what."""

    def __init__(self, options, log):
        self.options, self.log = options, log
        self.worker, self.load = options.bin / "mlxworker", options.bin / "mlx-bench"
        self.most = max(*options.streams, *SAMPLING_STREAMS)

    def endpoints(self, ports):
        first, *others = [f"{name}=http://127.0.0.1:{port}#{'default_model' if name == 'mlx_lm.server' else 'model'}"
                          for name, port in ports.items()]
        return [first, *[part for other in others for part in ("--compare", other)]]

    def run(self, ports, *more, body=PLAIN):
        """mlx-bench's report on the servers. A request that mlxworker fails ends the benchmark; one that another server
        fails is told, and the round made again, once."""
        command = [str(part) for part in (self.load, *self.endpoints(ports), "--body", json.dumps(body), "--json", *more)]
        for last in (False, True):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
            report = json.loads(done.stdout) if done.stdout else dict(endpoints=[])
            if done.returncode == 0:
                return report
            errors = {found["name"]: found["errors"] for found in report["endpoints"] if found.get("errors")}
            print(f"mlx-bench ended with {done.returncode}: {errors}", file=sys.stderr)
            if last or not errors or WORKER in errors:
                raise RuntimeError(f"mlx-bench ended with {done.returncode}: {errors}")

    def bare(self, model, streams, seed):
        """Tokens per second of the bare loop, in a process of its own whose limits are the server's. One round, after one
        that does not count: in a process's first round every page of its buffers is touched for the first time, which
        the servers have behind them."""
        command = [self.worker, "bench", model, "--streams", streams, "--prompt-tokens", PROMPT, "--tokens", TOKENS,
                   "--warmup", 1, "--rounds", 1, "--seed", seed, "--max-num-seqs", self.most]
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=self.log, text=True, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_second"]

    def ask(self, ports, streams, seed, body=PLAIN):
        """One round of decoding at one server. Twice as many requests as streams: none waits long for the last one."""
        requests = max(LEAST_REQUESTS, 2 * streams)
        return self.run(ports, "--streams", streams, "--requests", requests, "--rounds", 1, "--warmup", streams, "--seed", seed,
                        "--prompt-tokens", PROMPT, "--tokens", TOKENS, body=body)["endpoints"][0]

    def decode(self, ports, model, streams):
        """Rounds at a number of streams, each with a bare loop among the servers."""
        found, bare = {name: [] for name in ports}, []
        for at, order in enumerate(orders([BARE, *ports], self.options.rounds)):
            # All get the prompts of one seed, and another one in every round, which no cache knows.
            seed = 1000 * streams + at
            for name in order:
                if name == BARE:
                    bare.append(self.bare(model, streams, seed))
                    print(f"{streams} streams: bare loop {bare[-1]:.0f} tokens/s", file=sys.stderr)
                    continue
                found[name].append(self.ask({name: ports[name]}, streams, seed))
        rows = {}
        for name, rounds in found.items():
            rows[name] = dict(
                # None: its streams ran together for a moment only.
                full=[f["rounds"][0]["full_tokens_per_second"] for f in rounds],
                share=[f["rounds"][0]["full_share"] for f in rounds],
                whole=[f["tokens_per_second"]["median"] for f in rounds],
                tokens=[f["completion_tokens"]["mean"] for f in rounds])
        return dict(streams=streams, rows=rows, bare=bare)

    def sampling(self, port, streams):
        """mlxworker's rates with each body of `SAMPLING`, in interleaved rounds, and the ratios to the first."""
        rates = {name: [] for name in SAMPLING}
        for at, order in enumerate(orders(list(SAMPLING), self.options.rounds)):
            for place, name in enumerate(order):
                # One server for all: with another's prompts it would find them in its cache.
                seed = 1_000_000 + 1000 * streams + 10 * at + place
                found = self.ask({WORKER: port}, streams, seed, body=SAMPLING[name])
                rates[name].append(found["rounds"][0]["full_tokens_per_second"])
                print(f"{streams} streams, {name}: {rates[name][-1]} tokens/s", file=sys.stderr)
        plain = next(iter(rates.values()))
        return {name: dict(rates=row, ratios=ratios(row, plain)) for name, row in rates.items()}

    def first_token(self, ports):
        """Prompts of 500 tokens, new and sent again."""
        report = self.run(ports, "--prompt-tokens", LONG_PROMPT, "--tokens", 4, "--requests", 2, "--repeats", 2,
                          "--rounds", self.options.rounds)
        rows = {}
        for found in report["endpoints"]:
            cold, again = ([r[key] for r in found["rounds"]] for key in ("ttft_ms", "repeat_ttft_ms"))
            rows[found["name"]] = dict(cold=cold, again=again, share=[b / a for a, b in zip(cold, again)],
                                       tokens=found["prompt_tokens"]["mean"])
        return rows


def orders(names, rounds):
    """The names' order in each round: it rotates, and every other round runs backwards, so that nobody has one place or
    one neighbour before it for good."""
    turned = (names[at % len(names):] + names[:at % len(names)] for at in range(rounds))
    return [order[::-1] if at % 2 else order for at, order in enumerate(turned)]


def ratios(ours, others):
    """Of the rounds that have both."""
    return [a / b for a, b in zip(ours, others) if a and b]


def spread(values, digits=0):
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def verdict(value, wanted, above=True):
    met = value >= wanted if above else value <= wanted
    return f"{'met' if met else 'NOT MET'}: {'≥' if above else '≤'} {wanted:g} wanted"


def judged(values, wanted):
    """The middle one with its verdict."""
    if not values:
        return "no round to judge by"
    value = statistics.median(values)
    return f"{value:.2f} ({verdict(value, wanted)})"


def show_sampling(name, sampling):
    print(f"\n### {name}: what sampling costs mlxworker, tokens/s while all streams are being written\n")
    print("| body | " + " | ".join(f"{streams} streams | ÷ the first" for streams in sampling) + " |")
    print("|---" * (1 + 2 * len(sampling)) + "|")
    for body in SAMPLING:
        rows = [part[body] for part in sampling.values()]
        print(f"| {body} | " + " | ".join(f"{spread(row['rates'])} | {spread(row['ratios'], 2)}" for row in rows) + " |")


def show(name, decode, first):
    """Tables and verdicts; values are medians of the rounds with their extremes."""
    print(f"\n### {name}\n\ntokens/s while all streams are being written\n")
    print("| streams | server | tokens/s | mlxworker ÷ it | over the whole round | mlxworker ÷ it |\n|---|---|---|---|---|---|")
    for part in decode:
        rows = part["rows"]
        ours = rows[WORKER]
        for server, row in rows.items():
            shown = ["", ""] if server == WORKER else [spread(ratios(ours[key], row[key]), 2) for key in ("full", "whole")]
            print(f"| {part['streams']} | {server} | {spread(row['full'])} | {shown[0]} | {spread(row['whole'])} | {shown[1]} |")
        print(f"| {part['streams']} | bare loop | {spread(part['bare'])} | {spread(ratios(ours['full'], part['bare']), 2)} | | |")
    print("\n| 500-token prompt | new, ms | sent again, ms | again ÷ new |\n|---|---|---|---|")
    for server, row in first.items():
        print(f"| {server} | {spread(row['cold'], 1)} | {spread(row['again'], 1)} | {spread(row['share'], 3)} |")
    print()
    for part in decode:
        ours, peer = part["rows"][WORKER]["full"], part["rows"]["mlx_lm.server"]["full"]
        print(f"- {part['streams']} streams: {judged(ratios(ours, peer), WANTED.get(part['streams'], 1.5))} of mlx_lm.server's rate; "
              f"serving efficiency {judged(ratios(ours, part['bare']), WANTED_EFFICIENCY)}")
    share = statistics.median(first[WORKER]["share"])
    print(f"- repeated prompt: {share:.3f} of the time of a new one ({verdict(share, WANTED_REPEAT, above=False)})")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--bin", type=pathlib.Path, required=True, help="where mlxworker and mlx-bench are")
    arguments.add_argument("--vllm-mlx", type=pathlib.Path, help="the program vllm-mlx; left out without it")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    arguments.add_argument("--model", choices=["demo", "dense", "both"], default="both")
    arguments.add_argument("--only-sampling", action="store_true", help="only what sampling costs: mlxworker alone")
    arguments.add_argument("--output", type=pathlib.Path, help="write all figures to this JSON file")
    options = arguments.parse_args()
    wanted = [models.demo, models.dense] if options.model == "both" else [getattr(models, options.model)]
    names = {models.demo: "the demonstration model (4-bit mixture of experts)",
             models.dense: "a dense float32 Qwen3 (hidden {hidden_size}, {num_hidden_layers} layers)".format(**models.DENSE)}
    everything = {}
    print(f"{platform.system()} {platform.machine()}; {options.rounds} interleaved rounds: median (lowest..highest)")
    with tempfile.TemporaryDirectory() as folder, open(pathlib.Path(folder) / "log", "w+") as log:
        bench = Bench(options, log)
        try:
            for make in wanted:
                model = make(pathlib.Path(folder) / make.__name__)
                found = measure(bench, model)
                everything[make.__name__] = found
                if not options.only_sampling:
                    show(names[make], found["decode"], found["first_token"])
                show_sampling(names[make], found["sampling"])
        except Exception:
            log.seek(0)
            sys.stderr.write(log.read()[-4000:])
            raise
    if options.output:
        options.output.write_text(json.dumps(everything, indent=1) + "\n")


def measure(bench, model):
    options = bench.options
    most = bench.most
    ports = {WORKER: servers.free_port()}
    commands = {WORKER: servers.mlxworker(bench.worker, model, ports[WORKER], "--max-num-seqs", most)}
    if not options.only_sampling:
        ports["mlx_lm.server"] = servers.free_port()
        commands["mlx_lm.server"] = servers.mlx_lm_server(model, ports["mlx_lm.server"], most)
        if options.vllm_mlx:
            ports["vllm-mlx"] = servers.free_port()
            commands["vllm-mlx"] = servers.vllm_mlx(options.vllm_mlx, model, ports["vllm-mlx"])
    with servers.contextlib.ExitStack() as running:
        for name, command in commands.items():
            running.enter_context(servers.server(command, ports[name], bench.log))
        found = {}
        if not options.only_sampling:
            found["decode"] = [bench.decode(ports, model, streams) for streams in options.streams]
            found["first_token"] = bench.first_token(ports)
        return found | {"sampling": {streams: bench.sampling(ports[WORKER], streams) for streams in SAMPLING_STREAMS}}


if __name__ == "__main__":
    main()
