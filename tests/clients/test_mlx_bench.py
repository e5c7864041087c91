"""mlx-bench against the real servers: what it reports is what they did."""

import json
import subprocess

import pytest

from harness import DEMO, MLX_BENCH, MLXWORKER, Server


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    command = [MLXWORKER, "serve", DEMO, "--port", "0", "--served-model-name", "demo"]
    server = Server(command, tmp_path_factory.mktemp("worker"))
    try:
        yield server
    finally:
        server.close()


def bench(*arguments, code=0):
    done = subprocess.run([MLX_BENCH, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wanted_lengths_are_what_the_worker_counts(worker):
    before = worker.get("/status")["engine"]["decode_tokens"]
    report = json.loads(bench(worker.url, "--prompt-tokens", 100, "--tokens", 24, "--streams", 2, "--requests", 6,
                              "--warmup", 0, "--json"))
    [found] = report["endpoints"]
    assert found["model"] == "demo" and found["succeeded"] == 6 and found["failed"] == 0
    assert report["settings"]["calibration"]["measured"]
    assert 85 <= found["prompt_tokens"]["mean"] <= 115, found["prompt_tokens"]
    assert found["completion_tokens"]["min"] == found["completion_tokens"]["max"] == 24
    # Those of the three short requests that measured prompts come on top.
    assert 6 * 24 <= worker.get("/status")["engine"]["decode_tokens"] - before <= 6 * 24 + 3
    assert 0 < found["ttft_ms"]["min"] <= found["ttft_ms"]["p50"] <= found["duration_ms"]["p50"]
    assert found["tokens_per_second"]["median"] * found["rounds"][0]["wall"] == pytest.approx(6 * 24)


def test_two_endpoints_in_one_run(worker, server):
    text = bench(f"worker={worker.url}#demo", "--compare", f"swapd={server.url}#demo", "--api", "chat", "--turns", 2,
                 "--rounds", 2, "--requests", 1, "--tokens", "4..8", "--prompt-tokens", 20, "--body", '{"top_k": 5}')
    assert "worker ÷ swapd" in text
    assert text.count("4 requests in 2 rounds, 0 failed") == 2, text


def test_refused_requests_are_counted_by_their_status(worker):
    text = bench(worker.url, "--requests", 2, "--tokens", 4, "--prompt-tokens", 6000, code=1)
    assert "failed: 2 × http 400" in text, text
