"""mlxworker without swapd: as a server of its own, and with models that cannot be loaded."""

import json
import re
import signal
import socket

import openai
import pytest

import models
from harness import DEMO, MLXWORKER, Program, Server, Stream, chat_body, endless, error_of, eventually


def serve(*arguments):
    return [MLXWORKER, "serve", *arguments]


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    server = Server(serve(DEMO, "--port", "0"), tmp_path_factory.mktemp("worker"))
    try:
        yield server
        assert server.stop() == 0, server.written()
    finally:
        server.close()


def test_it_answers(worker):
    [model] = worker.get("/v1/models")["data"]
    assert worker.get("/health")["status"] == "ok"
    with openai.OpenAI(base_url=f"{worker.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(**chat_body("Count from 1 to 9", model["id"]))
        chunks = client.chat.completions.create(**chat_body("Count from 1 to 9", model["id"], stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
        assert whole.model == model["id"] and whole.choices[0].message.content


def test_it_gives_its_limits(worker):
    status = worker.get("/v1/status")
    assert status["limits"]["context_length"] == json.loads((DEMO / "config.json").read_text())["max_position_embeddings"]
    assert status["memory"]["weight_bytes"] > 1 << 20


def test_another_models_name_is_404(worker):
    error = error_of(worker.chat("Hello", "another"), 404)
    assert "another" in error["message"] and error["code"] == "model_not_found"


def test_its_name_can_be_chosen(launch):
    server = launch(Server, serve(DEMO, "--port", "0", "--served-model-name", "org/tiny"))
    assert [m["id"] for m in server.get("/v1/models")["data"]] == ["org/tiny"]
    assert server.get("/v1/models/org/tiny")["id"] == "org/tiny"
    assert server.chat("Hello", "org/tiny").json()["model"] == "org/tiny"
    assert server.chat("Hello", "tiny").status_code == 404


def test_a_hub_id_is_found_in_hf_home(launch, tmp_path):
    store = tmp_path / "hf/hub/models--some-org--Tiny-Model"
    snapshot = store / "snapshots/0123abcd"
    for path in (snapshot, store / "refs", store / "blobs"):
        path.mkdir(parents=True)
    (store / "refs/main").write_text("0123abcd")
    for i, file in enumerate(sorted(DEMO.iterdir())):
        (store / "blobs" / f"b{i}").symlink_to(file)
        (snapshot / file.name).symlink_to(f"../../blobs/b{i}")
    server = launch(Server, serve("some-org/Tiny-Model", "--port", "0"), {"HF_HOME": str(tmp_path / "hf")})
    assert [m["id"] for m in server.get("/v1/models")["data"]] == ["some-org/Tiny-Model"]
    assert server.chat("Hello", "some-org/Tiny-Model").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(launch, number):
    server = launch(Server, serve(DEMO, "--port", "0"))
    server.signal(number)
    assert server.wait(5) == 0, server.written()


def test_a_signal_ends_it_in_the_middle_of_a_stream(launch):
    server = launch(Server, serve(DEMO, "--port", "0", "--served-model-name", "demo"))
    with Stream(server, **endless()) as stream:
        stream.content()
        server.signal(signal.SIGINT)
        # Requests that run may finish, until a second signal says that it is urgent.
        eventually(lambda: "shutting down" in server.written(), "the first signal is heard", 5)
        server.signal(signal.SIGINT)
        server.wait(10)
        # A reply of 3000 tokens cannot have come to its end.
        assert not stream.rest().looks_finished()


@pytest.mark.parametrize("damage", [models.truncated, models.without_a_tensor, models.with_a_wrong_shape,
                                    models.with_a_wrong_type, models.without_sense])
def test_bad_weights_are_named_before_a_port_is(launch, tmp_path, damage):
    model = models.copy(tmp_path / "model")
    names = damage(model)
    written = fails(launch, model)
    assert "model.safetensors" in written or damage is models.without_a_tensor, written
    assert any(name in written for name in names), (names, written)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(launch, tmp_path, name):
    model = models.copy(tmp_path / "model")
    models.without(model, name)
    # Without any weights there is no telling which file is missing.
    assert name.removeprefix("model.") in fails(launch, model)


def test_a_broken_config_is_named(launch, tmp_path):
    model = models.copy(tmp_path / "model")
    models.own(model, "config.json").write_text('{"model_type": "qwen3_moe",')
    assert "config.json" in fails(launch, model)


def test_an_unknown_architecture_is_named(launch, tmp_path):
    model = models.copy(tmp_path / "model")
    models.with_config(model, model_type="unheard_of", architectures=["UnheardOfForCausalLM"])
    assert "unheard_of" in fails(launch, model).lower()


def test_a_missing_model_is_named(launch, tmp_path):
    assert str(tmp_path / "nothing") in fails(launch, tmp_path / "nothing")
    written = fails(launch, "some-org/nothing", {"HF_HOME": str(tmp_path)})
    assert "some-org/nothing" in written and str(tmp_path) in written


def test_a_port_that_is_taken_is_named(launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert port in fails(launch, DEMO, None, "--port", port)


@pytest.mark.parametrize("arguments, named", [(["--no-such-flag"], "--no-such-flag"), (["--max-num-seqs", "zero"], "zero"),
                                              (["--port", "99999"], "99999"), (["--draft-model", "x"], "speculative")])
def test_bad_arguments_are_named(launch, arguments, named):
    assert named in fails(launch, DEMO, None, *arguments)


def fails(launch, model, env=None, *arguments):
    """Runs a worker that must refuse to start; what it wrote."""
    arguments = arguments or ("--port", "0")
    worker = launch(Program, serve(model, *arguments), env)
    code = worker.wait(30)
    written = worker.written()
    assert code not in (0, 101) and code > 0, f"exit code {code}: {written}"
    assert not re.search(r"http://127\.0\.0\.1:\d", written), f"announced an address:\n{written}"
    assert "panicked" not in written
    return written
