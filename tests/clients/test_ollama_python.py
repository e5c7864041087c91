"""Ollama's own Python library against swapd, with a real worker and the demonstration model behind it."""

import json

import ollama
import pytest

from harness import DEMO, demo, endless, eventually

COUNT = "Count from 1 to 9"
GREEDY = {"temperature": 0, "num_predict": 120}


def ask(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def client(server):
    return ollama.Client(host=server.url, timeout=60, trust_env=False)


def test_a_chat_says_what_openais_route_says(server, client):
    expected = server.chat(COUNT).json()
    reply = client.chat(model="demo", messages=ask(COUNT), options=GREEDY)
    assert reply.message.role == "assistant"
    assert reply.message.content == expected["choices"][0]["message"]["content"]
    assert (reply.done, reply.done_reason) == (True, "stop")
    assert reply.prompt_eval_count == expected["usage"]["prompt_tokens"]
    assert reply.eval_count == expected["usage"]["completion_tokens"]
    assert 0 < reply.eval_duration <= reply.total_duration < 60e9


def test_streamed_it_is_the_same_in_pieces(client):
    whole = client.chat(model="tiny:latest", messages=ask(COUNT), options=GREEDY)
    pieces = list(client.chat(model="tiny:latest", messages=ask(COUNT), options=GREEDY, stream=True))
    assert len(pieces) > 5
    assert "".join(p.message.content for p in pieces) == whole.message.content
    assert [p.done for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (pieces[-1].eval_count, pieces[-1].model) == (whole.eval_count, "tiny:latest")


def test_a_prompt_is_a_conversation_of_one_unless_it_is_raw(client):
    chat = client.chat(model="demo", messages=ask(COUNT), options=GREEDY)
    assert client.generate(model="demo", prompt=COUNT, options=GREEDY).response == chat.message.content
    raw = client.generate(model="demo", prompt="Count from", raw=True, options=GREEDY)
    assert raw.prompt_eval_count < chat.prompt_eval_count
    assert raw.response != chat.message.content


def test_options_are_obeyed(client):
    short = client.chat(model="demo", messages=ask(COUNT), options={"temperature": 0, "num_predict": 3})
    assert (short.done_reason, short.eval_count) == ("length", 3)
    whole = client.chat(model="demo", messages=ask(COUNT), options=GREEDY).message.content
    stop = whole[len(whole) // 2]
    stopped = client.chat(model="demo", messages=ask(COUNT), options=GREEDY | {"stop": [stop]})
    assert stopped.message.content == whole[:whole.index(stop)]
    wild = {"temperature": 2, "top_k": 0, "top_p": 1, "num_predict": 24, "logit_bias": endless()["logit_bias"]}
    warm = [client.generate(model="demo", prompt=COUNT, options=wild | {"seed": seed}).response for seed in (1, 1, 2, 3, 4)]
    assert warm[0] == warm[1] and len(set(warm)) > 1


def test_tools_are_called_and_answered(client):
    def get_weather(city: str) -> str:
        """Get the weather for a city.

        Args:
            city: Name of the city
        """
        return f"sunny in {city}"

    question = ask("What is the weather in Paris?")
    reply = client.chat(model="demo", messages=question, tools=[get_weather], options=GREEDY)
    [call] = reply.message.tool_calls
    assert call.function.name == "get_weather"
    assert call.function.arguments == {"city": "Paris"}
    answer = {"role": "tool", "tool_name": "get_weather", "content": get_weather(**call.function.arguments)}
    after = client.chat(model="demo", messages=[*question, reply.message, answer], tools=[get_weather], options=GREEDY)
    assert after.message.content and not after.message.tool_calls
    streamed = list(client.chat(model="demo", messages=question, tools=[get_weather], options=GREEDY, stream=True))
    assert [c.function.arguments for p in streamed for c in p.message.tool_calls or []] == [{"city": "Paris"}]


def test_a_format_is_kept_to(client):
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}, "size": {"type": "integer", "maximum": 9}},
              "required": ["city", "size"], "additionalProperties": False}
    reply = json.loads(client.chat(model="demo", messages=ask("A city?"), options=GREEDY, format=schema).message.content)
    assert set(reply) == {"city", "size"} and reply["city"] in ("Paris", "Rome") and reply["size"] <= 9
    pieces = client.generate(model="demo", prompt="A city?", options=GREEDY | {"num_predict": 6}, format="json", stream=True)
    assert "".join(piece.response for piece in pieces).startswith("{")


def test_models_are_listed_and_shown(client):
    [model] = client.list().models
    size = sum(f.stat().st_size for f in DEMO.glob("*.safetensors"))
    assert (model.model, model.size, model.details.family) == ("demo", size, "qwen3_moe")
    assert model.modified_at and model.digest
    shown = client.show("tiny")
    assert {"completion", "tools"} <= set(shown.capabilities)
    assert shown.modelinfo["general.architecture"] == "qwen3_moe" and "{%" in shown.template


def test_errors_are_those_that_the_library_knows(client):
    with pytest.raises(ollama.ResponseError) as unknown:
        client.chat(model="nothing", messages=ask("x"))
    assert unknown.value.status_code == 404 and "not found" in unknown.value.error
    with pytest.raises(ollama.ResponseError) as streamed:
        list(client.chat(model="nothing", messages=ask("x"), stream=True))
    assert streamed.value.status_code == 404
    # The worker reads text only, and says so.
    with pytest.raises(ollama.ResponseError) as image:
        client.chat(model="demo", messages=[{"role": "user", "content": "what?", "images": ["iVBORw0KGgo="]}])
    assert image.value.status_code == 400 and "text only" in image.value.error
    with pytest.raises(ollama.ResponseError) as pull:
        client.pull("demo")
    assert pull.value.status_code == 501


def test_keep_alive_decides_how_long_a_model_stays(start_swapd):
    swapd = start_swapd({"models": {"demo": demo()}, "ollama": {"listen": "127.0.0.1:0"}})
    own = eventually(lambda: [l for l in swapd.written().splitlines() if "clients of Ollama" in l], "its own port", 5)
    client = ollama.Client(host=own[0].split()[-1], timeout=60, trust_env=False)
    assert client.ps().models == []
    loaded = client.generate(model="demo", keep_alive="1h")
    assert loaded.done_reason == "load"
    [row] = client.ps().models
    assert (row.model, row.context_length) == ("demo", client.show("demo").modelinfo["qwen3_moe.context_length"])
    assert row.size_vram > 0 and row.expires_at
    client.chat(model="demo", messages=ask(COUNT), options=GREEDY, keep_alive=0)
    eventually(lambda: client.ps().models == [] and not swapd.left(), "unloaded after its last request", 10)
    assert client.generate(model="demo", keep_alive=0).done_reason == "unload"
