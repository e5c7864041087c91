"""Starting, swapping, stopping and dying of real workers under swapd."""

import json
import os
import shutil
import signal
import socket
import threading
import time

import httpx
import openai
import pytest

import models
from harness import SWAPD, Program, Stream, alive, chat_body, demo, endless, error_of, eventually

ONE = {"models": {"demo": demo()}}
SIGNALS = [signal.SIGTERM, signal.SIGINT]


def test_nothing_runs_before_the_first_request(start_swapd):
    swapd = start_swapd(ONE)
    assert not swapd.running() and not swapd.left()
    assert swapd.chat("Hello").status_code == 200
    assert swapd.left() == [swapd.worker()]


def test_requests_at_the_same_time_start_one_worker(start_swapd):
    swapd = start_swapd(ONE)
    streams = [Stream(swapd, max_tokens=4) for _ in range(4)]
    pids = {swapd.worker(), *swapd.left()}
    assert all(s.rest().done for s in streams) and len(pids) == 1
    for stream in streams:
        stream.close()


def test_sigkill_of_swapd_leaves_no_worker(start_swapd):
    swapd = start_swapd(ONE)
    assert swapd.chat("Hello").status_code == 200
    worker = swapd.worker()
    swapd.signal(signal.SIGKILL)
    assert swapd.wait(5) == -signal.SIGKILL
    eventually(lambda: not alive(worker) and not swapd.left(), "the worker is gone", 2)


def test_sigkill_of_swapd_leaves_no_worker_in_mid_stream(start_swapd):
    swapd = start_swapd(ONE)
    with Stream(swapd, **endless()) as stream:
        stream.content()
        worker = swapd.worker()
        swapd.signal(signal.SIGKILL)
        swapd.wait(5)
        eventually(lambda: not alive(worker) and not swapd.left(), "the worker is gone", 2)
        assert stream.rest().broken and not stream.looks_finished()


def test_sigkill_of_swapd_while_a_worker_starts(start_swapd):
    swapd = start_swapd(ONE)
    body = json.dumps(chat_body("Hello")).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n"
    address = swapd.http.base_url
    with socket.create_connection((address.host, address.port)) as client:
        client.sendall(head.encode() + body)
        eventually(swapd.left, "a worker starts", 5)
        swapd.signal(signal.SIGKILL)
        swapd.wait(5)
    eventually(lambda: not swapd.left(), "the worker is gone", 2)


def test_sigkill_of_the_worker_breaks_the_stream_and_the_next_request_works(start_swapd):
    swapd = start_swapd(ONE)
    with Stream(swapd, **endless()) as stream:
        stream.content()
        worker = swapd.worker()
        os.kill(worker, signal.SIGKILL)
        stream.rest()
        assert not stream.looks_finished(), stream.events[-3:]
        assert stream.broken or stream.error(), "a clean end"
    reply = swapd.chat("Count from 1 to 9")
    assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"], reply.text
    assert swapd.worker() != worker


def test_sigkill_of_the_worker_is_an_error_in_the_python_library(start_swapd):
    swapd = start_swapd(ONE)
    with openai.OpenAI(base_url=f"{swapd.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        stream = client.chat.completions.create(**chat_body("Count from 1 to 50", stream=True), extra_body=endless())
        with pytest.raises(openai.APIError) as caught:
            for i, chunk in enumerate(stream):
                assert not chunk.choices[0].finish_reason
                if i == 3:
                    os.kill(swapd.worker(), signal.SIGKILL)
        assert "demo" in str(caught.value) or "worker" in str(caught.value)
        assert client.chat.completions.create(**chat_body("Hello")).choices[0].message.content


def test_sigkill_of_the_worker_before_the_reply_is_502(start_swapd):
    swapd = start_swapd(ONE)
    assert swapd.chat("Hello").status_code == 200
    worker = swapd.worker()
    eventually(lambda: swapd.status()["requests"]["running"] == 0, "the first request has left the engine", 5)

    def kill():
        eventually(lambda: swapd.status()["requests"]["running"], "the request runs", 10)
        os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    reply = httpx.post(f"{swapd.url}/v1/chat/completions", json=chat_body("Count from 1 to 50") | endless(), timeout=60,
                       trust_env=False)
    killer.join()
    error = error_of(reply, 502)
    assert "demo" in error["message"]
    assert swapd.chat("Hello").status_code == 200


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_signal_ends_swapd_and_its_worker(start_swapd, number, loaded):
    swapd = start_swapd(ONE)
    worker = None
    if loaded:
        assert swapd.chat("Hello").status_code == 200
        worker = swapd.worker()
    swapd.signal(number)
    assert swapd.wait(8) == 0, swapd.written()
    # It has waited for the worker's end, so nothing is left at this very moment.
    assert not swapd.left() and not (worker and alive(worker))


def test_sigterm_lets_a_stream_finish(start_swapd):
    swapd = start_swapd(ONE)
    with Stream(swapd, max_tokens=60, ignore_eos=True) as stream:
        stream.content()
        swapd.signal(signal.SIGTERM)
        stream.rest()
        assert stream.done and stream.looks_finished() and not stream.broken
    assert swapd.wait(10) == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_cuts_a_stream_after_its_grace(start_swapd, number):
    swapd = start_swapd({"unloadTimeout": 1} | ONE)
    with Stream(swapd, **endless()) as stream:
        stream.content()
        begun = time.monotonic()
        swapd.signal(number)
        stream.rest()
        assert not stream.looks_finished() and (stream.broken or stream.error())
        assert swapd.wait(8) == 0, swapd.written()
        assert time.monotonic() - begun < 8
    assert not swapd.left()


def test_the_worker_goes_after_its_ttl_and_comes_again(start_swapd):
    swapd = start_swapd({"models": {"demo": demo(ttl=1)}})
    assert swapd.chat("Hello").status_code == 200
    first = swapd.worker()
    eventually(lambda: not alive(first), "evicted", 5)
    eventually(lambda: not swapd.running(), "no row", 2)
    assert swapd.chat("Hello").status_code == 200
    assert swapd.worker() != first


def test_the_ttl_does_not_run_during_a_request(start_swapd):
    swapd = start_swapd({"models": {"demo": demo(ttl=1)}})
    with Stream(swapd, **endless()) as stream:
        stream.content()
        worker, begun = swapd.worker(), time.monotonic()
        while time.monotonic() - begun < 2.5:
            assert stream.next(), "cut"
        assert alive(worker)
        assert swapd.worker() == worker
    eventually(lambda: not alive(worker), "evicted afterwards", 5)


def test_two_models_take_turns(start_swapd):
    swapd = start_swapd({"models": {"one": demo(), "two": demo()}})
    workers = {}
    for model in ("one", "two", "one"):
        reply = swapd.chat("Count from 1 to 9", model)
        assert reply.status_code == 200 and reply.json()["model"] == model, reply.text
        row = swapd.running()
        assert list(row) == [model], row
        assert swapd.left() == [row[model]["pid"]]
        assert row[model]["pid"] not in workers.values()
        workers[model] = row[model]["pid"]


def test_a_swap_waits_for_the_stream_that_runs(start_swapd):
    swapd = start_swapd({"models": {"one": demo(), "two": demo()}})
    with Stream(swapd, "one", max_tokens=100, ignore_eos=True) as one:
        one.content()
        with Stream(swapd, "two", max_tokens=4) as two:
            assert two.rest().done
        assert one.rest().done and one.looks_finished()
    assert list(swapd.running()) == ["two"]


def test_unload_and_load_by_hand(start_swapd):
    swapd = start_swapd(ONE)
    assert swapd.http.post("/api/models/load/demo").json()["state"] == "ready"
    worker = swapd.worker()
    assert swapd.http.post("/api/models/unload/demo").status_code == 200
    assert not alive(worker) and not swapd.running()


def fails_to_start(swapd):
    """Asks for a model that cannot be started; the message."""
    reply = swapd.chat("Hello")
    assert reply.status_code in (502, 503), reply.text
    return error_of(reply, reply.status_code)["message"]


def test_a_model_that_is_not_there(start_swapd, tmp_path):
    nothing = str(tmp_path / "nothing")
    swapd = start_swapd({"models": {"demo": {"worker": {"model": nothing}}}})
    assert nothing in fails_to_start(swapd)
    assert not swapd.left()
    # Again, now that it is known to fail: still with the reason.
    assert nothing in fails_to_start(swapd)


@pytest.mark.parametrize("damage", [models.truncated, models.without_a_tensor, models.with_a_wrong_shape])
def test_weights_that_cannot_be_loaded(start_swapd, tmp_path, damage):
    model = models.copy(tmp_path / "model")
    names = damage(model)
    swapd = start_swapd({"models": {"demo": {"worker": {"model": str(model)}}}})
    message = fails_to_start(swapd)
    assert "model.safetensors" in message or damage is models.without_a_tensor, message
    assert any(name in message for name in names), (names, message)
    assert not swapd.left()


def test_a_model_that_is_mended_works(start_swapd, tmp_path):
    model = models.copy(tmp_path / "model")
    weights = models.own(model)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    swapd = start_swapd({"models": {"demo": {"worker": {"model": str(model)}}}})
    fails_to_start(swapd)
    weights.write_bytes(whole)
    eventually(lambda: swapd.chat("Hello").status_code == 200, "works again after the back-off", 20)


def test_one_model_that_fails_leaves_the_other_alone(start_swapd, tmp_path):
    registry = {"models": {"bad": {"worker": {"model": str(tmp_path / "nothing")}}, "demo": demo()}}
    swapd = start_swapd(registry)
    assert swapd.chat("Hello").status_code == 200
    assert swapd.chat("Hello", "bad").status_code in (502, 503)
    assert swapd.chat("Hello").status_code == 200


def test_a_path_is_taken_from_the_registrys_directory(launch, start_swapd, tmp_path):
    shutil.rmtree(tmp_path / "swapd0", ignore_errors=True)
    models.copy(tmp_path / "weights")
    swapd = start_swapd({"models": {"demo": {"worker": {"model": "../weights"}}}})
    assert swapd.chat("Hello").status_code == 200


def test_an_address_that_is_taken_is_named(start_swapd, launch):
    first = start_swapd(ONE)
    address = first.url.removeprefix("http://")
    second = launch(Program, [SWAPD, "--config", first.config, "--listen", address])
    assert second.wait(10) == 1 and address in second.written()
