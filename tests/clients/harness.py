"""The real programs as tests see them: started, watched, stopped, and nothing of them left behind."""

import json
import os
import re
import signal
import subprocess
import time
import uuid
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
DEMO = Path(os.environ.get("DEMO_MODEL", ROOT / "models/demo/model"))
SWAPD = os.environ.get("SWAPD", "")
MLXWORKER = os.environ.get("MLXWORKER", "")
MLX_BENCH = os.environ.get("MLX_BENCH", "")

# Set in every process that a test starts and so in its children: what still has it afterwards was left behind.
MARK = "BLACK_BOX_TEST"


def eventually(check, what, limit):
    """Calls `check` until it returns something true; fails after `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < end, f"not within {limit} s: {what}"
        time.sleep(0.01)


def alive(pid):
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        if Path("/proc/self").exists():
            return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def marked(mark):
    """Process ids that carry a mark, zombies left out. Where there is no /proc, `ps` shows environments."""
    if not Path("/proc/self").exists():
        lines = subprocess.run(["ps", "-axEww", "-o", "pid=,command="], capture_output=True, text=True).stdout
        return [int(line.split()[0]) for line in lines.splitlines() if f"{MARK}={mark}" in line]
    found = []
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0") and alive(int(entry.name)):
                    found.append(int(entry.name))
            except OSError:
                pass  # gone meanwhile, or not ours
    return found


class Program:
    """A program that a test has started. What it writes is kept in a file."""

    def __init__(self, command, directory, env=None):
        self.mark = uuid.uuid4().hex
        self.output = Path(directory) / f"output-{self.mark[:8]}.txt"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "MLXWORKER_", "SWAPD_", "HF_"))}
        environment |= {MARK: self.mark} | (env or {})
        with self.output.open("wb") as output:
            self.process = subprocess.Popen([str(c) for c in command], env=environment, stdin=subprocess.DEVNULL,
                                            stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        self.pid = self.process.pid

    def written(self):
        return self.output.read_text(errors="replace")

    def address(self, limit):
        """The address that it says it listens on."""
        def said():
            match = re.search(r"http://(?:127\.0\.0\.1|localhost):[1-9]\d*", self.written())
            assert match or self.process.poll() is None, (
                f"ended with {self.process.returncode} before it listened:\n{self.written()}")
            return match
        return eventually(said, f"the address of {self.process.args[0]}, which wrote:\n{self.written()}", limit)[0]

    def wait(self, limit):
        """Its exit code; negative for a signal."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {limit} s; it wrote:\n{self.written()}") from None

    def signal(self, number):
        self.process.send_signal(number)

    def left(self):
        """Processes that it has started and that still live."""
        return [pid for pid in marked(self.mark) if pid != self.pid]

    def close(self):
        """Ends it and whatever is left of it, by their ids."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in marked(self.mark):
            os.kill(pid, signal.SIGKILL)


class Server(Program):
    """A program with an HTTP address."""

    def __init__(self, command, directory, env=None, limit=60):
        super().__init__(command, directory, env)
        try:
            self.url = self.address(limit)
            self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
            eventually(lambda: self.http.get("/health").status_code == 200, "health", 10)
        except BaseException:
            self.close()
            raise

    def stop(self, limit=10):
        """SIGTERM, and the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(limit)

    def close(self):
        if hasattr(self, "http"):
            self.http.close()
        super().close()

    def get(self, path):
        response = self.http.get(path)
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text}"
        return response.json()

    def chat(self, text, model="demo", **more):
        """A greedy chat; the response as it came."""
        return self.http.post("/v1/chat/completions", json=chat_body(text, model, **more))


class Swapd(Server):
    """swapd with a registry of its own."""

    def __init__(self, directory, registry, env=None):
        self.config = Path(directory) / "registry.yaml"
        # YAML reads JSON.
        self.config.write_text(registry if isinstance(registry, str) else json.dumps(registry))
        command = [SWAPD, "--config", self.config, "--listen", "127.0.0.1:0"]
        super().__init__(command, directory, {"SWAPD_WORKER": MLXWORKER} | (env or {}), limit=20)

    def running(self):
        """Rows of /running by model."""
        return {row["model"]: row for row in self.get("/running")["running"]}

    def worker(self, model="demo"):
        """Process id of a model's worker, which must be ready."""
        row = self.running()[model]
        assert row["state"] == "ready", row
        return row["pid"]

    def status(self, model="demo"):
        """The worker's own account of itself."""
        return self.get(f"/upstream/{model}/v1/status")


def chat_body(text, model="demo", **more):
    """Greedy, without the worker's default penalties."""
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 120,
            "presence_penalty": 0, "frequency_penalty": 0} | more


def demo(**more):
    """A registry's entry for the demonstration model."""
    return {"worker": {"model": str(DEMO)}} | more


def endless():
    """Request fields for a reply that does not end by itself for a long time."""
    eos = json.loads((DEMO / "generation_config.json").read_text())["eos_token_id"]
    eos = eos if isinstance(eos, list) else [eos]
    return {"max_tokens": 3000, "ignore_eos": True, "logit_bias": {str(id): -100 for id in eos}}


def error_of(response, status):
    """The error in OpenAI's envelope; fails when the response is none."""
    assert response.status_code == status, f"{response.status_code} {response.text}"
    assert response.headers["content-type"].startswith("application/json")
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"} and error["message"] and error["type"], error
    return error


class Stream:
    """A chat stream read by hand, to see how it really ends."""

    def __init__(self, server, model="demo", **more):
        self.client = httpx.Client(base_url=server.url, timeout=30, trust_env=False)
        body = chat_body("Count from 1 to 50", model, stream=True) | more
        self.context = self.client.stream("POST", "/v1/chat/completions", json=body)
        self.response = self.context.__enter__()
        assert self.response.status_code == 200, self.response.read()
        self.lines = self.response.iter_lines()
        self.events, self.done, self.broken = [], False, False

    def next(self):
        """The next event; None at the end, whatever kind of end."""
        try:
            for line in self.lines:
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    self.events.append(json.loads(line[6:]))
                    return self.events[-1]
        except httpx.TransportError:
            self.broken = True
        return None

    def content(self):
        """Reads on until there is some text."""
        while event := self.next():
            if event.get("choices") and event["choices"][0]["delta"].get("content"):
                return event["choices"][0]["delta"]["content"]
        raise AssertionError(f"the stream ended without text: {self.events}")

    def rest(self):
        while self.next():
            pass
        return self

    def looks_finished(self):
        """Whether a client would take what came for a complete reply."""
        reasons = [c.get("finish_reason") for e in self.events for c in e.get("choices", [])]
        return self.done or any(reasons)

    def error(self):
        """The error event, if one came."""
        return next((e["error"] for e in self.events if "error" in e), None)

    def close(self):
        """Drops the connection."""
        self.response.close()
        self.client.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
