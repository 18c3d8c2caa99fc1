#include "weft/api/openai_request.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "weft/api/chat_messages.h"
#include "weft/api/error_object.h"
#include "weft/api/json_fields.h"

namespace weft {
namespace {

RequestLimits Limits() {
  RequestLimits limits;
  limits.max_model_len = 100;
  limits.vocab_size = 50;
  return limits;
}

CompletionRequest Good(const std::string& fields, const RequestLimits& limits = Limits()) {
  const std::string body = R"({"prompt": "hi")" + (fields.empty() ? "" : ", " + fields) + "}";
  Result<CompletionRequest> request = ParseCompletionRequest(body, limits);
  if (!request) {
    ADD_FAILURE() << body << " was refused: " << request.error().what();
    return {};
  }
  return *request;
}

ChatCompletionRequest GoodChat(const std::string& fields, const RequestLimits& limits = Limits()) {
  const std::string body =
      R"({"messages": [{"role": "user", "content": "hi"}])" + (fields.empty() ? "" : ", " + fields) + "}";
  Result<ChatCompletionRequest> request = ParseChatCompletionRequest(body, limits);
  if (!request) {
    ADD_FAILURE() << body << " was refused: " << request.error().what();
    return {};
  }
  return *request;
}

// The field that the refusal names; "accepted" when there is none.
std::string Blamed(const std::string& body, const RequestLimits& limits = Limits()) {
  const Result<CompletionRequest> request = ParseCompletionRequest(body, limits);
  if (request) return "accepted";
  EXPECT_EQ(request.error().kind(), ErrorKind::kInvalidArgument);
  // The message names it too, for people who see the message only.
  EXPECT_NE(std::string(request.error().what()).find(request.error().param()), std::string::npos)
      << request.error().what();
  return request.error().param();
}
std::string BlamedChat(const std::string& body, const RequestLimits& limits = Limits()) {
  const Result<ChatCompletionRequest> request = ParseChatCompletionRequest(body, limits);
  return request ? "accepted" : request.error().param();
}
std::string BlamedField(const std::string& field) { return Blamed(R"({"prompt": "hi", )" + field + "}"); }
std::string BlamedChatField(const std::string& field) {
  return BlamedChat(R"({"messages": [{"role": "user", "content": "hi"}], )" + field + "}");
}

TEST(CompletionRequestTest, Defaults) {
  const CompletionRequest request = Good("");
  EXPECT_EQ(std::get<std::string>(request.prompts.at(0)), "hi");
  EXPECT_EQ(request.max_tokens, 16);
  EXPECT_FALSE(request.max_tokens_explicit);
  EXPECT_EQ(request.n, 1);
  EXPECT_FALSE(request.stream);
  EXPECT_TRUE(request.add_special_tokens);
  EXPECT_EQ(request.params.temperature, 1.0f);
  EXPECT_EQ(request.params.top_p, 1.0f);
  EXPECT_EQ(request.params.top_k, 0);
  EXPECT_FALSE(request.params.seed.has_value());
  EXPECT_FALSE(request.params.logprobs.has_value());
  EXPECT_FALSE(request.params.prompt_logprobs.has_value());
  EXPECT_TRUE(request.unknown_fields.empty());
}

TEST(CompletionRequestTest, NullIsAbsent) {
  const CompletionRequest request = Good(
      R"("temperature": null, "max_tokens": null, "stop": null, "logprobs": null, "seed": null, "n": null,
         "logit_bias": null, "stream_options": null, "suffix": null, "best_of": null, "response_format": null,
         "structured_outputs": null, "model": null)");
  EXPECT_EQ(request.max_tokens, 16);
  EXPECT_EQ(request.params.temperature, 1.0f);
}

TEST(CompletionRequestTest, EveryFieldArrives) {
  const CompletionRequest request = Good(R"(
    "model": "m", "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": -2,
    "frequency_penalty": 2, "repetition_penalty": 1.5, "n": 3, "best_of": 3, "max_tokens": 20, "min_tokens": 4,
    "seed": -1, "stop": ["a", "b"], "stop_token_ids": [1, 2], "logit_bias": {"3": -100, "49": 1.5},
    "bad_words": ["x"], "allowed_token_ids": [0, 49], "ignore_eos": true, "skip_special_tokens": false,
    "spaces_between_special_tokens": false, "include_stop_str_in_output": true, "logprobs": 5, "prompt_logprobs": 2,
    "echo": true, "return_token_ids": true, "return_tokens_as_token_ids": true, "priority": -3,
    "add_special_tokens": false, "cache_salt": "s", "truncate_prompt_tokens": 10, "truncation_side": "right",
    "request_id": "r", "user": "u", "response_format": {"type": "text"}, "use_beam_search": false)");
  const SamplingParams& p = request.params;
  EXPECT_EQ(request.model, "m");
  EXPECT_FLOAT_EQ(p.temperature, 0.5f);
  EXPECT_FLOAT_EQ(p.top_p, 0.9f);
  EXPECT_EQ(p.top_k, 7);
  EXPECT_FLOAT_EQ(p.min_p, 0.1f);
  EXPECT_EQ(p.presence_penalty, -2.0f);
  EXPECT_EQ(p.frequency_penalty, 2.0f);
  EXPECT_EQ(p.repetition_penalty, 1.5f);
  EXPECT_EQ(request.n, 3);
  EXPECT_EQ(request.max_tokens, 20);
  EXPECT_TRUE(request.max_tokens_explicit);
  EXPECT_EQ(p.min_tokens, 4);
  EXPECT_EQ(p.seed, UINT64_MAX);
  EXPECT_EQ(p.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(p.stop_token_ids, (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(p.logit_bias, (std::map<int32_t, float>{{3, -100.0f}, {49, 1.5f}}));
  EXPECT_EQ(request.bad_words, std::vector<std::string>{"x"});
  EXPECT_EQ(p.allowed_token_ids, (std::vector<int32_t>{0, 49}));
  EXPECT_TRUE(p.ignore_eos);
  EXPECT_FALSE(p.skip_special_tokens);
  EXPECT_FALSE(p.spaces_between_special_tokens);
  EXPECT_TRUE(p.include_stop_str_in_output);
  EXPECT_EQ(p.logprobs, 5);
  EXPECT_EQ(p.prompt_logprobs, 2);
  EXPECT_TRUE(request.echo);
  EXPECT_TRUE(request.return_token_ids);
  EXPECT_TRUE(request.return_tokens_as_token_ids);
  EXPECT_EQ(request.priority, -3);
  EXPECT_FALSE(request.add_special_tokens);
  EXPECT_EQ(request.cache_salt, "s");
  EXPECT_EQ(request.truncate_prompt_tokens, 10);
  EXPECT_EQ(request.truncation_side, TruncationSide::kRight);
  EXPECT_EQ(request.request_id, "r");
  EXPECT_TRUE(request.unknown_fields.empty()) << request.unknown_fields.front();
}

TEST(CompletionRequestTest, PromptForms) {
  const auto prompts = [](const std::string& json) {
    return ParseCompletionRequest(R"({"prompt": )" + json + "}", Limits())->prompts;
  };
  EXPECT_EQ(prompts(R"(["a", "b"])"), (std::vector<Prompt>{"a", "b"}));
  EXPECT_EQ(prompts("[1, 2]"), (std::vector<Prompt>{std::vector<int32_t>{1, 2}}));
  EXPECT_EQ(prompts("[[1], [2, 3]]"), (std::vector<Prompt>{std::vector<int32_t>{1}, std::vector<int32_t>{2, 3}}));
  EXPECT_EQ(prompts(R"(["a", [2]])"), (std::vector<Prompt>{"a", std::vector<int32_t>{2}}));
  EXPECT_EQ(prompts(R"("\u00e9\ud83d\ude00")"), (std::vector<Prompt>{"é😀"}));
  for (const char* bad : {R"("")", "[]", "[[]]", R"([""])", "5", "{}", "[1.5]", "[-1]", "[50]", R"([1, "a"])", "[null]",
                          "[[1], 2]", "[true]", "null", "[9223372036854775808]"}) {
    EXPECT_EQ(Blamed(std::string(R"({"prompt": )") + bad + "}"), "prompt") << bad;
  }
  EXPECT_EQ(Blamed("{}"), "prompt");
}

TEST(CompletionRequestTest, RangesAndTypesAreRefusedByName) {
  const std::vector<std::pair<std::string, std::vector<std::string>>> cases = {
      {"temperature", {"-0.1", R"("1")", "true", "[]", "1e39"}},
      {"top_p", {"0", "1.01", "-1", R"("x")"}},
      {"top_k", {"-2", "1.5", "3000000000", R"("1")", "true"}},
      {"min_p", {"-0.1", "1.1"}},
      {"presence_penalty", {"-2.1", "2.1"}},
      {"frequency_penalty", {"-2.1", "2.1", "{}"}},
      {"repetition_penalty", {"0", "-1"}},
      {"n", {"0", "-1", "129", "1.5", "false"}},
      {"best_of", {"2", "0"}},
      {"max_tokens", {"0", "-1", "1.5", R"("5")", "true", "99999999999"}},
      {"min_tokens", {"-1", "17", R"("1")"}},
      {"seed", {"1.5", R"("1")", "9223372036854775808", "1e30"}},
      {"stop", {R"("")", R"(["a", ""])", "[1]", "1", "{}"}},
      {"stop_token_ids", {"[-1]", "[50]", "[1.0]", "5", R"(["a"])"}},
      {"logit_bias",
       {R"({"50": 1})", R"({"-1": 1})", R"({"a": 1})", R"({"1": 101})", R"({"1": "x"})", "[]", R"({"": 1})",
        R"({" 1": 1})", R"({"99999999999999999999": 1})"}},
      {"bad_words", {R"([""])", "[1]", R"("a")"}},
      {"allowed_token_ids", {"[]", "[50]"}},
      {"ignore_eos", {"1", R"("true")"}},
      {"skip_special_tokens", {"0"}},
      {"include_stop_str_in_output", {"0"}},
      {"logprobs", {"-1", "21", "true", "1.5"}},
      {"prompt_logprobs", {"-1", "21"}},
      {"echo", {"1"}},
      {"stream", {"1", R"("yes")"}},
      {"stream_options", {"{}", R"({"include_usage": true})", "true"}},
      {"suffix", {R"("x")"}},
      {"response_format",
       {R"({"type": "json_object"})", R"({"type": "json_schema", "json_schema": {}})", "{}", R"("text")"}},
      {"structured_outputs", {R"({"regex": "a"})"}},
      {"guided_json", {"{}"}},
      {"guided_regex", {R"("a")"}},
      {"use_beam_search", {"true"}},
      {"prompt_embeds", {R"("x")"}},
      {"kv_transfer_params", {R"({"do_remote_prefill": true})"}},
      {"model", {"1"}},
      {"priority", {"1.5", "3000000000"}},
      {"cache_salt", {R"("")", "1"}},
      {"truncate_prompt_tokens", {"0", "-2", "101"}},
      {"truncation_side", {R"("middle")"}},
      {"add_special_tokens", {"1"}},
      {"return_token_ids", {"1"}},
  };
  for (const auto& [field, values] : cases) {
    for (const std::string& value : values) {
      EXPECT_EQ(BlamedField("\"" + field + "\": " + value), field) << field << " = " << value;
    }
  }
}

TEST(CompletionRequestTest, EdgesAreAccepted) {
  for (const char* fine : {R"("temperature": 0)",
                           R"("top_p": 1)",
                           R"("top_p": 1e-6)",
                           R"("top_k": -1)",
                           R"("top_k": 0)",
                           R"("min_p": 0)",
                           R"("min_p": 1)",
                           R"("n": 128)",
                           R"("max_tokens": 1)",
                           R"("max_tokens": 5.0)",
                           R"("min_tokens": 16)",
                           R"("seed": -9223372036854775808)",
                           R"("seed": 9223372036854775807)",
                           R"("stop": [])",
                           R"("logprobs": 0)",
                           R"("logprobs": 20)",
                           R"("logit_bias": {})",
                           R"("stream": true, "stream_options": {})",
                           R"("bad_words": [])",
                           R"("guided_choice": [])",
                           R"("truncate_prompt_tokens": -1)"}) {
    EXPECT_EQ(BlamedField(fine), "accepted") << fine;
  }
}

TEST(CompletionRequestTest, LogprobsFollowTheServersLimit) {
  RequestLimits limits = Limits();
  limits.max_logprobs = -1;
  EXPECT_EQ(Good(R"("logprobs": -1)", limits).params.logprobs, -1);
  EXPECT_EQ(Good(R"("logprobs": 50)", limits).params.logprobs, 50);
  EXPECT_EQ(Blamed(R"({"prompt": "hi", "logprobs": 51})", limits), "logprobs");
  limits.max_logprobs = 3;
  EXPECT_EQ(Blamed(R"({"prompt": "hi", "logprobs": 4})", limits), "logprobs");
}

TEST(CompletionRequestTest, Streaming) {
  EXPECT_FALSE(Good(R"("stream": true)").include_usage);
  const CompletionRequest usage = Good(R"("stream": true, "stream_options": {"continuous_usage_stats": true})");
  EXPECT_TRUE(usage.include_usage);
  EXPECT_TRUE(usage.continuous_usage_stats);
  EXPECT_FALSE(Good(R"("stream": true, "stream_options": {"include_usage": false})").include_usage);
  EXPECT_EQ(BlamedField(R"("stream": true, "stream_options": {"include_usage": 1})"), "stream_options");
  EXPECT_EQ(BlamedField(R"("stream": true, "prompt_logprobs": 1)"), "prompt_logprobs");
}

TEST(CompletionRequestTest, EchoAsksForPromptLogprobs) {
  const CompletionRequest request = Good(R"("echo": true, "logprobs": 3, "max_tokens": 0)");
  EXPECT_TRUE(request.prompt_only);
  EXPECT_EQ(request.params.prompt_logprobs, 3);
  EXPECT_FALSE(Good(R"("echo": true)").params.prompt_logprobs.has_value());
  EXPECT_FALSE(Good(R"("logprobs": 3)").params.prompt_logprobs.has_value());
}

TEST(CompletionRequestTest, TooManyChoices) {
  RequestLimits limits = Limits();
  limits.max_prompts = 3;
  limits.max_choices = 5;
  EXPECT_EQ(Blamed(R"({"prompt": ["a", "b", "c", "d"]})", limits), "prompt");
  EXPECT_EQ(Blamed(R"({"prompt": ["a", "b", "c"], "n": 2})", limits), "n");
  EXPECT_EQ(Blamed(R"({"prompt": ["a", "b"], "n": 2})", limits), "accepted");
}

TEST(CompletionRequestTest, DefaultsOfTheServer) {
  RequestLimits limits = Limits();
  limits.defaults.temperature = 0.6f;
  limits.defaults.top_p = 0.95f;
  limits.defaults.top_k = 20;
  limits.defaults.min_p = 0.1f;
  limits.defaults.repetition_penalty = 1.1f;
  const SamplingParams p = Good("", limits).params;
  EXPECT_EQ(p.temperature, 0.6f);
  EXPECT_EQ(p.top_p, 0.95f);
  EXPECT_EQ(p.top_k, 20);
  EXPECT_EQ(p.min_p, 0.1f);
  EXPECT_EQ(p.repetition_penalty, 1.1f);
  EXPECT_EQ(Good(R"("temperature": 0)", limits).params.temperature, 0.0f);
}

TEST(CompletionRequestTest, UnknownFieldsAreReported) {
  EXPECT_EQ(Good(R"("frobnicate": 1, "user": "u")").unknown_fields, std::vector<std::string>{"frobnicate"});
}

TEST(JsonTest, WhatIsNoRequestAtAll) {
  const std::string deep = R"({"prompt": )" + std::string(100000, '[') + std::string(100000, ']') + "}";
  std::string wide = R"({"prompt": "a")";
  for (int i = 0; i < 1100; ++i) wide += ", \"k" + std::to_string(i) + "\": 1";
  wide += "}";
  for (const std::string& body :
       {std::string(), std::string("x"), std::string("[]"), std::string("\"a\""), std::string("{\"prompt\": \"\xff\"}"),
        std::string("{\"prompt\": \"a\xc3\"}"), std::string("{\"prompt\": \"\xed\xa0\x80\"}"),
        std::string(R"({"prompt": "\ud800"})"), std::string(R"({"prompt": "a",})"), std::string(R"({"prompt": 1e999})"),
        std::string("}{"), std::string("{\"prompt\": \"a\"} x"), deep, wide}) {
    const Result<CompletionRequest> request = ParseCompletionRequest(body, Limits());
    ASSERT_FALSE(request) << body.substr(0, 50);
    EXPECT_EQ(request.error().kind(), ErrorKind::kInvalidArgument);
    // The error object is valid JSON whatever was quoted.
    EXPECT_TRUE(Json::accept(ErrorJson(request.error())));
  }
}

TEST(JsonTest, BracketsInStringsDoNotCount) {
  const std::string text(5000, '[');
  EXPECT_EQ(
      std::get<std::string>(ParseCompletionRequest(R"({"prompt": "\")" + text + R"("})", Limits())->prompts.at(0)),
      "\"" + text);
}

TEST(FitMaxTokensTest, BothCountsAreNamed) {
  CompletionRequest request = Good(R"("max_tokens": 60)");
  EXPECT_EQ(FitMaxTokens(request, 40, Limits()), 60);
  const Result<int32_t> too_long = FitMaxTokens(request, 41, Limits());
  ASSERT_FALSE(too_long);
  EXPECT_EQ(too_long.error().param(), "max_tokens");
  for (const char* count : {"60", "41", "100"}) {
    EXPECT_NE(std::string(too_long.error().what()).find(count), std::string::npos) << too_long.error().what();
  }
  const Result<int32_t> no_room = FitMaxTokens(Good(""), 100, Limits());
  ASSERT_FALSE(no_room);
  EXPECT_EQ(no_room.error().param(), "prompt");
  EXPECT_FALSE(FitMaxTokens(GoodChat(""), 123, Limits()));
  EXPECT_EQ(FitMaxTokens(GoodChat(""), 123, Limits()).error().param(), "messages");
}

TEST(FitMaxTokensTest, DefaultsAreCutToWhatFits) {
  EXPECT_EQ(FitMaxTokens(Good(""), 10, Limits()), 16);
  EXPECT_EQ(FitMaxTokens(Good(""), 95, Limits()), 5);
  EXPECT_EQ(FitMaxTokens(GoodChat(""), 10, Limits()), 90);
  RequestLimits limits = Limits();
  limits.defaults.max_tokens = 7;
  EXPECT_EQ(FitMaxTokens(GoodChat("", limits), 10, limits), 7);
  // A prompt that fills the context can still be scored.
  EXPECT_EQ(FitMaxTokens(Good(R"("echo": true, "max_tokens": 0)"), 100, Limits()), 1);
  EXPECT_FALSE(FitMaxTokens(Good(R"("echo": true, "max_tokens": 0)"), 101, Limits()));
  const Result<int32_t> minimum = FitMaxTokens(GoodChat(R"("min_tokens": 20)"), 90, Limits());
  ASSERT_FALSE(minimum);
  EXPECT_EQ(minimum.error().param(), "min_tokens");
}

TEST(ChatRequestTest, Defaults) {
  const ChatCompletionRequest request = GoodChat("");
  EXPECT_EQ(request.chat.messages_json, R"([{"role":"user","content":"hi"}])");
  EXPECT_TRUE(request.chat.add_generation_prompt);
  EXPECT_FALSE(request.chat.continue_final_message);
  EXPECT_FALSE(request.chat.tools_json || request.chat.kwargs_json || request.chat.documents_json);
  EXPECT_FALSE(request.max_tokens.has_value());
  EXPECT_FALSE(request.add_special_tokens);
}

TEST(ChatRequestTest, MaxTokensUnderBothNames) {
  EXPECT_EQ(GoodChat(R"("max_tokens": 3)").max_tokens, 3);
  EXPECT_EQ(GoodChat(R"("max_tokens": 3, "max_completion_tokens": 5)").max_tokens, 5);
  EXPECT_EQ(BlamedChatField(R"("max_completion_tokens": 0)"), "max_completion_tokens");
}

TEST(ChatRequestTest, Logprobs) {
  EXPECT_EQ(GoodChat(R"("logprobs": true)").params.logprobs, 0);
  EXPECT_EQ(GoodChat(R"("logprobs": true, "top_logprobs": 3)").params.logprobs, 3);
  EXPECT_FALSE(GoodChat(R"("logprobs": false, "top_logprobs": 0)").params.logprobs.has_value());
  EXPECT_EQ(BlamedChatField(R"("logprobs": 1)"), "logprobs");
  EXPECT_EQ(BlamedChatField(R"("top_logprobs": 1)"), "top_logprobs");
  EXPECT_EQ(BlamedChatField(R"("logprobs": true, "top_logprobs": 21)"), "top_logprobs");
}

TEST(ChatRequestTest, MessagesAreNormalized) {
  const auto messages = [](const std::string& json) {
    const Result<ChatCompletionRequest> request = ParseChatCompletionRequest(R"({"messages": )" + json + "}", Limits());
    return request ? request->chat.messages_json : "refused: " + request.error().param();
  };
  EXPECT_EQ(
      messages(R"([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])"),
      R"([{"role":"user","content":"a\nb"}])");
  EXPECT_EQ(messages(R"([{"content": null, "role": "assistant", "z": 1, "a": 2}])"),
            R"([{"content":"","role":"assistant","z":1,"a":2}])");  // the order of keys is the client's
  EXPECT_EQ(messages(R"([{"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
                          "function": {"name": "f", "arguments": "{\"z\": 1, \"a\": [2]}"}}]}])"),
            R"([{"role":"assistant","tool_calls":[{"id":"1","type":"function","function":{"name":"f",)"
            R"("arguments":{"z":1,"a":[2]}}}],"content":""}])");
  for (const char* bad :
       {"[]", "5", "null", "[1]", "[{}]", R"([{"role": 1}])", R"([{"role": "user", "content": 5}])",
        R"([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])",
        R"([{"role": "user", "content": [{"type": "text"}]}])", R"([{"role": "user", "content": [5]}])",
        R"([{"role": "assistant", "tool_calls": 1}])", R"([{"role": "assistant", "tool_calls": [{}]}])",
        R"([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}])",
        R"([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}])"}) {
    EXPECT_EQ(messages(bad), "refused: messages") << bad;
  }
}

TEST(ChatRequestTest, ToolsAndToolChoice) {
  const std::string tools =
      R"("tools": [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}])";
  EXPECT_EQ(*GoodChat(tools).chat.tools_json,
            R"([{"type":"function","function":{"name":"f","parameters":{"z":1,"a":2}}}])");
  GoodChat(tools + R"(, "tool_choice": "auto")");
  GoodChat(tools + R"(, "tool_choice": "none")");
  GoodChat(R"("tool_choice": "none")");
  EXPECT_EQ(BlamedChatField(R"("tool_choice": "auto")"), "tool_choice");
  EXPECT_EQ(BlamedChatField(tools + R"(, "tool_choice": "required")"), "tool_choice");
  EXPECT_EQ(BlamedChatField(tools + R"(, "tool_choice": {"type": "function", "function": {"name": "f"}})"),
            "tool_choice");
  EXPECT_EQ(BlamedChatField(tools + R"(, "tool_choice": "sometimes")"), "tool_choice");
  for (const char* bad :
       {"[]", "{}", "[1]", R"([{"type": "function"}])", R"([{"type": "x", "function": {"name": "f"}}])"}) {
    EXPECT_EQ(BlamedChatField(std::string(R"("tools": )") + bad), "tools") << bad;
  }
}

TEST(ChatRequestTest, TemplateInputs) {
  const ChatPrompt chat = GoodChat(R"("chat_template": "T", "chat_template_kwargs": {"enable_thinking": true},
      "reasoning_effort": "none", "documents": [{"title": "t"}], "continue_final_message": true)")
                              .chat;
  EXPECT_EQ(chat.chat_template, "T");
  EXPECT_EQ(*chat.kwargs_json, R"({"enable_thinking":true,"reasoning_effort":"none"})");
  EXPECT_EQ(*chat.documents_json, R"([{"title":"t"}])");
  EXPECT_TRUE(chat.continue_final_message);
  EXPECT_FALSE(chat.add_generation_prompt);
  EXPECT_EQ(BlamedChatField(R"("continue_final_message": true, "add_generation_prompt": true)"),
            "add_generation_prompt");
  EXPECT_EQ(BlamedChatField(R"("documents": ["x"])"), "documents");
  EXPECT_EQ(BlamedChatField(R"("chat_template": 1)"), "chat_template");
  EXPECT_EQ(BlamedChatField(R"("chat_template_kwargs": [])"), "chat_template_kwargs");
  EXPECT_EQ(BlamedChatField(R"("response_format": {"type": "json_schema"})"), "response_format");
  EXPECT_EQ(BlamedChatField(R"("modalities": ["audio"])"), "modalities");
}

TEST(TokenizeRequestTest, BothForms) {
  EXPECT_EQ(std::get<std::string>(ParseTokenizeRequest(R"({"prompt": ""})")->input), "");
  EXPECT_TRUE(ParseTokenizeRequest(R"({"prompt": ""})")->add_special_tokens);
  const Result<TokenizeRequest> chat =
      ParseTokenizeRequest(R"({"messages": [{"role": "user"}], "return_token_strs": true})");
  ASSERT_TRUE(chat);
  EXPECT_TRUE(std::holds_alternative<ChatPrompt>(chat->input));
  EXPECT_FALSE(chat->add_special_tokens);
  EXPECT_TRUE(chat->return_token_strs);
  EXPECT_EQ(ParseTokenizeRequest("{}").error().param(), "prompt");
  EXPECT_EQ(ParseTokenizeRequest(R"({"prompt": [1]})").error().param(), "prompt");
  EXPECT_EQ(ParseDetokenizeRequest(R"({"tokens": [1, 49]})", Limits())->tokens, (std::vector<int32_t>{1, 49}));
  EXPECT_EQ(ParseDetokenizeRequest(R"({"tokens": [50]})", Limits()).error().param(), "tokens");
  EXPECT_EQ(ParseDetokenizeRequest("{}", Limits()).error().param(), "tokens");
}

TEST(ErrorObjectTest, Shape) {
  EXPECT_EQ(ErrorJson(Error("no \"x\"", ErrorKind::kNotFound, "model")),
            R"({"error":{"message":"no \"x\"","type":"NotFoundError","param":"model","code":404}})");
  EXPECT_EQ(ErrorJson(401, "k"), R"({"error":{"message":"k","type":"AuthenticationError","param":null,"code":401}})");
}

}  // namespace
}  // namespace weft
