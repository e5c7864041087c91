"""A prompt begins with one beginning-of-sequence token, whether its template, its tokenizer or both would put it there."""

import json

import pytest

import models
from harness import MLXWORKER, Server

BOS = "<|endoftext|>"


def with_bos(directory, by_template, by_tokenizer):
    """The demonstration model with such a token."""
    model = models.copy(directory)
    path = models.own(model, "tokenizer_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": BOS}))
    if by_template:
        path = models.own(model, "chat_template.jinja")
        path.write_text("{{ bos_token }}" + path.read_text())
    if by_tokenizer:
        path = models.own(model, "tokenizer.json")
        tokenizer = json.loads(path.read_text())
        id = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == BOS)
        first, rest = {"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing", "single": [first, rest],
            "pair": [first, rest, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [id], "tokens": [BOS]}}}
        path.write_text(json.dumps(tokenizer))
    return model


@pytest.fixture
def count(launch):
    """Starts a worker; gives a function from a route and a request to the tokens of its prompt."""
    def start(model):
        server = launch(Server, [MLXWORKER, "serve", model, "--port", "0"])

        def count(path, body):
            response = server.http.post(path, json={"max_tokens": 1} | body)
            assert response.status_code == 200, response.text
            return response.json()["usage"]["prompt_tokens"]
        return count
    return start


CHAT = {"messages": [{"role": "user", "content": "Count from 1 to 9"}]}


def test_a_chat_has_one_whoever_puts_it_there(count, tmp_path):
    plain = count(with_bos(tmp_path / "plain", False, False))("/v1/chat/completions", CHAT)
    for by_template, by_tokenizer in [(True, False), (False, True), (True, True)]:
        asked = count(with_bos(tmp_path / f"{by_template}-{by_tokenizer}", by_template, by_tokenizer))
        # A rendered template is the whole prompt: what the tokenizer would add is the template's to write.
        assert asked("/v1/chat/completions", CHAT) == plain + by_template, (by_template, by_tokenizer)


def test_a_plain_prompt_has_one(count, tmp_path):
    asked = count(with_bos(tmp_path / "both", True, True))
    with_one = asked("/v1/completions", {"prompt": f"{BOS}one two"})
    assert asked("/v1/completions", {"prompt": "one two"}) == with_one
    plain = count(with_bos(tmp_path / "none", False, False))
    assert plain("/v1/completions", {"prompt": "one two"}) == with_one - 1
