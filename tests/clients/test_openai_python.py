"""OpenAI's Python library against swapd, with a real worker and the demonstration model behind it."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from harness import Stream, chat_body, endless, error_of, eventually

COUNT = "Count from 1 to 9"
PROMPTS = [COUNT, "Who are you?", "What is swapd?", "Say the alphabet", "What is MLX?", "List the days of the week"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather for a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}
ASK_WEATHER = "What is the weather in Paris?"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client, text, **more):
    return client.chat.completions.create(**chat_body(text, **more))


def joined(chunks):
    """Text and last finish reason of a chat stream."""
    text, reason = "", None
    for chunk in chunks:
        for choice in chunk.choices:
            assert reason is None, "a chunk after the finish reason"
            text += choice.delta.content or ""
            reason = choice.finish_reason
    return text, reason


def test_models_are_listed(client):
    assert [m.id for m in client.models.list()] == ["demo"]


def test_a_model_is_found_by_id_and_by_alias(client):
    assert client.models.retrieve("demo").id == "demo"
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_chat(client):
    reply = ask(client, COUNT)
    assert reply.object == "chat.completion" and reply.id and reply.model == "demo"
    [choice] = reply.choices
    assert choice.message.role == "assistant" and choice.message.content.strip()
    assert choice.finish_reason == "stop"
    # Greedy: the same again.
    assert ask(client, COUNT).choices[0].message.content == choice.message.content


def test_the_model_counts(client):
    assert ask(client, COUNT).choices[0].message.content == "1, 2, 3, 4, 5, 6, 7, 8, 9"


def test_streamed_chat_equals_the_whole_reply(client):
    whole = ask(client, COUNT, seed=7).choices[0]
    chunks = list(ask(client, COUNT, seed=7, stream=True))
    assert joined(chunks) == (whole.message.content, "stop")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {c.object for c in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
    assert sum(bool(c.choices[0].delta.content) for c in chunks) > 3, "not in pieces"


def test_a_seed_makes_sampling_repeatable(client):
    # Hot: kept from ending, the model is sure of how to count on, and four seeds of a cooler draw may agree.
    sampled = {"temperature": 2.0, "top_p": 1.0, "max_tokens": 24, "extra_body": endless() | {"max_tokens": 24, "top_k": 0}}
    texts = {seed: ask(client, COUNT, seed=seed, **sampled).choices[0].message.content for seed in range(4)}
    assert ask(client, COUNT, seed=2, **sampled).choices[0].message.content == texts[2]
    assert len(set(texts.values())) > 1, "the seed has no influence"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_reply_and_is_not_part_of_it(client, stream):
    full = ask(client, COUNT).choices[0].message.content
    assert len(full) >= 12
    # It lies across the borders of tokens, and text that only begins like it comes before.
    stop = full[7:12]
    before = full[:full.index(stop)]
    reply = ask(client, COUNT, stop=["never there", stop], stream=stream)
    got = joined(reply) if stream else (reply.choices[0].message.content, reply.choices[0].finish_reason)
    assert got == (before, "stop")


def check_usage(usage, completion_tokens=None):
    assert usage.prompt_tokens > 5 and usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert completion_tokens in (None, usage.completion_tokens)


def test_usage(client):
    whole = ask(client, COUNT).usage
    check_usage(whole)
    *chunks, last = ask(client, COUNT, stream=True, stream_options={"include_usage": True})
    check_usage(last.usage)
    assert last.choices == [] and all(c.usage is None for c in chunks)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert all(c.usage is None for c in ask(client, COUNT, stream=True)), "not asked for"


def test_max_tokens_ends_the_reply_with_length(client):
    reply = ask(client, COUNT, max_tokens=3)
    assert reply.choices[0].finish_reason == "length"
    check_usage(reply.usage, 3)
    reply = ask(client, COUNT, max_completion_tokens=4, stream=True, stream_options={"include_usage": True})
    *chunks, last = reply
    assert joined(chunks)[1] == "length"
    check_usage(last.usage, 4)


def test_several_choices(client):
    reply = ask(client, COUNT, n=2)
    assert [c.index for c in reply.choices] == [0, 1]
    assert len({c.message.content for c in reply.choices}) == 1, "greedy, so both alike"


class City(BaseModel):
    """What a reply is to be, for the library's own `parse`; the bounds keep a model short that knows nothing of cities."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    size: Literal["small", "large"]
    people: int = Field(ge=0, le=99_999_999)
    rivers: list[Literal["Seine", "Rhine"]] = Field(max_length=2)


# At that heat it might think, and not come to an end with that; and it likes deep indentations.
CALM = {"temperature": 0}
HOT = {"temperature": 1.2, "n": 2, "seed": 11, "max_tokens": 1500, "extra_body": {"enable_thinking": False}}


@pytest.mark.parametrize("more", [CALM, HOT])
def test_a_reply_under_a_schema_is_valid(client, more):
    reply = client.chat.completions.parse(**chat_body("A city?") | more, response_format=City)
    assert len(reply.choices) == more.get("n", 1)
    for choice in reply.choices:
        assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, City)


def test_a_streamed_reply_under_a_schema_equals_the_whole_one(client):
    schema = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": City.model_json_schema()}}
    whole = ask(client, "A city?", response_format=schema).choices[0]
    assert joined(ask(client, "A city?", response_format=schema, stream=True)) == (whole.message.content, "stop")
    City.model_validate_json(whole.message.content)
    # Cut, it is the beginning of one.
    cut = ask(client, "A city?", response_format=schema, max_tokens=5).choices[0]
    assert cut.finish_reason == "length" and whole.message.content.startswith(cut.message.content)


@pytest.mark.parametrize("fields, pattern", [
    ({"guided_choice": ["red", "green"]}, "red|green"), ({"structured_outputs": {"regex": r"[A-F]{3}-\d{2}"}}, r"[A-F]{3}-\d{2}"),
    ({"guided_grammar": 'start: "(" /[a-z]{2,5}/ ")"'}, r"\([a-z]{2,5}\)")])
def test_other_forms_of_replies(client, fields, pattern):
    choice = ask(client, COUNT, extra_body=fields).choices[0]
    assert re.fullmatch(pattern, choice.message.content) and choice.finish_reason == "stop"
    text = client.completions.create(model="demo", prompt="Once", max_tokens=40, extra_body=fields).choices[0].text
    assert re.fullmatch(pattern, text)


def test_forms_and_free_replies_at_the_same_time(client):
    alone = {text: ask(client, text).choices[0].message.content for text in PROMPTS[:3]}
    bound = ({"guided_regex": "[0-9]{40}"}, {"guided_choice": ["yes", "no"]})
    with ThreadPoolExecutor(8) as pool:
        forms = [pool.submit(ask, client, "A number?", extra_body=bound[i % 2]) for i in range(4)]
        free = {text: pool.submit(ask, client, text) for text in alone}
        assert {text: reply.result().choices[0].message.content for text, reply in free.items()} == alone
    for i, form in enumerate(forms):
        assert re.fullmatch(["[0-9]{40}", "yes|no"][i % 2], form.result().choices[0].message.content)


@pytest.mark.parametrize("field, value", [
    ("guided_regex", "a(b"), ("guided_grammar", "start: nothing"), ("guided_json", {"type": "strin"}),
    ("response_format", {"type": "xml"}), ("guided_choice", [])])
def test_a_form_that_makes_no_sense_is_400_and_named(client, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, COUNT, extra_body={field: value})
    assert caught.value.param == field and field in caught.value.message


def test_completions(client):
    prompt = {"model": "demo", "prompt": "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
              "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**prompt)
    assert whole.object == "text_completion" and whole.choices[0].text and whole.choices[0].finish_reason == "length"
    check_usage(whole.usage, 12)
    chunks = list(client.completions.create(stream=True, **prompt))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]


def only_call(message, names=("get_weather",)):
    [call] = message.tool_calls
    assert call.type == "function" and call.id and call.function.name in names
    return json.loads(call.function.arguments)


def test_a_tool_is_called(client):
    reply = ask(client, ASK_WEATHER, tools=[WEATHER]).choices[0]
    assert reply.finish_reason == "tool_calls"
    assert only_call(reply.message) == {"city": "Paris"}
    assert not (reply.message.content or "").strip()


def test_a_streamed_tool_call_equals_the_whole_one(client):
    name, arguments, ids, reasons = "", "", set(), []
    for chunk in ask(client, ASK_WEATHER, tools=[WEATHER], stream=True):
        for choice in chunk.choices:
            assert "<tool_call>" not in (choice.delta.content or "")
            reasons.append(choice.finish_reason)
            for call in choice.delta.tool_calls or []:
                assert call.index == 0
                ids |= {call.id} - {None}
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    assert (name, json.loads(arguments), len(ids)) == ("get_weather", {"city": "Paris"}, 1)
    assert reasons[-1] == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_can_be_forced(client, choice):
    # A greeting says nothing about a city, but a call it must be.
    assert isinstance(only_call(ask(client, "Hello", tools=[WEATHER], tool_choice=choice).choices[0].message), dict)
    reply = ask(client, ASK_WEATHER, tools=[WEATHER], tool_choice=choice).choices[0]
    assert only_call(reply.message) == {"city": "Paris"}


def test_no_call_when_tools_are_not_to_be_used(client):
    reply = ask(client, ASK_WEATHER, tools=[WEATHER], tool_choice="none", max_tokens=60).choices[0]
    assert not reply.message.tool_calls and reply.message.content


def test_a_tools_result_makes_the_round(client):
    messages = [{"role": "user", "content": ASK_WEATHER}]
    call = ask(client, ASK_WEATHER, tools=[WEATHER]).choices[0].message
    messages.append(call.model_dump(exclude_none=True))
    result = json.dumps({"temperature": 21, "condition": "sunny"})
    messages.append({"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": result})
    reply = client.chat.completions.create(model="demo", messages=messages, tools=[WEATHER], temperature=0,
                                           presence_penalty=0, frequency_penalty=0, max_tokens=120).choices[0]
    assert reply.finish_reason == "stop" and not reply.message.tool_calls
    assert "21" in reply.message.content and "sunny" in reply.message.content


def test_an_unknown_model_is_404_and_named(client):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, COUNT, model="demmo")
    error = caught.value
    assert error.status_code == 404 and error.code == "model_not_found"
    assert "demmo" in error.message and "demo" in error.message.replace("demmo", "")


@pytest.mark.parametrize("field, value", [("temperature", 3.5), ("top_p", 0), ("max_tokens", -1), ("n", 0),
                                          ("stop", ""), ("messages", []), ("stream_options", "yes")])
def test_a_bad_field_is_400_and_named(client, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, COUNT, **{field: value})
    error = caught.value
    assert error.status_code == 400 and error.param == field and error.type == "invalid_request_error"
    assert field in error.message and str(value).strip("[]") in error.message


@pytest.mark.parametrize("body", ['{"model": "demo", "messages": [', "hello", "", '{"model": "demo", "messages": [}]}',
                                  '{"model": "demo", "messages": [], "messages" 5}', "[]"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/upstream/demo/v1/chat/completions"])
def test_malformed_json_is_400(server, path, body):
    headers = {"content-type": "application/json"}
    error_of(server.http.post(path, content=body, headers=headers), 400)


def test_a_prompt_that_cannot_fit_is_400_with_the_numbers(server, client):
    limit = server.status()["limits"]["context_length"]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "zebra quux " * limit)
    error = caught.value
    numbers = [int(n) for n in re.findall(r"\d+", error.message)]
    assert error.code == "context_length_exceeded" and limit in numbers and max(numbers) > limit, error.message


def test_unknown_paths_and_methods_are_errors_in_json(server):
    error_of(server.http.get("/v1/chat/completions"), 405)
    error_of(server.http.get("/nothing"), 404)
    error_of(server.http.get("/upstream/demo/v1/nothing"), 404)


def test_requests_at_the_same_time_get_what_each_gets_alone(client):
    alone = [ask(client, p).choices[0].message.content for p in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        replies = pool.map(lambda p: ask(client, p, stream=True), PROMPTS)
        together = list(pool.map(lambda r: joined(r)[0], replies))
    assert together == alone


def test_a_client_that_leaves_frees_the_worker(server, client):
    ask(client, COUNT)
    before = server.status()["engine"]["decode_tokens"]
    with Stream(server, **endless()) as stream:
        stream.content()
        assert server.status()["requests"]["running"] == 1
        assert server.running()["demo"]["inflight"] >= 1
    # 3000 tokens take far longer than this.
    eventually(lambda: server.status()["requests"]["running"] == 0, "the worker's running count drops", 1)
    eventually(lambda: server.running()["demo"]["inflight"] == 0, "the proxy's count drops", 1)
    assert server.status()["engine"]["decode_tokens"] - before < 2500, "generated to the end"
    assert not stream.looks_finished()


def test_a_client_that_leaves_before_the_answer_frees_the_worker(server, client):
    ask(client, COUNT)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=chat_body(COUNT) | endless(),
                   timeout=httpx.Timeout(5, read=0.5), trust_env=False)
    eventually(lambda: server.status()["requests"]["in_flight"] == 0, "the worker's count drops", 1)


def test_the_proxys_own_routes(server, client):
    ask(client, COUNT)
    row = server.running()["demo"]
    assert row["state"] == "ready" and row["pid"] > 0
    assert server.http.get("/health").text == "OK"
    assert server.get("/upstream/demo/health")["status"] == "ok"
    assert "demo" in server.http.get("/logs").text
