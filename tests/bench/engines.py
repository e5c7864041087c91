"""mlxworker beside mlx_lm.server and vllm-mlx, on two models, measured by mlx-bench in interleaved rounds; and
mlxworker beside its own bare loop (`mlxworker bench`), which is the same model code without scheduler, text and HTTP.

Every server gets the same prompts, greedy, with no penalties, and generates the same number of tokens. All servers
run all the time; only one is asked at a time.
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
# Beside the rates while all streams are being written: see `full_tokens_per_second` of mlx-bench.
PROMPT, TOKENS, LONG_PROMPT = 32, 192, 500
# Speed that this project wants, as ratios to mlx_lm.server by number of streams.
WANTED = {1: 1.3, 4: 1.5, 8: 1.5}
WANTED_EFFICIENCY, WANTED_REPEAT = 0.95, 0.05
FIELDS = json.dumps({"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1.0, "top_p": 1.0, "top_k": 0})


class Bench:
    """What is measured, and with what."""

    def __init__(self, options, log):
        self.options, self.log = options, log
        self.worker, self.load = options.bin / "mlxworker", options.bin / "mlx-bench"

    def endpoints(self, ports):
        first, *others = [f"{name}=http://127.0.0.1:{port}#{'default_model' if name == 'mlx_lm.server' else 'model'}"
                          for name, port in ports.items()]
        return [first, *[part for other in others for part in ("--compare", other)]]

    def run(self, ports, *more):
        """mlx-bench's report on the servers. A request that mlxworker fails ends the benchmark; one that another server
        fails is told, and the round made again, once."""
        command = [str(part) for part in (self.load, *self.endpoints(ports), "--body", FIELDS, "--json", *more)]
        for last in (False, True):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
            report = json.loads(done.stdout) if done.stdout else dict(endpoints=[])
            if done.returncode == 0:
                return report
            errors = {found["name"]: found["errors"] for found in report["endpoints"] if found.get("errors")}
            print(f"mlx-bench ended with {done.returncode}: {errors}", file=sys.stderr)
            if last or not errors or WORKER in errors:
                raise RuntimeError(f"mlx-bench ended with {done.returncode}: {errors}")

    def bare(self, model, streams):
        """Tokens per second of the bare loop in a process of its own: one round, as a server gets one, not the best of several."""
        command = [self.worker, "bench", model, "--streams", streams, "--prompt-tokens", PROMPT, "--tokens", TOKENS, "--rounds", 1]
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=self.log, text=True, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_second"]

    def decode(self, ports, model, streams):
        """Rounds at a number of streams, each with a bare loop among the servers."""
        found, bare = {name: [] for name in ports}, []
        for order in orders([BARE, *ports], self.options.rounds):
            for name in order:
                if name == BARE:
                    bare.append(self.bare(model, streams))
                    print(f"{streams} streams: bare loop {bare[-1]:.0f} tokens/s", file=sys.stderr)
                    continue
                # Twice as many requests as streams: no stream waits long for the last one.
                report = self.run({name: ports[name]}, "--streams", streams, "--requests", 2 * streams, "--rounds", 1,
                                  "--warmup", streams, "--prompt-tokens", PROMPT, "--tokens", TOKENS)
                found[name] += report["endpoints"]
        rows = {}
        for name, rounds in found.items():
            rows[name] = dict(
                full=[f["full_tokens_per_second"]["median"] for f in rounds],
                whole=[f["tokens_per_second"]["median"] for f in rounds],
                tokens=[f["completion_tokens"]["mean"] for f in rounds])
        return dict(streams=streams, rows=rows, bare=bare)

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


def spread(values, digits=0):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def verdict(value, wanted, above=True):
    met = value >= wanted if above else value <= wanted
    return f"{'met' if met else 'NOT MET'}: {'≥' if above else '≤'} {wanted:g} wanted"


def show(name, decode, first):
    """Tables and verdicts; values are medians of the rounds with their extremes."""
    print(f"\n### {name}\n\ntokens/s while all streams are being written\n")
    print("| streams | server | tokens/s | mlxworker ÷ it | over the whole round | mlxworker ÷ it |\n|---|---|---|---|---|---|")
    for part in decode:
        rows = part["rows"]
        ours = rows[WORKER]
        for server, row in rows.items():
            ratios = [[a / b for a, b in zip(ours[key], row[key])] for key in ("full", "whole")]
            shown = ["", ""] if server == WORKER else [spread(r, 2) for r in ratios]
            print(f"| {part['streams']} | {server} | {spread(row['full'])} | {shown[0]} | {spread(row['whole'])} | {shown[1]} |")
        efficiency = [a / b for a, b in zip(ours["full"], part["bare"])]
        print(f"| {part['streams']} | bare loop | {spread(part['bare'])} | {spread(efficiency, 2)} | | |")
    print("\n| 500-token prompt | new, ms | sent again, ms | again ÷ new |\n|---|---|---|---|")
    for server, row in first.items():
        print(f"| {server} | {spread(row['cold'], 1)} | {spread(row['again'], 1)} | {spread(row['share'], 3)} |")
    print()
    for part in decode:
        ours, peer = part["rows"][WORKER]["full"], part["rows"]["mlx_lm.server"]["full"]
        ratio = statistics.median(a / b for a, b in zip(ours, peer))
        efficiency = statistics.median(a / b for a, b in zip(ours, part["bare"]))
        print(f"- {part['streams']} streams: {ratio:.2f} × mlx_lm.server ({verdict(ratio, WANTED.get(part['streams'], 1.5))}); "
              f"serving efficiency {efficiency:.2f} ({verdict(efficiency, WANTED_EFFICIENCY)})")
    share = statistics.median(first[WORKER]["share"])
    print(f"- repeated prompt: {share:.3f} of the time of a new one ({verdict(share, WANTED_REPEAT, above=False)})")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--bin", type=pathlib.Path, required=True, help="where mlxworker and mlx-bench are")
    arguments.add_argument("--vllm-mlx", type=pathlib.Path, help="the program vllm-mlx; left out without it")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    arguments.add_argument("--model", choices=["demo", "dense", "both"], default="both")
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
                decode, first = measure(bench, model)
                everything[make.__name__] = dict(decode=decode, first_token=first)
                show(names[make], decode, first)
        except Exception:
            log.seek(0)
            sys.stderr.write(log.read()[-4000:])
            raise
    if options.output:
        options.output.write_text(json.dumps(everything, indent=1) + "\n")


def measure(bench, model):
    options = bench.options
    most = max(options.streams)
    ports = {WORKER: servers.free_port(), "mlx_lm.server": servers.free_port()}
    commands = {WORKER: servers.mlxworker(bench.worker, model, ports[WORKER], "--max-num-seqs", most),
                "mlx_lm.server": servers.mlx_lm_server(model, ports["mlx_lm.server"], most)}
    if options.vllm_mlx:
        ports["vllm-mlx"] = servers.free_port()
        commands["vllm-mlx"] = servers.vllm_mlx(options.vllm_mlx, model, ports["vllm-mlx"])
    with servers.contextlib.ExitStack() as running:
        for name, command in commands.items():
            running.enter_context(servers.server(command, ports[name], bench.log))
        decode = [bench.decode(ports, model, streams) for streams in options.streams]
        return decode, bench.first_token(ports)


if __name__ == "__main__":
    main()
