"""The official OpenAI client for Python against a running server.

WEFT_TEST_URL      the server, without /v1
WEFT_TEST_MODEL    a model name that it serves
WEFT_TEST_API_KEY  its key
Any model with a tokenizer and a chat template will do: what it says does not matter here.
"""

import concurrent.futures
import json
import os
import time
import unittest
import urllib.request

import openai

URL = os.environ["WEFT_TEST_URL"].rstrip("/")
MODEL = os.environ["WEFT_TEST_MODEL"]
KEY = os.environ["WEFT_TEST_API_KEY"]
QUESTION = [{"role": "user", "content": "Say a few words about the sea."}]


def make_client(**options):
    return openai.OpenAI(base_url=URL + "/v1", api_key=KEY, timeout=120, max_retries=0, **options)


def get(path):
    with urllib.request.urlopen(URL + path, timeout=30) as response:
        return response.read().decode()


def post(path, body):
    request = urllib.request.Request(
        URL + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer " + KEY},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def running_requests():
    for line in get("/metrics").splitlines():
        if line.startswith("vllm:num_requests_running{"):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError("no vllm:num_requests_running in /metrics")


class ClientTest(unittest.TestCase):
    def setUp(self):
        self.client = make_client()
        self.addCleanup(self.client.close)

    def complete(self, **fields):
        fields = {"model": MODEL, "prompt": "The sea is", "max_tokens": 8, "temperature": 0} | fields
        return self.client.completions.create(**fields)

    def chat(self, **fields):
        fields = {"model": MODEL, "messages": QUESTION, "max_tokens": 8, "temperature": 0} | fields
        return self.client.chat.completions.create(**fields)


class Completions(ClientTest):
    def test_plain(self):
        answer = self.complete(extra_body={"ignore_eos": True})
        self.assertEqual(answer.object, "text_completion")
        self.assertEqual(answer.model, MODEL)
        self.assertEqual(len(answer.choices), 1)
        self.assertEqual(answer.choices[0].finish_reason, "length")
        self.assertTrue(answer.choices[0].text)
        self.assertEqual(answer.usage.completion_tokens, 8)
        self.assertGreater(answer.usage.prompt_tokens, 1)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + 8)
        self.assertGreaterEqual(answer.usage.prompt_tokens_details.cached_tokens, 0)

    def test_greedy_is_deterministic(self):
        self.assertEqual(self.complete().choices[0].text, self.complete().choices[0].text)

    def test_stream_is_the_same_text(self):
        whole = self.complete(max_tokens=12).choices[0]
        chunks = list(self.complete(max_tokens=12, stream=True, stream_options={"include_usage": True}))
        self.assertEqual("".join(c.choices[0].text for c in chunks if c.choices), whole.text)
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
        self.assertEqual(reasons[-1], whole.finish_reason)
        self.assertEqual(set(reasons[:-1]) - {None}, set())
        self.assertEqual(chunks[-1].choices, [])
        self.assertGreater(chunks[-1].usage.completion_tokens, 0)

    def test_several_prompts_and_choices(self):
        answer = self.complete(prompt=["The sea is", "A mountain"], n=2, max_tokens=4)
        self.assertEqual([c.index for c in answer.choices], [0, 1, 2, 3])
        self.assertEqual(answer.choices[0].text, answer.choices[1].text)

    def test_logprobs(self):
        answer = self.complete(logprobs=3, max_tokens=4, extra_body={"ignore_eos": True})
        logprobs = answer.choices[0].logprobs
        self.assertEqual(len(logprobs.tokens), 4)
        self.assertEqual(len(logprobs.token_logprobs), 4)
        self.assertEqual(logprobs.text_offset[0], 0)
        for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
            self.assertLessEqual(logprob, 0)
            # Greedy: the token is the best of the three.
            self.assertAlmostEqual(top[token], logprob)
            self.assertGreaterEqual(logprob, max(top.values()) - 1e-6)

    def test_stop(self):
        text = self.complete(max_tokens=20, extra_body={"ignore_eos": True}).choices[0].text
        stop = text[3:5]
        choice = self.complete(max_tokens=20, stop=[stop, "never said"], extra_body={"ignore_eos": True}).choices[0]
        self.assertEqual(choice.finish_reason, "stop")
        self.assertEqual(choice.text, text[: text.index(stop)])
        self.assertEqual(choice.stop_reason, stop)

    def test_echo(self):
        self.assertTrue(self.complete(echo=True).choices[0].text.startswith("The sea is"))

    def test_token_ids(self):
        tokens = post("/tokenize", {"model": MODEL, "prompt": "The sea is"})["tokens"]
        by_text = self.complete(extra_body={"return_token_ids": True}).choices[0]
        by_ids = self.complete(prompt=tokens, extra_body={"return_token_ids": True}).choices[0]
        in_body = self.complete(prompt="", extra_body={"prompt": tokens, "return_token_ids": True}).choices[0]
        self.assertEqual(by_text.prompt_token_ids, tokens)
        self.assertEqual(by_ids.text, by_text.text)
        self.assertEqual(in_body.token_ids, by_text.token_ids)
        self.assertEqual(post("/detokenize", {"model": MODEL, "tokens": tokens})["prompt"][-6:], "sea is")

    def test_prompt_logprobs(self):
        tokens = post("/tokenize", {"model": MODEL, "prompt": "The sea is"})["tokens"]
        choice = self.complete(prompt=tokens, extra_body={"prompt_logprobs": 1}).choices[0]
        self.assertEqual(len(choice.prompt_logprobs), len(tokens))
        self.assertIsNone(choice.prompt_logprobs[0])
        for token, position in zip(tokens[1:], choice.prompt_logprobs[1:]):
            self.assertLessEqual(position[str(token)]["logprob"], 0)
            self.assertGreaterEqual(position[str(token)]["rank"], 1)

    def test_seed(self):
        fields = {"temperature": 1, "seed": 7, "max_tokens": 10}
        self.assertEqual(self.complete(**fields).choices[0].text, self.complete(**fields).choices[0].text)

    def test_many_at_once(self):
        expected = self.complete().choices[0].text
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            texts = list(pool.map(lambda _: self.complete().choices[0].text, range(12)))
        self.assertEqual(texts, [expected] * 12)


class Chat(ClientTest):
    def test_plain(self):
        answer = self.chat(extra_body={"ignore_eos": True})
        self.assertEqual(answer.object, "chat.completion")
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertTrue(answer.choices[0].message.content)
        self.assertEqual(answer.choices[0].finish_reason, "length")
        self.assertEqual(answer.usage.completion_tokens, 8)

    def test_stream_is_the_same_text(self):
        whole = self.chat(max_completion_tokens=12).choices[0]
        chunks = list(self.chat(max_completion_tokens=12, stream=True, stream_options={"include_usage": True}))
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        self.assertEqual(text, whole.message.content)
        self.assertEqual([c.choices[0].finish_reason for c in chunks if c.choices][-1], whole.finish_reason)
        self.assertGreater(chunks[-1].usage.prompt_tokens, 1)

    def test_logprobs(self):
        answer = self.chat(logprobs=True, top_logprobs=2, max_tokens=3, extra_body={"ignore_eos": True})
        content = answer.choices[0].logprobs.content
        self.assertEqual(len(content), 3)
        for entry in content:
            self.assertEqual(len(entry.top_logprobs), 2)
            self.assertEqual(entry.top_logprobs[0].token, entry.token)
            self.assertEqual(bytes(entry.bytes).decode(), entry.token)
            self.assertLessEqual(entry.logprob, 0)

    def test_choices(self):
        answer = self.chat(n=2, max_tokens=4)
        self.assertEqual([c.index for c in answer.choices], [0, 1])
        self.assertEqual(answer.choices[0].message.content, answer.choices[1].message.content)

    def test_content_parts(self):
        parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
        self.assertEqual(self.chat(messages=parts).choices[0].message.content, self.chat().choices[0].message.content)

    def test_leaving_a_stream_frees_the_request(self):
        stream = self.chat(max_tokens=1000, stream=True, extra_body={"ignore_eos": True})
        for _, _ in zip(range(3), stream):
            pass
        self.assertGreaterEqual(running_requests(), 1)
        stream.close()
        end = time.monotonic() + 10
        while running_requests() > 0 and time.monotonic() < end:
            time.sleep(0.02)
        self.assertEqual(running_requests(), 0)


class Errors(ClientTest):
    def test_bad_requests_name_the_parameter(self):
        for field, value in {"temperature": -1, "top_p": 0, "max_tokens": 0, "n": 0, "stop": "", "seed": "x"}.items():
            with self.subTest(field=field), self.assertRaises(openai.BadRequestError) as caught:
                self.chat(**{field: value})
            self.assertEqual(caught.exception.param, field)
            self.assertEqual(caught.exception.type, "BadRequestError")
            self.assertIn(field, caught.exception.message)

    def test_a_stream_is_refused_alike(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            self.complete(stream=True, presence_penalty=9)
        self.assertEqual(caught.exception.param, "presence_penalty")

    def test_what_is_not_supported_is_not_ignored(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            self.chat(response_format={"type": "json_object"})
        self.assertEqual(caught.exception.param, "response_format")

    def test_too_long_prompt(self):
        length = self.client.models.list().data[0].max_model_len
        with self.assertRaises(openai.BadRequestError) as caught:
            self.complete(prompt=[1] * (length + 1))
        self.assertIn(str(length), caught.exception.message)
        self.assertIn(str(length + 1), caught.exception.message)

    def test_unknown_model(self):
        with self.assertRaises(openai.NotFoundError) as caught:
            self.chat(model="no-such-model")
        self.assertEqual(caught.exception.param, "model")

    def test_wrong_key(self):
        with openai.OpenAI(base_url=URL + "/v1", api_key="wrong", max_retries=0) as stranger:
            with self.assertRaises(openai.AuthenticationError):
                stranger.models.list()


class Server(ClientTest):
    def test_models(self):
        models = self.client.models.list().data
        self.assertIn(MODEL, [m.id for m in models])
        self.assertGreater(models[0].max_model_len, 0)
        self.assertEqual(self.client.models.retrieve(MODEL).id, MODEL)

    def test_small_routes(self):
        self.assertEqual(get("/health"), "")
        self.assertIn("version", json.loads(get("/version")))
        self.assertIn("server_load", json.loads(get("/load")))
        self.complete()
        metrics = get("/metrics")
        for name in ("num_requests_waiting", "generation_tokens_total", "time_to_first_token_seconds_bucket"):
            self.assertIn("vllm:" + name + "{", metrics)


if __name__ == "__main__":
    unittest.main()
