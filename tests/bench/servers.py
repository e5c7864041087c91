"""Servers under measurement, started on a free port and ended with the block."""
import contextlib
import http.client
import pathlib
import signal
import socket
import subprocess
import sys
import time

# Ended from outside, a benchmark still ends what it has started.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(command, port: int, log):
    """Runs a command until the block ends; enters it when /health answers 200."""
    child = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while not healthy(port):
            if child.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with {child.returncode}")
            if time.monotonic() > end:
                raise RuntimeError(f"{command[0]} did not answer within two minutes")
            time.sleep(0.02)
        yield child
    finally:
        child.terminate()
        try:
            child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def mlxworker(program: pathlib.Path, model: pathlib.Path, port: int, *more):
    return [program, "serve", model, "--port", port, "--served-model-name", "model", *more]


def mlx_lm_server(model: pathlib.Path, port: int, streams: int):
    return [sys.executable, "-m", "mlx_lm", "server", "--model", model, "--port", port, "--decode-concurrency", streams,
            "--prompt-concurrency", streams, "--log-level", "ERROR"]


def vllm_mlx(program: pathlib.Path, model: pathlib.Path, port: int):
    return [program, "serve", model, "--port", port, "--served-model-name", "model", "--continuous-batching"]
