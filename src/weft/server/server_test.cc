// Routes, shapes of answers, and errors.
#include <unistd.h>

#include "weft/server/server_test_fixture.h"

namespace weft {
namespace {

const char* const kHi = R"({"prompt": "hi", "max_tokens": 50})";
const char* const kChat = R"({"messages": [{"role": "user", "content": "hi"}]})";

TEST_F(ServerTest, Completion) {
  engine->script = [](const EngineRequest&) { return Script{.text = "Hello, world!", .cached_tokens = 2}; };
  Start();
  const Json body = PostJson("/v1/completions", R"({"model": "model-b", "prompt": "hi", "max_tokens": 50})");
  EXPECT_TRUE(body["id"].get<std::string>().starts_with("cmpl-"));
  EXPECT_EQ(body["object"], "text_completion");
  EXPECT_EQ(body["model"], "model-b");
  EXPECT_TRUE(body["created"].is_number_integer());
  ASSERT_EQ(body["choices"].size(), 1u);
  const Json& choice = body["choices"][0];
  EXPECT_EQ(choice["text"], "Hello, world!");
  EXPECT_EQ(choice["index"], 0);
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_TRUE(choice["stop_reason"].is_null());
  EXPECT_TRUE(choice["logprobs"].is_null());
  EXPECT_TRUE(choice["token_ids"].is_null());
  EXPECT_EQ(body["usage"], Json::parse(R"({"prompt_tokens": 3, "total_tokens": 17, "completion_tokens": 14,
                                           "prompt_tokens_details": {"cached_tokens": 2}})"));
  // What the engine was given.
  ASSERT_EQ(engine->requests().size(), 1u);
  EXPECT_EQ(engine->requests()[0].prompt_token_ids, (std::vector<int32_t>{ByteTokenizer::kBos, 'h', 'i'}));
  EXPECT_EQ(engine->requests()[0].params.max_tokens, 50);
}

TEST_F(ServerTest, CompletionEndsByLengthAndStop) {
  Start();
  EXPECT_EQ(PostJson("/v1/completions", R"({"prompt": "hi", "max_tokens": 4})")["choices"][0]["finish_reason"],
            "length");
  const Json stop = PostJson("/v1/completions", R"({"prompt": "hi", "stop": ["nope", "wor"]})")["choices"][0];
  EXPECT_EQ(stop["text"], "Hello, ");
  EXPECT_EQ(stop["finish_reason"], "stop");
  EXPECT_EQ(stop["stop_reason"], "wor");
  const Json token = PostJson("/v1/completions", R"({"prompt": "hi", "stop_token_ids": [44]})")["choices"][0];
  EXPECT_EQ(token["stop_reason"], 44);
  EXPECT_EQ(token["text"], "Hello,");
}

TEST_F(ServerTest, SeveralPromptsAndChoices) {
  engine->script = [](const EngineRequest& request) {
    // The answer tells the prompt and the seed.
    std::string text(request.prompt_token_ids.begin(), request.prompt_token_ids.end());
    return Script{.text = text + std::to_string(request.params.seed.value_or(0))};
  };
  Start();
  const Json body = PostJson("/v1/completions", R"({"prompt": [[97], [98, 98]], "n": 3, "seed": 5, "priority": 4,
                                                    "cache_salt": "salt"})");
  std::vector<std::string> texts;
  for (size_t i = 0; i < body["choices"].size(); ++i) {
    EXPECT_EQ(body["choices"][i]["index"], i);
    texts.push_back(body["choices"][i]["text"]);
  }
  EXPECT_EQ(texts, (std::vector<std::string>{"a5", "a6", "a7", "bb5", "bb6", "bb7"}));
  // A prompt counts once.
  EXPECT_EQ(body["usage"]["prompt_tokens"], 3);
  EXPECT_EQ(body["usage"]["completion_tokens"], 3 * 3 + 3 * 4);
  EXPECT_EQ(engine->requests()[0].priority, 4);
  EXPECT_EQ(engine->requests()[0].cache_salt, "salt");
}

TEST_F(ServerTest, CompletionLogprobs) {
  engine->script = [](const EngineRequest&) { return Script{.text = "aé"}; };
  Start();
  const Json body = PostJson("/v1/completions", R"({"prompt": "hi", "logprobs": 2})");
  const Json& logprobs = body["choices"][0]["logprobs"];
  // é is two tokens, none of which is a character by itself.
  EXPECT_EQ(logprobs["tokens"], Json::parse(R"(["a", "\ufffd", "\ufffd", "<eos>"])"));
  EXPECT_EQ(logprobs["text_offset"], Json::parse("[0, 1, 2, 3]"));
  EXPECT_EQ(logprobs["token_logprobs"], Json::parse("[-0.25, -0.25, -0.25, -0.25]"));
  EXPECT_EQ(logprobs["top_logprobs"][0], Json::parse(R"({"a": -0.25, "b": -1.25})"));
  EXPECT_EQ(logprobs["top_logprobs"][1], Json::parse(R"({"\ufffd": -0.25})"));  // both alike: the likelier one
  const Json as_ids =
      PostJson("/v1/completions", R"({"prompt": "hi", "logprobs": 0, "return_tokens_as_token_ids": true})");
  EXPECT_EQ(as_ids["choices"][0]["logprobs"]["tokens"][0], "token_id:97");
  EXPECT_EQ(as_ids["choices"][0]["logprobs"]["top_logprobs"][0], Json::parse(R"({"token_id:97": -0.25})"));
}

TEST_F(ServerTest, EchoAndPromptLogprobs) {
  engine->script = [](const EngineRequest&) { return Script{.text = "xyz"}; };
  Start();
  const Json echo = PostJson("/v1/completions", R"({"prompt": "hé", "echo": true, "logprobs": 0, "max_tokens": 2,
                                                    "add_special_tokens": false})")["choices"][0];
  EXPECT_EQ(echo["text"], "héxy");
  EXPECT_EQ(echo["logprobs"]["tokens"], Json::parse(R"(["h", "\ufffd", "\ufffd", "x", "y"])"));
  EXPECT_EQ(echo["logprobs"]["token_logprobs"], Json::parse("[null, -0.25, -0.25, -0.25, -0.25]"));
  EXPECT_EQ(echo["logprobs"]["top_logprobs"][0], nullptr);
  EXPECT_EQ(echo["logprobs"]["text_offset"], Json::parse("[0, 1, 2, 3, 4]"));

  // Scoring a prompt: nothing is generated.
  const Json score =
      PostJson("/v1/completions", R"({"prompt": [104, 105], "echo": true, "logprobs": 1, "max_tokens": 0})");
  EXPECT_EQ(score["choices"][0]["text"], "hi");
  EXPECT_EQ(score["choices"][0]["logprobs"]["tokens"], Json::parse(R"(["h", "i"])"));
  EXPECT_EQ(score["usage"]["completion_tokens"], 0);

  const Json prompt = PostJson("/v1/completions", R"({"prompt": [104, 105, 200], "prompt_logprobs": 1})")["choices"][0];
  EXPECT_EQ(prompt["prompt_logprobs"],
            Json::parse(R"([null, {"105": {"logprob": -0.25, "rank": 1, "decoded_token": "i"}},
                            {"200": {"logprob": -0.25, "rank": 1, "decoded_token": "\ufffd"}}])"));
  EXPECT_EQ(prompt["text"], "xyz");
}

TEST_F(ServerTest, TokenIdsInAnswers) {
  engine->script = [](const EngineRequest&) { return Script{.text = "ab"}; };
  Start();
  const Json choice = PostJson("/v1/completions", R"({"prompt": "hi", "return_token_ids": true})")["choices"][0];
  EXPECT_EQ(choice["prompt_token_ids"], Json::parse("[256, 104, 105]"));
  EXPECT_EQ(choice["token_ids"], Json::parse("[97, 98, 257]"));
  const Json chat =
      PostJson("/v1/chat/completions", R"({"messages": [{"role": "u", "content": ""}], "return_token_ids": true})");
  EXPECT_EQ(chat["prompt_token_ids"].size(), std::string("<u></u><assistant>").size());
  EXPECT_EQ(chat["choices"][0]["token_ids"], Json::parse("[97, 98, 257]"));
}

TEST_F(ServerTest, SamplingParametersReachTheEngine) {
  options.default_sampling.top_k = 11;
  Start();
  PostJson("/v1/completions",
           R"({"prompt": "hi", "temperature": 0.5, "logit_bias": {"97": -5}, "bad_words": ["ab", "c d"],
                                  "min_tokens": 2, "ignore_eos": true, "max_tokens": 3})");
  const SamplingParams p = engine->requests().at(0).params;
  EXPECT_EQ(p.temperature, 0.5f);
  EXPECT_EQ(p.top_k, 11);
  EXPECT_EQ(p.logit_bias, (std::map<int32_t, float>{{97, -5.0f}}));
  // With bytes for tokens the form after a blank is longer, so it is not a second one.
  EXPECT_EQ(p.bad_words, (std::vector<std::vector<int32_t>>{{'a', 'b'}, {'c', ' ', 'd'}}));
  EXPECT_EQ(p.min_tokens, 2);
  EXPECT_TRUE(p.ignore_eos);
}

TEST_F(ServerTest, TruncatedPrompts) {
  Start();
  PostJson("/v1/completions", R"({"prompt": [1, 2, 3, 4], "truncate_prompt_tokens": 2})");
  EXPECT_EQ(engine->requests().back().prompt_token_ids, (std::vector<int32_t>{3, 4}));
  PostJson("/v1/completions", R"({"prompt": [1, 2, 3, 4], "truncate_prompt_tokens": 2, "truncation_side": "right"})");
  EXPECT_EQ(engine->requests().back().prompt_token_ids, (std::vector<int32_t>{1, 2}));
}

TEST_F(ServerTest, Chat) {
  Start();
  const Json body = PostJson("/v1/chat/completions", kChat);
  EXPECT_TRUE(body["id"].get<std::string>().starts_with("chatcmpl-"));
  EXPECT_EQ(body["object"], "chat.completion");
  EXPECT_EQ(body["model"], "model-a");
  const Json& choice = body["choices"][0];
  EXPECT_EQ(choice["message"]["role"], "assistant");
  EXPECT_EQ(choice["message"]["content"], "Hello, world!");
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_EQ(body["usage"]["prompt_tokens"], std::string("<user>hi</user><assistant>").size());
  EXPECT_EQ(body["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
  // All that fits when the client sets no limit.
  EXPECT_EQ(engine->requests()[0].params.max_tokens, 4096 - body["usage"]["prompt_tokens"].get<int>());
}

TEST_F(ServerTest, ChatLogprobs) {
  engine->script = [](const EngineRequest&) { return Script{.text = "é"}; };
  Start();
  const Json body = PostJson("/v1/chat/completions", R"({"messages": [{"role": "user", "content": "hi"}],
      "logprobs": true, "top_logprobs": 2, "max_tokens": 2, "n": 2})");
  ASSERT_EQ(body["choices"].size(), 2u);
  EXPECT_EQ(body["choices"][1]["index"], 1);
  const Json& content = body["choices"][1]["logprobs"]["content"];
  ASSERT_EQ(content.size(), 2u);
  EXPECT_EQ(content[0]["token"], "\ufffd");
  EXPECT_EQ(content[0]["logprob"], -0.25);
  EXPECT_EQ(content[0]["bytes"], Json::parse("[239, 191, 189]"));
  ASSERT_EQ(content[0]["top_logprobs"].size(), 2u);
  EXPECT_EQ(content[0]["top_logprobs"][1]["logprob"], -1.25);
  EXPECT_TRUE(PostJson("/v1/chat/completions", kChat)["choices"][0]["logprobs"].is_null());
}

TEST_F(ServerTest, ChatTemplateInputs) {
  options.chat_template = "server";
  Start();
  const auto prompt = [&](const std::string& fields) {
    PostJson("/v1/chat/completions", R"({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant",
        "content": "so"}], "max_tokens": 1)" +
                                         fields + "}");
    const std::vector<int32_t> tokens = engine->requests().back().prompt_token_ids;
    return std::string(tokens.begin(), tokens.end());
  };
  EXPECT_EQ(prompt(""), "[server]<user>hi</user><assistant>so</assistant><assistant>");
  EXPECT_EQ(prompt(R"(, "chat_template": "mine", "continue_final_message": true)"),
            "[mine]<user>hi</user><assistant>so");
  EXPECT_EQ(
      prompt(R"(, "tools": [{"type": "function", "function": {"name": "f"}}], "chat_template_kwargs": {"b": 1, "a": 2},
                       "documents": [{"text": "d"}], "add_generation_prompt": false)"),
      R"([server][tools [{"type":"function","function":{"name":"f"}}]][kwargs {"b":1,"a":2}])"
      R"([documents [{"text":"d"}]]<user>hi</user><assistant>so</assistant>)");
}

TEST_F(ServerTest, ChatEcho) {
  Start();
  const Json body = PostJson("/v1/chat/completions", R"({"messages": [{"role": "user", "content": "hi"},
      {"role": "assistant", "content": "so: "}], "continue_final_message": true, "echo": true, "max_tokens": 5})");
  EXPECT_EQ(body["choices"][0]["message"]["content"], "so: Hello");
}

TEST_F(ServerTest, Models) {
  Start();
  const TestResponse response = Get("/v1/models");
  EXPECT_EQ(response.headers.at("content-type"), "application/json");
  const Json list = Json::parse(response.body);
  EXPECT_EQ(list["object"], "list");
  ASSERT_EQ(list["data"].size(), 2u);
  EXPECT_EQ(list["data"][1]["id"], "model-b");
  EXPECT_EQ(list["data"][0]["object"], "model");
  EXPECT_EQ(list["data"][0]["max_model_len"], 4096);
  EXPECT_EQ(list["data"][0]["root"], "/models/a");
  EXPECT_EQ(list["data"][0]["permission"].size(), 1u);
  EXPECT_EQ(Json::parse(Get("/v1/models/model%2Db").body)["id"], "model-b");
  EXPECT_EQ(ErrorOf(Get("/v1/models/nope"), 404)["param"], "model");
}

TEST_F(ServerTest, SmallRoutes) {
  options.version = "1.2.3";
  Start();
  EXPECT_EQ(Get("/health").status, 200);
  EXPECT_EQ(Get("/health").body, "");
  EXPECT_EQ(Get("/ping").status, 200);
  EXPECT_EQ(Post("/ping", "").status, 200);
  EXPECT_EQ(Get("/version").body, R"({"version":"1.2.3"})");
  EXPECT_EQ(Get("/load?x=1").body, R"({"server_load":0})");
  engine->SetFailure("rank 1 is stuck");
  EXPECT_NE(ErrorOf(Get("/health"), 503)["message"].get<std::string>().find("rank 1 is stuck"), std::string::npos);
  EXPECT_EQ(Get("/ping").status, 503);
  ErrorOf(Post("/v1/completions", kHi), 503);
}

TEST_F(ServerTest, Metrics) {
  Start();
  PostJson("/v1/completions", kHi);
  const TestResponse response = Get("/metrics");
  EXPECT_TRUE(response.headers.at("content-type").starts_with("text/plain; version=0.0.4"));
  for (const char* line :
       {"# TYPE vllm:num_requests_running gauge", "vllm:num_requests_running{model_name=\"model-a\",engine=\"0\"} 0",
        "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc{", "vllm:prefix_cache_queries_total{",
        "vllm:prefix_cache_hits_total{", "vllm:num_preemptions_total{",
        "vllm:prompt_tokens_total{model_name=\"model-a\",engine=\"0\"} 3",
        "vllm:generation_tokens_total{model_name=\"model-a\",engine=\"0\"} 14",
        "# TYPE vllm:request_success_total counter",
        "vllm:request_success_total{model_name=\"model-a\",engine=\"0\",finished_reason=\"stop\"} 1",
        "vllm:request_success_total{model_name=\"model-a\",engine=\"0\",finished_reason=\"length\"} 0",
        "# TYPE vllm:time_to_first_token_seconds histogram",
        // Buckets are cumulative: 1, 2, 0, 3 above 10 in the engine's counts.
        "vllm:time_to_first_token_seconds_bucket{model_name=\"model-a\",engine=\"0\",le=\"0.1\"} 1",
        "vllm:time_to_first_token_seconds_bucket{model_name=\"model-a\",engine=\"0\",le=\"10\"} 3",
        "vllm:time_to_first_token_seconds_bucket{model_name=\"model-a\",engine=\"0\",le=\"+Inf\"} 6",
        "vllm:time_to_first_token_seconds_count{model_name=\"model-a\",engine=\"0\"} 6",
        "vllm:time_to_first_token_seconds_sum{model_name=\"model-a\",engine=\"0\"} 42.5",
        "vllm:inter_token_latency_seconds_bucket{", "vllm:e2e_request_latency_seconds_bucket{",
        "vllm:request_queue_time_seconds_bucket{", "vllm:request_prefill_time_seconds_bucket{",
        "vllm:request_decode_time_seconds_bucket{",
        "weft:cp_kv_tokens{model_name=\"model-a\",engine=\"0\",shard=\"1\"} 8",
        "weft:expert_tokens_total{model_name=\"model-a\",engine=\"0\",expert=\"0\"} 0",
        "weft:expert_tokens_total{model_name=\"model-a\",engine=\"0\",expert=\"1\"} 1234",
        "# TYPE weft:expert_tokens_total counter",
        "weft:cp_steps_total{model_name=\"model-a\",engine=\"0\",by=\"all\"} 77",
        "weft:cp_query_tokens_total{model_name=\"model-a\",engine=\"0\",exchange=\"gather_kv\"} 4321",
        "weft:cp_query_tokens_total{model_name=\"model-a\",engine=\"0\",exchange=\"gather_q\"} 0"}) {
    EXPECT_NE(response.body.find(line), std::string::npos) << line << "\n" << response.body;
  }
}

TEST_F(ServerTest, Tokenize) {
  Start();
  EXPECT_EQ(PostJson("/tokenize", R"({"prompt": "é"})"),
            Json::parse(R"({"count": 3, "max_model_len": 4096, "tokens": [256, 195, 169], "token_strs": null})"));
  EXPECT_EQ(
      PostJson("/tokenize", R"({"prompt": "a", "add_special_tokens": false, "return_token_strs": true})")["token_strs"],
      Json::parse(R"(["a"])"));
  const Json chat = PostJson("/tokenize", R"({"model": "model-b", "messages": [{"role": "u", "content": "x"}],
                                              "add_generation_prompt": false})");
  EXPECT_EQ(chat["count"], std::string("<u>x</u>").size());
  EXPECT_EQ(PostJson("/detokenize", R"({"tokens": [256, 104, 105]})"), Json::parse(R"({"prompt": "<bos>hi"})"));
  EXPECT_EQ(ErrorOf(Post("/tokenize", "{}"), 400)["param"], "prompt");
  EXPECT_EQ(ErrorOf(Post("/detokenize", R"({"tokens": [999]})"), 400)["param"], "tokens");
  EXPECT_EQ(ErrorOf(Post("/tokenize", R"({"prompt": "a", "model": "x"})"), 404)["param"], "model");
}

TEST_F(ServerTest, BadRequestsAreRefusedByName) {
  Start();
  for (const char* path : {"/v1/completions", "/v1/chat/completions"}) {
    const std::string prompt = std::string(path) == "/v1/completions"
                                   ? R"("prompt": "hi")"
                                   : R"("messages": [{"role": "user", "content": "hi"}])";
    for (const char* field : {"temperature", "top_p", "max_tokens", "n", "seed", "stop", "logit_bias", "stream"}) {
      const Json error = ErrorOf(Post(path, "{" + prompt + ", \"" + field + "\": {\"x\": 1}}"), 400);
      EXPECT_EQ(error["param"], field);
      EXPECT_EQ(error["type"], "BadRequestError");
    }
    EXPECT_TRUE(ErrorOf(Post(path, "{"), 400)["param"].is_null());
    EXPECT_TRUE(ErrorOf(Post(path, "{\"prompt\": \"\xff\"}"), 400)["param"].is_null());
    EXPECT_TRUE(ErrorOf(Post(path, ""), 400)["param"].is_null());
    EXPECT_EQ(ErrorOf(Post(path, "{" + prompt + R"(, "model": "gpt"})"), 404)["param"], "model");
  }
  EXPECT_EQ(
      ErrorOf(Post("/v1/chat/completions", R"({"messages": [{"role": "forbidden", "content": ""}]})"), 400)["message"],
      "the template does not know the role \"forbidden\"");
  EXPECT_TRUE(engine->requests().empty());
}

TEST_F(ServerTest, TooLongPromptsNameBothCounts) {
  Start();
  const Json error = ErrorOf(Post("/v1/completions", R"({"prompt": ")" + std::string(5000, 'x') + R"("})"), 400);
  EXPECT_EQ(error["param"], "prompt");
  EXPECT_NE(error["message"].get<std::string>().find("5001"), std::string::npos) << error["message"];
  EXPECT_NE(error["message"].get<std::string>().find("4096"), std::string::npos) << error["message"];
  EXPECT_EQ(ErrorOf(Post("/v1/chat/completions",
                         R"({"messages": [{"role": "user", "content": ")" + std::string(5000, 'x') + R"("}]})"),
                    400)["param"],
            "messages");
}

TEST_F(ServerTest, ErrorsOfTheEngine) {
  int calls = 0;
  engine->on_add = [&](const EngineRequest& request) -> Result<void> {
    const std::string prompt(request.prompt_token_ids.begin() + 1, request.prompt_token_ids.end());
    if (prompt == "bad") return tl::make_unexpected(Error("no such token", ErrorKind::kInvalidArgument, "prompt"));
    if (prompt == "full") return tl::make_unexpected(Error("the queue is full", ErrorKind::kUnavailable));
    if (prompt == "third" && ++calls == 3)
      return tl::make_unexpected(Error("the queue is full", ErrorKind::kUnavailable));
    return {};
  };
  engine->script = [](const EngineRequest& request) {
    const std::string prompt(request.prompt_token_ids.begin() + 1, request.prompt_token_ids.end());
    return Script{.text = "abc", .fail_after = prompt == "fail" ? 2 : -1, .hang = prompt == "third"};
  };
  options.retry_after_s = 7;
  Start();
  EXPECT_EQ(ErrorOf(Post("/v1/completions", R"({"prompt": "bad"})"), 400)["param"], "prompt");
  const TestResponse full = Post("/v1/completions", R"({"prompt": "full"})");
  EXPECT_EQ(ErrorOf(full, 503)["type"], "ServiceUnavailableError");
  EXPECT_EQ(full.headers.at("retry-after"), "7");
  // The choices that had been taken before the refusal are aborted.
  ErrorOf(Post("/v1/completions", R"({"prompt": "third", "n": 4})"), 503);
  EXPECT_TRUE(engine->WaitAborted(2, 10));
  const Json failed = ErrorOf(Post("/v1/completions", R"({"prompt": "fail"})"), 500);
  EXPECT_EQ(failed["message"], "the fake engine was told to fail");
  EXPECT_EQ(failed["type"], "InternalServerError");
}

TEST_F(ServerTest, ExceptionsBecome500) {
  tokenizer->on_encode = [](std::string_view text) {
    if (text == "boom") throw std::runtime_error("secret detail");
  };
  Start();
  const Json error = ErrorOf(Post("/v1/completions", R"({"prompt": "boom"})"), 500);
  EXPECT_EQ(error["message"].get<std::string>().find("secret"), std::string::npos);
  PostJson("/v1/completions", kHi);
}

TEST_F(ServerTest, PathsAndMethods) {
  Start();
  EXPECT_EQ(ErrorOf(Get("/nope"), 404)["type"], "NotFoundError");
  ErrorOf(Get("/v1/completionsX"), 404);
  ErrorOf(Post("/v1/models/", ""), 404);
  const TestResponse response = Get("/v1/completions");
  ErrorOf(response, 405);
  EXPECT_EQ(response.headers.at("allow"), "POST");
  ErrorOf(Post("/health", "{}"), 405);
}

TEST_F(ServerTest, ApiKeys) {
  options.api_keys = {"first-key", "second"};
  Start();
  for (const char* path : {"/v1/models", "/v1/models/model-a"}) ErrorOf(Get(path), 401);
  for (const char* path : {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"}) {
    const TestResponse response = Post(path, "{}");
    EXPECT_EQ(ErrorOf(response, 401)["type"], "AuthenticationError");
    EXPECT_EQ(response.headers.at("www-authenticate"), "Bearer");
  }
  for (const char* path : {"/health", "/ping", "/version", "/metrics", "/load"})
    EXPECT_EQ(Get(path).status, 200) << path;
  for (const char* key : {"first-key", "second"}) {
    EXPECT_EQ(Connect()->Get("/v1/models", "Authorization: Bearer " + std::string(key) + "\r\n").status, 200) << key;
  }
  EXPECT_EQ(Connect()->Get("/v1/models", "authorization: bearer second\r\n").status, 200);
  for (const char* wrong : {"Bearer first-kex", "Bearer first-ke", "Bearer first-key1", "Bearer secondsecond",
                            "Bearer ", "Bearer", "first-key", "Basic first-key", "Bearer first-key second"}) {
    ErrorOf(Connect()->Get("/v1/models", "Authorization: " + std::string(wrong) + "\r\n"), 401);
  }
}

TEST_F(ServerTest, WithoutTokenizer) {
  with_tokenizer = false;
  Start();
  EXPECT_EQ(ErrorOf(Post("/v1/completions", kHi), 400)["param"], "prompt");
  EXPECT_EQ(ErrorOf(Post("/v1/chat/completions", kChat), 400)["param"], "messages");
  EXPECT_EQ(ErrorOf(Post("/tokenize", R"({"prompt": "a"})"), 400)["param"], "prompt");
  EXPECT_EQ(ErrorOf(Post("/detokenize", R"({"tokens": [97]})"), 400)["param"], "tokens");
  EXPECT_EQ(ErrorOf(Post("/v1/completions", R"({"prompt": [97], "stop": "x"})"), 400)["param"], "stop");
  EXPECT_EQ(ErrorOf(Post("/v1/completions", R"({"prompt": [97], "bad_words": ["x"]})"), 400)["param"], "bad_words");
  const Json choice = PostJson("/v1/completions", R"({"prompt": [97, 98], "max_tokens": 2, "return_token_ids": true,
      "logprobs": 1, "prompt_logprobs": 1})")["choices"][0];
  EXPECT_EQ(choice["text"], "");
  EXPECT_EQ(choice["token_ids"], Json::parse("[72, 101]"));
  EXPECT_EQ(choice["logprobs"]["tokens"], Json::parse(R"(["token_id:72", "token_id:101"])"));
  EXPECT_EQ(choice["prompt_logprobs"][1]["98"]["decoded_token"], nullptr);
  EXPECT_FALSE(engine->requests().back().params.detokenize);
}

TEST_F(ServerTest, Unicode) {
  engine->script = [](const EngineRequest& request) {
    return Script{.text = std::string(request.prompt_token_ids.begin() + 1, request.prompt_token_ids.end())};
  };
  Start();
  const std::string text = "héllo wörld, 你好 😀 \u0001 \"quoted\" \\";
  const Json body = PostJson("/v1/completions", Json{{"prompt", text}, {"max_tokens", 500}}.dump());
  EXPECT_EQ(body["choices"][0]["text"], text);
  std::string streamed;
  for (const Json& event :
       Stream("/v1/completions", Json{{"prompt", text}, {"max_tokens", 500}, {"stream", true}}.dump())) {
    streamed += event["choices"][0]["text"].get<std::string>();
  }
  EXPECT_EQ(streamed, text);
}

TEST_F(ServerTest, RequestIds) {
  Start();
  EXPECT_EQ(Json::parse(Connect()->Post("/v1/completions", kHi, "X-Request-Id: abc\r\n").body)["id"], "cmpl-abc");
  EXPECT_EQ(PostJson("/v1/completions", R"({"prompt": "hi", "request_id": "def"})")["id"], "cmpl-def");
  EXPECT_NE(PostJson("/v1/completions", kHi)["id"], PostJson("/v1/completions", kHi)["id"]);
}

TEST_F(ServerTest, Cors) {
  options.allowed_origins = {"http://ui.test"};
  Start();
  EXPECT_EQ(Connect()->Get("/v1/models", "Origin: http://ui.test\r\n").headers.at("access-control-allow-origin"),
            "http://ui.test");
  EXPECT_FALSE(
      Connect()->Get("/v1/models", "Origin: http://evil.test\r\n").headers.contains("access-control-allow-origin"));
  const auto client = Connect();
  client->Send(
      "OPTIONS /v1/completions HTTP/1.1\r\nHost: t\r\nOrigin: http://ui.test\r\n"
      "Access-Control-Request-Method: POST\r\n\r\n");
  const TestResponse response = client->Read();
  EXPECT_EQ(response.status, 204);
  EXPECT_NE(response.headers.at("access-control-allow-methods").find("POST"), std::string::npos);
  EXPECT_EQ(client->Get("/health").status, 200);  // the connection goes on
}

TEST_F(ServerTest, OptionsThatMakeNoSense) {
  options.served_model_names.clear();
  EXPECT_THROW(Server(options, *engine, tokenizer), Error);
  options.served_model_names = {"m"};
  options.api_keys = {""};
  EXPECT_THROW(Server(options, *engine, tokenizer), Error);
  options.api_keys.clear();
  options.host = "no such host";
  EXPECT_THROW(Start(), Error);
  options.host = "127.0.0.1";
  Start();
  options.port = server->port();
  Server second(options, *engine, tokenizer);
  EXPECT_THROW(second.Start(), Error);  // taken
}

TEST_F(ServerTest, UnixSocket) {
  options.uds = testing::TempDir() + "weft_server_test_" + std::to_string(::getpid()) + ".sock";
  Start();
  TestClient client(options.uds);
  EXPECT_EQ(client.Get("/health").status, 200);
  EXPECT_EQ(Json::parse(client.Post("/v1/completions", kHi).body)["choices"][0]["text"], "Hello, world!");
  server.reset();
  EXPECT_NE(::access(options.uds.c_str(), F_OK), 0);
}

}  // namespace
}  // namespace weft
