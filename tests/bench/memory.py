"""Random traffic at one mlxworker: does its memory stay flat?

Clients ask for prompts and replies of all lengths, with shared beginnings, as conversations, with and without a
stream, with all kinds of sampling; one in four goes away in the middle. Meanwhile the worker's resident memory and the
number of its mappings (from the system; large buffers are such) and MLX' active and cached bytes (from /status) are
noted.

It is to be an hour's worth of work at least: the requests of one busy agent in an hour (`flat.HOUR`), after the warm-up.
Flat means: the line through the samples after the warm-up rises by no more than `--hourly-mib` in an hour's worth, and
the middle of the last third of them is no more than `--step-mib` above that of the first (`flat.judge`). Exit code 1
otherwise, or when a request failed that should not.
"""
import argparse
import http.client
import json
import pathlib
import random
import sys
import tempfile
import threading
import time

import flat
import models
import servers

WORDS = "the time water people day house work place year hand part world life name side line light point city".split()
ROWS = ["rss", "active", "cache"]
# Of mappings: buffers that nobody frees, one in fifty requests, would be more.
MAPPINGS_STEP, MAPPINGS_HOURLY = 64, 20
MIB = 1 << 20


class Traffic:
    """Clients that go on until they are told to end."""

    def __init__(self, port, seed):
        self.port, self.seed, self.ended = port, seed, threading.Event()
        self.lock = threading.Lock()
        self.counts = dict(finished=0, cancelled=0, refused=0, tokens=0)
        self.failures = []
        everybody = random.Random(seed)
        self.shared = [" ".join(everybody.choices(WORDS, k=k)) for k in (40, 150, 400)]

    def client(self, number):
        dice = random.Random(self.seed * 1000 + number)
        while not self.ended.is_set():
            history = ""
            if dice.random() < 0.6:
                history = dice.choice(self.shared)
            for _ in range(dice.choice([1, 1, 2, 4])):
                # Mostly short, sometimes long.
                history += " " + " ".join(dice.choices(WORDS, k=int(dice.lognormvariate(3.2, 1.0)) + 1))
                reply = self.ask(dice, history[-4000:])
                if reply is None or self.ended.is_set():
                    break
                history += reply
            # A pause now and then, so that the worker is idle too.
            if dice.random() < 0.2:
                self.ended.wait(dice.random() * 2)

    def ask(self, dice, prompt):
        body = dict(model="model", prompt=prompt, max_tokens=int(dice.lognormvariate(3.5, 0.9)) + 1, ignore_eos=True,
                    temperature=dice.choice([0, 0, 0.7, 1.5]), stream=dice.random() < 0.7)
        body |= dice.choice([{}, {}, dict(top_k=20), dict(top_p=0.8), dict(seed=dice.randrange(1000)), dict(logprobs=3),
                             dict(frequency_penalty=1), dict(logit_bias={"300": 5})])
        leaves_after = dice.randrange(12) if dice.random() < 0.25 else None
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            if leaves_after == 0:
                return self.count("cancelled")
            response = connection.getresponse()
            if response.status in (429, 503):
                response.read()
                self.ended.wait(0.2)
                return self.count("refused")
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.read()[:300]}")
            if not body["stream"]:
                reply = json.loads(response.read())
                return self.count("finished", reply["usage"]["completion_tokens"], reply["choices"][0]["text"])
            return self.read(response, leaves_after)
        except Exception as failure:
            if not self.ended.is_set():
                with self.lock:
                    self.failures.append(repr(failure))
            return None
        finally:
            connection.close()

    def read(self, response, leaves_after):
        text, events, done = "", 0, False
        for line in response:
            done = done or line.startswith(b"data: [DONE]")
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(line[:300])
            text += event["choices"][0]["text"] if event.get("choices") else ""
            events += 1
            if events == leaves_after:
                return self.count("cancelled", events)
        if not done:
            raise RuntimeError("a stream broke off")
        return self.count("finished", events, text)

    def count(self, outcome, tokens=0, text=None):
        with self.lock:
            self.counts[outcome] += 1
            self.counts["tokens"] += tokens
        return text


def resident(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the worker has no memory")


def mappings(pid):
    """How many there are: those of programs and threads, which stay, and of buffers that malloc maps one by one."""
    with open(f"/proc/{pid}/maps") as maps:
        return sum(1 for _ in maps)


def sample(port, pid):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/status")
        status = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    memory = status["memory"]
    return dict(rss=resident(pid), mappings=mappings(pid), active=memory["active_bytes"], cache=memory["buffer_cache_bytes"],
                kv=memory["kv_used_bytes"] + memory["kv_cached_bytes"], running=status["requests"]["running"], waiting=status["requests"]["waiting"])


def judge(samples, step, hourly):
    """The verdict on each row."""
    done = [s["done"] for s in samples]
    limits = {row: (step, hourly) for row in ROWS} | {"mappings": (MAPPINGS_STEP, MAPPINGS_HOURLY)}
    return {row: flat.judge(done, [s[row] for s in samples], *limit) for row, limit in limits.items()}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--bin", type=pathlib.Path, required=True)
    arguments.add_argument("--minutes", type=float, default=10)
    arguments.add_argument("--warm-up", type=float, default=0.2, help="share of the time that does not count (default 0.2)")
    arguments.add_argument("--clients", type=int, default=8)
    arguments.add_argument("--hourly-mib", type=float, default=8, help="growth in an hour's worth of requests (default 8)")
    arguments.add_argument("--step-mib", type=float, default=16, help="last third above the first (default 16)")
    arguments.add_argument("--seed", type=int, default=1)
    # Buffer cache and KV pool are filled up to their limits by design. With the default limits, a model this small
    # needs longer for that than the run lasts.
    arguments.add_argument("worker_arguments", nargs="*", default=["--mlx-cache-limit-mb", "64", "--cache-memory-mb", "64"],
                           help="for mlxworker, after -- (default: %(default)s)")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder, open(pathlib.Path(folder) / "log", "w+") as log:
        port = servers.free_port()
        model = models.demo(pathlib.Path(folder) / "model")
        command = servers.mlxworker(options.bin / "mlxworker", model, port, *options.worker_arguments)
        with servers.server(command, port, log) as child:
            traffic = Traffic(port, options.seed)
            clients = [threading.Thread(target=traffic.client, args=(number,)) for number in range(options.clients)]
            for client in clients:
                client.start()
            samples = []
            try:
                began = time.monotonic()
                seconds = options.minutes * 60
                print("   time s   rss MiB  active MiB  cache MiB  kv MiB  mappings  running  waiting  finished  cancelled")
                for at in range(61):
                    # Sixty equal parts.
                    traffic.ended.wait(max(0.0, began + seconds * at / 60 - time.monotonic()))
                    now = sample(port, child.pid) | {"done": traffic.counts["finished"] + traffic.counts["cancelled"]}
                    samples.append(now)
                    rss, active, cache, kv = (now[key] / MIB for key in ("rss", "active", "cache", "kv"))
                    print(f"{time.monotonic() - began:9.0f} {rss:9.1f} {active:11.1f} {cache:10.1f} {kv:7.1f} {now['mappings']:9} {now['running']:8} "
                          f"{now['waiting']:8} {traffic.counts['finished']:9} {traffic.counts['cancelled']:10}", flush=True)
            finally:
                traffic.ended.set()
                for client in clients:
                    client.join()
            ended = child.poll()
    counted = samples[int(len(samples) * options.warm_up):]
    verdicts = judge(counted, options.step_mib * MIB, options.hourly_mib * MIB)
    hours = (counted[-1]["done"] - counted[0]["done"]) / flat.HOUR
    print(f"\n{traffic.counts}, {len(traffic.failures)} failed; {hours:.1f} hours' worth after the warm-up")
    for row, v in verdicts.items():
        unit, size = ("", 1) if row == "mappings" else (" MiB", MIB)
        print(f"{row:8} first third {v['first'] / size:8.1f}{unit}, last third {v['last'] / size:8.1f}{unit}, highest {v['highest'] / size:8.1f}"
              f"{unit}, {v['hourly'] / size:+6.1f}{unit} in an hour's worth: {'flat' if v['flat'] else 'GROWS'}")
    for failure in traffic.failures[:5]:
        print(f"failed: {failure}")
    fine = all(v["flat"] for v in verdicts.values()) and not traffic.failures and ended is None
    if traffic.counts["finished"] == 0 or traffic.counts["cancelled"] == 0:
        print("too short: nothing was finished or cancelled")
        fine = False
    if hours < 1:
        print(f"too short: less than an hour's worth, {flat.HOUR} requests")
        fine = False
    print("flat" if fine else "NOT FLAT" if not all(v["flat"] for v in verdicts.values()) else "not shown to be flat")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
