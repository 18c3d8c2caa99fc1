// The official OpenAI client for JavaScript against a running server; run by `node --test`. The variables are those of
// test_openai_client.py.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';

import OpenAI from 'openai';

const url = process.env.WEFT_TEST_URL.replace(/\/$/, '');
const model = process.env.WEFT_TEST_MODEL;
const apiKey = process.env.WEFT_TEST_API_KEY;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0, timeout: 120_000 });
const messages = [{ role: 'user', content: 'Say a few words about the sea.' }];

const complete = (fields) =>
  client.completions.create({ model, prompt: 'The sea is', max_tokens: 8, temperature: 0, ...fields });
const chat = (fields) => client.chat.completions.create({ model, messages, max_tokens: 8, temperature: 0, ...fields });

const collect = async (stream) => {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
};

const runningRequests = async () => {
  const text = await (await fetch(`${url}/metrics`)).text();
  return Number(/^vllm:num_requests_running\{.*\} (.*)$/m.exec(text)[1]);
};

test('completion', async () => {
  const answer = await complete({ ignore_eos: true });
  assert.equal(answer.object, 'text_completion');
  assert.equal(answer.choices[0].finish_reason, 'length');
  assert.equal(answer.usage.completion_tokens, 8);
  assert.ok(answer.choices[0].text.length > 0);
});

test('completion streamed', async () => {
  const whole = (await complete({ max_tokens: 12 })).choices[0];
  const chunks = await collect(await complete({ max_tokens: 12, stream: true, stream_options: { include_usage: true } }));
  assert.equal(chunks.map((c) => c.choices[0]?.text ?? '').join(''), whole.text);
  assert.ok(chunks.at(-1).usage.completion_tokens > 0);
});

test('completion with choices, logprobs and a stop string', async () => {
  const answer = await complete({ n: 2, logprobs: 2, max_tokens: 4, ignore_eos: true });
  assert.deepEqual(
    answer.choices.map((c) => c.index),
    [0, 1],
  );
  assert.equal(answer.choices[1].logprobs.tokens.length, 4);
  const text = (await complete({ max_tokens: 20, ignore_eos: true })).choices[0].text;
  const stop = text.slice(3, 5);
  const choice = (await complete({ max_tokens: 20, stop, ignore_eos: true })).choices[0];
  assert.equal(choice.finish_reason, 'stop');
  assert.equal(choice.text, text.slice(0, text.indexOf(stop)));
});

test('prompt as token ids', async () => {
  const response = await fetch(`${url}/tokenize`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json', Authorization: `Bearer ${apiKey}` },
    body: JSON.stringify({ model, prompt: 'The sea is' }),
  });
  const { tokens } = await response.json();
  assert.equal((await complete({ prompt: tokens })).choices[0].text, (await complete({})).choices[0].text);
});

test('chat', async () => {
  const answer = await chat({ logprobs: true, top_logprobs: 1, ignore_eos: true });
  assert.equal(answer.choices[0].message.role, 'assistant');
  assert.ok(answer.choices[0].message.content.length > 0);
  assert.equal(answer.choices[0].logprobs.content.length, 8);
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + 8);
});

test('chat streamed', async () => {
  const whole = (await chat({ max_completion_tokens: 12 })).choices[0];
  const chunks = await collect(await chat({ max_completion_tokens: 12, stream: true }));
  assert.equal(chunks[0].choices[0].delta.role, 'assistant');
  assert.equal(chunks.map((c) => c.choices[0].delta.content ?? '').join(''), whole.message.content);
  assert.equal(chunks.at(-1).choices[0].finish_reason, whole.finish_reason);
});

test('the stream helper puts the chunks together', async () => {
  const runner = client.chat.completions.stream({ model, messages, max_tokens: 12, temperature: 0 });
  const final = await runner.finalChatCompletion();
  assert.equal(final.choices[0].message.content, (await chat({ max_tokens: 12 })).choices[0].message.content);
});

test('leaving a stream frees the request', async () => {
  const stream = await chat({ max_tokens: 1000, stream: true, ignore_eos: true });
  let seen = 0;
  for await (const chunk of stream) {
    assert.ok(chunk.id);
    if (++seen === 3) break;
  }
  for (let i = 0; i < 500 && (await runningRequests()) > 0; ++i) await sleep(20);
  assert.equal(await runningRequests(), 0);
});

test('models', async () => {
  const { data } = await client.models.list();
  assert.ok(data.some((m) => m.id === model));
  assert.equal((await client.models.retrieve(model)).id, model);
});

test('errors', async () => {
  await assert.rejects(chat({ temperature: -1 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, 'temperature');
    return true;
  });
  await assert.rejects(complete({ stream: true, top_p: 2 }), (error) => error.param === 'top_p');
  await assert.rejects(chat({ model: 'no-such-model' }), OpenAI.NotFoundError);
  const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'wrong', maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});
