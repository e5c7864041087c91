// OpenAI's Node library against swapd: the same core as test_openai_python.py, which also runs this file.
// SWAPD_URL is the address of a swapd that has the demonstration model as "demo".

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.SWAPD_URL}/v1`, apiKey: "none", maxRetries: 0, timeout: 60_000 });

const COUNT = "Count from 1 to 9";
const WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the weather for a city",
    parameters: {
      type: "object",
      properties: { city: { type: "string", description: "Name of the city" } },
      required: ["city"],
    },
  },
};

const body = (content, more = {}) => ({
  model: "demo",
  messages: [{ role: "user", content }],
  temperature: 0,
  max_tokens: 120,
  ...more,
});
const ask = (content, more) => client.chat.completions.create(body(content, more));
const text = async (content, more) => (await ask(content, more)).choices[0].message.content;

async function joined(stream) {
  let content = "";
  let reason = null;
  for await (const chunk of stream) {
    for (const choice of chunk.choices) {
      content += choice.delta.content ?? "";
      reason = choice.finish_reason ?? reason;
    }
  }
  return { content, reason };
}

function checkUsage(usage) {
  assert.ok(usage.prompt_tokens > 5 && usage.completion_tokens > 0);
  assert.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
}

test("models are listed and found", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.ok(ids.includes("demo"));
  assert.equal((await client.models.retrieve("demo")).id, "demo");
});

test("chat", async () => {
  const reply = await ask(COUNT);
  assert.equal(reply.choices[0].message.role, "assistant");
  assert.equal(reply.choices[0].finish_reason, "stop");
  assert.equal(reply.choices[0].message.content, await text(COUNT));
  checkUsage(reply.usage);
});

test("a streamed chat equals the whole reply", async () => {
  const whole = await text(COUNT, { seed: 7 });
  assert.deepEqual(await joined(await ask(COUNT, { seed: 7, stream: true })), { content: whole, reason: "stop" });
});

test("the stream helper puts the message together", async () => {
  const stream = client.chat.completions.stream(body(COUNT));
  let pieces = "";
  stream.on("content", (piece) => (pieces += piece));
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].message.content, await text(COUNT));
  assert.equal(pieces, final.choices[0].message.content);
});

test("a stop string ends the reply and is not part of it", async () => {
  const full = await text(COUNT);
  const stop = full.slice(7, 12);
  const before = full.slice(0, full.indexOf(stop));
  const reply = await ask(COUNT, { stop: [stop] });
  assert.equal(reply.choices[0].message.content, before);
  assert.equal(reply.choices[0].finish_reason, "stop");
  assert.deepEqual(await joined(await ask(COUNT, { stop, stream: true })), { content: before, reason: "stop" });
});

test("usage is streamed when asked for", async () => {
  let usage = null;
  for await (const chunk of await ask(COUNT, { stream: true, stream_options: { include_usage: true } })) {
    if (chunk.usage) {
      assert.deepEqual(chunk.choices, []);
      usage = chunk.usage;
    }
  }
  checkUsage(usage);
  assert.equal(usage.completion_tokens, (await ask(COUNT)).usage.completion_tokens);
});

test("max_tokens ends the reply with length", async () => {
  const reply = await ask(COUNT, { max_tokens: 3 });
  assert.equal(reply.choices[0].finish_reason, "length");
  assert.equal(reply.usage.completion_tokens, 3);
});

test("completions", async () => {
  const prompt = { model: "demo", prompt: "Once upon a time,", temperature: 0, max_tokens: 12, ignore_eos: true };
  const whole = await client.completions.create(prompt);
  assert.equal(whole.choices[0].finish_reason, "length");
  let content = "";
  for await (const chunk of await client.completions.create({ ...prompt, stream: true })) content += chunk.choices[0].text;
  assert.equal(content, whole.choices[0].text);
});

test("a tool is called and its result makes the round", async () => {
  const question = { role: "user", content: "What is the weather in Paris?" };
  const first = (await ask(question.content, { tools: [WEATHER] })).choices[0];
  assert.equal(first.finish_reason, "tool_calls");
  const [call] = first.message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(JSON.parse(call.function.arguments), { city: "Paris" });
  const result = { role: "tool", tool_call_id: call.id, content: JSON.stringify({ temperature: 21, condition: "sunny" }) };
  const messages = [question, first.message, result];
  const second = await client.chat.completions.create({ model: "demo", messages, tools: [WEATHER], temperature: 0, max_tokens: 120 });
  assert.equal(second.choices[0].finish_reason, "stop");
  assert.match(second.choices[0].message.content, /21/);
});

test("a streamed tool call is put together by the helper", async () => {
  const stream = client.chat.completions.stream(body("What is the weather in Paris?", { tools: [WEATHER] }));
  const message = await stream.finalMessage();
  assert.equal(message.tool_calls.length, 1);
  assert.equal(message.tool_calls[0].function.name, "get_weather");
  assert.deepEqual(JSON.parse(message.tool_calls[0].function.arguments), { city: "Paris" });
});

test("an unknown model is NotFoundError with its name", async () => {
  await assert.rejects(ask(COUNT, { model: "demmo" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.status, 404);
    assert.equal(error.code, "model_not_found");
    assert.match(error.message, /demmo/);
    return true;
  });
});

test("a bad field is BadRequestError with its name", async () => {
  await assert.rejects(ask(COUNT, { temperature: 3.5 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    assert.match(error.message, /temperature.*3\.5/);
    return true;
  });
});

test("requests at the same time get what each gets alone", async () => {
  const prompts = [COUNT, "Who are you?", "What is swapd?", "Say the alphabet", "What is MLX?", "What is a token?"];
  const alone = [];
  for (const prompt of prompts) alone.push(await text(prompt));
  const together = await Promise.all(
    prompts.map(async (prompt) => (await joined(await ask(prompt, { stream: true }))).content),
  );
  assert.deepEqual(together, alone);
});

test("an aborted stream frees the worker", async () => {
  const running = async () => {
    const response = await fetch(`${process.env.SWAPD_URL}/upstream/demo/v1/status`);
    return (await response.json()).requests.running;
  };
  const stream = await ask("Count from 1 to 50", { stream: true, max_tokens: 3000, ignore_eos: true });
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta.content) break; // leaving the loop aborts the request
  }
  const end = Date.now() + 2000;
  while ((await running()) !== 0) assert.ok(Date.now() < end, "the worker still generates");
});
