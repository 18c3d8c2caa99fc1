#include "weft/engine/llm_engine.h"

#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "weft/core/log.h"
#include "weft/engine/fake_executor.h"
#include "weft/engine/test_tokenizer.h"

namespace weft {
namespace {

constexpr int64_t kVocab = 40;
constexpr int32_t kEos = 0;

PieceVocabulary Vocabulary() {
  PieceVocabulary vocabulary;
  vocabulary.Id("<eos>");
  const std::vector<std::string> letters = {"a", "b", " "};
  for (int32_t i = 1; i < kVocab; ++i) {
    // Different ids, ambiguous texts: "a", "b", ..., "aa", "ab", ...
    const auto n = static_cast<size_t>(i - 1);
    vocabulary.Id(n < 3 ? letters[n] : letters[n % 3] + letters[n / 3 % 3] + std::string(n / 9, 'x'));
  }
  return vocabulary;
}

// Everything that one request gave.
struct Received {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<RequestOutput> outputs;
  int calls_after_end = 0;

  OutputSink Sink() {
    return [this](RequestOutput&& output) {
      const std::lock_guard lock(mutex);
      if (!outputs.empty() && outputs.back().finish_reason) ++calls_after_end;
      outputs.push_back(std::move(output));
      changed.notify_all();
    };
  }
  RequestOutput WaitForEnd() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return !outputs.empty() && outputs.back().finish_reason; });
    return outputs.back();
  }
  void WaitForOutputs(size_t count) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return outputs.size() >= count; });
  }
  std::vector<int32_t> Tokens() {
    const std::lock_guard lock(mutex);
    std::vector<int32_t> tokens;
    for (const auto& o : outputs) tokens.insert(tokens.end(), o.token_ids.begin(), o.token_ids.end());
    return tokens;
  }
  std::string Text() {
    const std::lock_guard lock(mutex);
    std::string text;
    for (const auto& o : outputs) text += o.text;
    return text;
  }
};

struct Rig {
  explicit Rig(LLMEngineOptions options = DefaultOptions(), int64_t num_blocks = 64, int32_t throws_on = -1) {
    auto fake = std::make_unique<FakeExecutor>(num_blocks, kVocab);
    executor = fake.get();
    engine = std::make_unique<LLMEngine>(options, std::move(fake),
                                         std::make_shared<PieceTokenizer>(Vocabulary(), throws_on));
  }
  ~Rig() { executor->Allow(-1); }
  static LLMEngineOptions DefaultOptions() {
    LLMEngineOptions options;
    options.scheduler.max_model_len = 64;
    options.scheduler.max_num_batched_tokens = 16;
    options.scheduler.max_num_seqs = 8;
    options.kv_layout = {4, 1, 2};
    options.vocab_size = kVocab;
    options.eos_token_ids = {kEos};
    return options;
  }
  FakeExecutor* executor = nullptr;
  std::unique_ptr<LLMEngine> engine;
};

EngineRequest Request(std::string id, std::vector<int32_t> prompt = {1, 2, 3}, int32_t max_tokens = 5) {
  EngineRequest request;
  request.id = std::move(id);
  request.prompt_token_ids = std::move(prompt);
  request.params.max_tokens = max_tokens;
  request.params.ignore_eos = true;
  return request;
}

// What the pseudo model and the stop rules make of a request, one token after another.
struct Simulated {
  std::vector<int32_t> tokens;
  FinishReason reason = FinishReason::kLength;
};
Simulated Simulate(const EngineRequest& request, int64_t max_model_len) {
  std::vector<int32_t> all = request.prompt_token_ids;
  Simulated result;
  const SamplingParams& p = request.params;
  while (true) {
    const int32_t token = NextToken(all, kVocab);
    all.push_back(token);
    result.tokens.push_back(token);
    const auto count = static_cast<int32_t>(result.tokens.size());
    const bool stops = std::find(p.stop_token_ids.begin(), p.stop_token_ids.end(), token) != p.stop_token_ids.end();
    if (count >= p.min_tokens && ((token == kEos && !p.ignore_eos) || stops)) {
      result.reason = FinishReason::kStop;
      return result;
    }
    if (count >= p.max_tokens || static_cast<int64_t>(all.size()) >= max_model_len) return result;
  }
}

TEST(LLMEngine, OutputsEqualASimulation) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 rng(seed);
  const auto below = [&](int n) { return std::uniform_int_distribution<int>(0, n - 1)(rng); };
  // 10 virtual blocks of 8 tokens: some two requests at a time, with preemptions.
  LLMEngineOptions options = Rig::DefaultOptions();
  options.priority_scheduling = true;
  Rig rig(options, 10);
  constexpr int kRequests = 300;
  std::vector<Received> received(kRequests);
  std::vector<EngineRequest> requests;
  for (int i = 0; i < kRequests; ++i) {
    EngineRequest request = Request(fmt::format("r{}", i), {}, 1 + below(40));
    for (int n = 1 + below(30); n > 0; --n) request.prompt_token_ids.push_back(below(kVocab));
    request.params.ignore_eos = below(2) == 0;
    if (below(3) == 0) request.params.stop_token_ids = {below(kVocab), below(kVocab)};
    if (below(3) == 0) request.params.min_tokens = below(request.params.max_tokens + 1);
    if (below(3) == 0) request.params.prompt_logprobs = 0;
    request.priority = below(3);
    requests.push_back(request);
    const auto added = rig.engine->Add(request, received[static_cast<size_t>(i)].Sink());
    ASSERT_TRUE(added.has_value()) << added.error().what();
  }
  for (int i = 0; i < kRequests; ++i) {
    const EngineRequest& request = requests[static_cast<size_t>(i)];
    Received& r = received[static_cast<size_t>(i)];
    const RequestOutput last = r.WaitForEnd();
    const Simulated expected = Simulate(request, rig.engine->max_model_len());
    ASSERT_EQ(r.Tokens(), expected.tokens) << "request " << i << last.error;
    ASSERT_EQ(last.finish_reason, expected.reason);
    ASSERT_EQ(last.completion_tokens, static_cast<int32_t>(expected.tokens.size()));
    ASSERT_EQ(last.prompt_tokens, static_cast<int32_t>(request.prompt_token_ids.size()));
    std::vector<int32_t> shown = expected.tokens;
    if (expected.reason == FinishReason::kStop) shown.pop_back();
    ASSERT_EQ(r.Text(), PieceTokenizer(Vocabulary()).Decode(shown, false));
    ASSERT_EQ(r.outputs[0].prompt_logprobs.has_value(), request.params.prompt_logprobs.has_value());
    if (request.params.prompt_logprobs) {
      const auto& logprobs = *r.outputs[0].prompt_logprobs;
      ASSERT_EQ(logprobs.size(), request.prompt_token_ids.size());
      ASSERT_FALSE(logprobs[0].has_value());
      for (size_t p = 1; p < logprobs.size(); ++p) {
        ASSERT_TRUE(logprobs[p].has_value()) << p;
        ASSERT_EQ(logprobs[p]->chosen.token, request.prompt_token_ids[p]);
        ASSERT_EQ(logprobs[p]->chosen.logprob, -static_cast<float>(p));
      }
    }
  }
  rig.engine->Shutdown(60);
  for (Received& r : received) EXPECT_EQ(r.calls_after_end, 0);
  const EngineStats stats = rig.engine->Stats();
  EXPECT_GT(stats.num_preemptions, 0u);
  EXPECT_EQ(stats.kv_cache_usage, 0);
  EXPECT_EQ(stats.num_requests_running + stats.num_requests_waiting, 0);
}

TEST(LLMEngine, StopStringsEndARequest) {
  Rig rig;
  EngineRequest request = Request("a", {1, 2, 3}, 60);
  const std::string full = PieceTokenizer(Vocabulary()).Decode(Simulate(request, 64).tokens, false);
  request.params.stop = {full.substr(5, 4)};
  Received received;
  ASSERT_TRUE(rig.engine->Add(request, received.Sink()));
  const RequestOutput last = received.WaitForEnd();
  EXPECT_EQ(received.Text(), full.substr(0, full.find(request.params.stop[0])));
  EXPECT_EQ(last.finish_reason, FinishReason::kStop);
  EXPECT_EQ(std::get<std::string>(last.stop_reason), request.params.stop[0]);
}

TEST(LLMEngine, AbortEndsARequestAndFreesItsBlocks) {
  Rig rig;
  Received a, b;
  rig.executor->Allow(3);
  ASSERT_TRUE(rig.engine->Add(Request("a", {1}, 60), a.Sink()));
  a.WaitForOutputs(3);
  ASSERT_TRUE(rig.engine->Add(Request("b", {1}, 60), b.Sink()));
  rig.engine->Abort("a");
  rig.engine->Abort("b");
  rig.engine->Abort("nobody");
  rig.executor->Allow(-1);
  EXPECT_EQ(a.WaitForEnd().finish_reason, FinishReason::kAbort);
  EXPECT_EQ(b.WaitForEnd().finish_reason, FinishReason::kAbort);
  EXPECT_GE(a.Tokens().size(), 3u);
  EXPECT_LT(a.Tokens().size(), 6u);
  EXPECT_EQ(rig.engine->Stats().kv_cache_usage, 0);
  EXPECT_EQ(rig.engine->Stats().request_success.at("abort"), 2u);
  Received c;  // the engine goes on
  ASSERT_TRUE(rig.engine->Add(Request("a"), c.Sink()));
  EXPECT_EQ(c.WaitForEnd().finish_reason, FinishReason::kLength);
}

TEST(LLMEngine, SinksMayAddAndAbort) {
  Rig rig;
  Received second, third;
  std::atomic<int> rounds{0};
  ASSERT_TRUE(rig.engine->Add(Request("first"), [&](RequestOutput&& output) {
    if (++rounds == 2) {
      ASSERT_TRUE(rig.engine->Add(Request("third", {4}, 60), third.Sink()));
    }
    if (!output.finish_reason) return;
    // The id is free by now.
    ASSERT_TRUE(rig.engine->Add(Request("first"), second.Sink()));
    rig.engine->Abort("third");
  }));
  EXPECT_EQ(second.WaitForEnd().finish_reason, FinishReason::kLength);
  EXPECT_EQ(third.WaitForEnd().finish_reason, FinishReason::kAbort);
}

TEST(LLMEngine, AFailedExecutorEndsEverything) {
  Rig rig;
  rig.executor->before = [](const StepPlan& plan) {
    if (plan.step == 4) throw Error("rank 1: out of paper", ErrorKind::kInternal);
  };
  Received a, b;
  rig.executor->Allow(0);
  ASSERT_TRUE(rig.engine->Add(Request("a", {1}, 60), a.Sink()));
  ASSERT_TRUE(rig.engine->Add(Request("b", {2}, 60), b.Sink()));
  EXPECT_EQ(rig.engine->Failure(), "");
  rig.executor->Allow(-1);
  for (Received* r : {&a, &b}) {
    const RequestOutput last = r->WaitForEnd();
    EXPECT_EQ(last.finish_reason, FinishReason::kError);
    EXPECT_EQ(last.error_kind, ErrorKind::kInternal);
    EXPECT_NE(last.error.find("rank 1: out of paper"), std::string::npos);
  }
  EXPECT_EQ(rig.engine->Failure(), "rank 1: out of paper");
  const auto refused = rig.engine->Add(Request("c"), [](RequestOutput&&) { FAIL(); });
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().kind(), ErrorKind::kUnavailable);
  EXPECT_EQ(rig.engine->Stats().num_requests_running, 0);
  rig.engine->Shutdown(60);  // returns at once
}

TEST(LLMEngine, ARowsErrorEndsItsRequestAlone) {
  Rig rig;
  rig.executor->after = [](StepOutput& output) {
    for (RowOutput& row : output.rows) {
      if (row.token_id && output.rows.size() == 2 && &row == &output.rows[0]) {
        row.token_id.reset();
        row.error = "NaN in the logits";
      }
    }
  };
  Received a, b;
  rig.executor->Allow(0);
  ASSERT_TRUE(rig.engine->Add(Request("a", {1}), a.Sink()));
  ASSERT_TRUE(rig.engine->Add(Request("b", {2}), b.Sink()));
  rig.executor->Allow(-1);
  const FinishReason reasons[] = {*a.WaitForEnd().finish_reason, *b.WaitForEnd().finish_reason};
  EXPECT_TRUE((reasons[0] == FinishReason::kError && reasons[1] == FinishReason::kLength) ||
              (reasons[1] == FinishReason::kError && reasons[0] == FinishReason::kLength));
  EXPECT_EQ(rig.engine->Failure(), "");
}

TEST(LLMEngine, ATokenThatCannotBeDecodedEndsItsRequestAlone) {
  const std::vector<int32_t> tokens = Simulate(Request("a", {1}, 5), 64).tokens;
  Rig rig(Rig::DefaultOptions(), 64, tokens[2]);
  Received a, b;
  ASSERT_TRUE(rig.engine->Add(Request("a", {1}, 5), a.Sink()));
  EngineRequest unread = Request("b", {1}, 5);
  unread.params.detokenize = false;
  ASSERT_TRUE(rig.engine->Add(unread, b.Sink()));
  EXPECT_EQ(a.WaitForEnd().finish_reason, FinishReason::kError);
  EXPECT_EQ(b.WaitForEnd().finish_reason, FinishReason::kLength);
  EXPECT_EQ(b.Tokens(), tokens);
  EXPECT_EQ(b.Text(), "");
}

TEST(LLMEngine, ASinkThatThrowsLosesItsRequestAlone) {
  Rig rig;
  std::atomic<int> calls{0};
  Received b;
  ASSERT_TRUE(rig.engine->Add(Request("a", {1}, 60), [&](RequestOutput&&) {
    ++calls;
    throw std::runtime_error("client gone");
  }));
  ASSERT_TRUE(rig.engine->Add(Request("b", {2}, 40), b.Sink()));
  EXPECT_EQ(b.WaitForEnd().finish_reason, FinishReason::kLength);
  EXPECT_EQ(calls, 1);
  rig.engine->Shutdown(60);
  EXPECT_EQ(rig.engine->Stats().request_success.at("abort"), 1u);
}

TEST(LLMEngine, RefusesWhatIsWrong) {
  Rig rig;
  const auto refused = [&](const char* param, const std::function<void(EngineRequest&)>& change,
                           const std::vector<std::string>& words = {}) {
    EngineRequest request = Request("x");
    change(request);
    const auto result = rig.engine->Add(request, [](RequestOutput&&) { FAIL(); });
    ASSERT_FALSE(result.has_value()) << param;
    EXPECT_EQ(result.error().kind(), ErrorKind::kInvalidArgument);
    EXPECT_EQ(result.error().param(), param) << result.error().what();
    for (const std::string& word : words) {
      EXPECT_NE(std::string(result.error().what()).find(word), std::string::npos) << result.error().what();
    }
  };
  refused("prompt", [](auto& r) { r.prompt_token_ids.clear(); });
  refused("prompt", [](auto& r) { r.prompt_token_ids = {kVocab}; }, {"40"});
  refused("prompt", [](auto& r) { r.prompt_token_ids = {-1}; }, {"-1"});
  refused("prompt", [](auto& r) { r.prompt_token_ids.assign(64, 1); }, {"64 tokens", "63"});
  refused("request_id", [](auto& r) { r.id.clear(); });
  refused("priority", [](auto& r) { r.priority = 1; });
  refused("max_tokens", [](auto& r) { r.params.max_tokens = 0; });
  refused("min_tokens", [](auto& r) { r.params.min_tokens = 6; });
  refused("temperature", [](auto& r) { r.params.temperature = -1; });
  refused("temperature", [](auto& r) { r.params.temperature = std::numeric_limits<float>::quiet_NaN(); });
  refused("top_p", [](auto& r) { r.params.top_p = 0; });
  refused("top_p", [](auto& r) { r.params.top_p = 1.5; });
  refused("top_k", [](auto& r) { r.params.top_k = -2; });
  refused("min_p", [](auto& r) { r.params.min_p = 2; });
  refused("presence_penalty", [](auto& r) { r.params.presence_penalty = 3; });
  refused("frequency_penalty", [](auto& r) { r.params.frequency_penalty = -3; });
  refused("repetition_penalty", [](auto& r) { r.params.repetition_penalty = 0; });
  refused("logit_bias", [](auto& r) { r.params.logit_bias = {{kVocab, 1.0f}}; });
  refused("logit_bias", [](auto& r) { r.params.logit_bias = {{1, std::numeric_limits<float>::infinity()}}; });
  refused("bad_words", [](auto& r) { r.params.bad_words = {{}}; });
  refused("bad_words", [](auto& r) { r.params.bad_words = {{1, kVocab}}; });
  refused("allowed_token_ids", [](auto& r) { r.params.allowed_token_ids = {-5}; });
  refused("stop_token_ids", [](auto& r) { r.params.stop_token_ids = {kVocab}; });
  refused("stop", [](auto& r) { r.params.stop = {""}; });
  refused("stop", [](auto& r) { r.params.stop = {"\xff"}; });
  refused("stop", [](auto& r) { r.params.stop = {"a"}, r.params.detokenize = false; });
  refused("logprobs", [](auto& r) { r.params.logprobs = 21; }, {"20"});
  refused("logprobs", [](auto& r) { r.params.logprobs = -1; });
  refused("prompt_logprobs", [](auto& r) { r.params.prompt_logprobs = -2; });

  Received a;
  rig.executor->Allow(0);
  ASSERT_TRUE(rig.engine->Add(Request("x"), a.Sink()));
  refused("request_id", [](auto&) {});  // x is running
  rig.executor->Allow(-1);
  a.WaitForEnd();
  ASSERT_TRUE(rig.engine->Add(Request("63", std::vector<int32_t>(63, 1), 100), [](RequestOutput&&) {}));

  Rig small(Rig::DefaultOptions(), 2);  // 16 tokens
  EXPECT_EQ(small.engine->kv_capacity_tokens(), 16);
  const auto result = small.engine->Add(Request("y", std::vector<int32_t>(17, 1)), [](RequestOutput&&) {});
  ASSERT_FALSE(result.has_value());
  EXPECT_EQ(result.error().kind(), ErrorKind::kInvalidArgument);
  EXPECT_NE(std::string(result.error().what()).find("16"), std::string::npos);
}

TEST(LLMEngine, WithoutTokenizer) {
  auto executor = std::make_unique<FakeExecutor>(64, kVocab);
  LLMEngine engine(Rig::DefaultOptions(), std::move(executor), nullptr);
  Received a;
  ASSERT_TRUE(engine.Add(Request("a"), a.Sink()));
  a.WaitForEnd();
  EXPECT_EQ(a.Tokens(), Simulate(Request("a"), 64).tokens);
  EXPECT_EQ(a.Text(), "");
  EngineRequest request = Request("b");
  request.params.stop = {"x"};
  const auto refused = engine.Add(request, a.Sink());
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().param(), "stop");
}

TEST(LLMEngine, QueueLimit) {
  LLMEngineOptions options = Rig::DefaultOptions();
  options.scheduler.max_num_seqs = 2;
  options.max_num_queued_reqs = 3;
  Rig rig(options);
  std::vector<Received> received(6);
  rig.executor->Allow(0);
  // Two may run and three wait, whether the engine has planned a step in between or not.
  for (size_t i = 0; i < 5; ++i) {
    ASSERT_TRUE(rig.engine->Add(Request(fmt::format("r{}", i)), received[i].Sink())) << i;
  }
  const auto refused = rig.engine->Add(Request("r5"), received[5].Sink());
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().kind(), ErrorKind::kUnavailable);
  rig.executor->Allow(-1);
  for (size_t i = 0; i < 5; ++i) received[i].WaitForEnd();
  ASSERT_TRUE(rig.engine->Add(Request("r5"), received[5].Sink()));
  received[5].WaitForEnd();
}

TEST(LLMEngine, ShutdownDrains) {
  Rig rig;
  Received a;
  ASSERT_TRUE(rig.engine->Add(Request("a", {1}, 50), a.Sink()));
  rig.engine->Shutdown(600);
  ASSERT_FALSE(a.outputs.empty());  // the last sink call is over
  EXPECT_EQ(a.outputs.back().finish_reason, FinishReason::kLength);
  const auto refused = rig.engine->Add(Request("b"), a.Sink());
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().kind(), ErrorKind::kUnavailable);
  rig.engine->Shutdown(0);
}

TEST(LLMEngine, ShutdownAbortsWhatIsLate) {
  Rig rig;
  Received a, b;
  rig.executor->Allow(2);
  ASSERT_TRUE(rig.engine->Add(Request("a", {1}, 60), a.Sink()));
  a.WaitForOutputs(2);
  ASSERT_TRUE(rig.engine->Add(Request("b", {1}, 60), b.Sink()));
  std::thread shutdown([&] { rig.engine->Shutdown(0); });
  // The step that hangs ends some time; nothing is planned after it.
  // (A second "c" is refused for its id, too: that is not yet the shutdown.)
  for (;;) {
    const auto added = rig.engine->Add(Request("c"), [](RequestOutput&&) {});
    if (!added && added.error().kind() == ErrorKind::kUnavailable) break;
    std::this_thread::yield();
  }
  rig.executor->Allow(-1);
  shutdown.join();
  EXPECT_EQ(a.outputs.back().finish_reason, FinishReason::kAbort);
  EXPECT_EQ(b.outputs.back().finish_reason, FinishReason::kAbort);
}

TEST(LLMEngine, Statistics) {
  Rig rig;
  std::vector<Received> received(3);
  for (size_t i = 0; i < 3; ++i) {
    ASSERT_TRUE(rig.engine->Add(Request(fmt::format("r{}", i), {1, 2, 3, 4}, 5), received[i].Sink()));
  }
  for (auto& r : received) r.WaitForEnd();
  rig.engine->Shutdown(60);
  const EngineStats stats = rig.engine->Stats();
  EXPECT_EQ(stats.prompt_tokens, 12u);
  EXPECT_EQ(stats.generation_tokens, 15u);
  EXPECT_EQ(stats.request_success.at("length"), 3u);
  EXPECT_EQ(stats.request_success.at("stop"), 0u);
  EXPECT_EQ(stats.kv_tokens_per_shard.size(), 2u);
  EXPECT_EQ(stats.expert_tokens, (std::vector<int64_t>{0, 2, 3}));
  const auto count = [](const Histogram& h) {
    EXPECT_EQ(h.counts.size(), h.bounds.size() + 1);
    EXPECT_TRUE(std::is_sorted(h.bounds.begin(), h.bounds.end()));
    uint64_t sum = 0;
    for (const uint64_t c : h.counts) sum += c;
    return sum;
  };
  EXPECT_EQ(count(stats.time_to_first_token_seconds), 3u);
  EXPECT_EQ(count(stats.inter_token_latency_seconds), 12u);
  EXPECT_EQ(count(stats.e2e_request_latency_seconds), 3u);
  EXPECT_EQ(count(stats.request_queue_time_seconds), 3u);
  EXPECT_EQ(count(stats.request_prefill_time_seconds), 3u);
  EXPECT_EQ(count(stats.request_decode_time_seconds), 3u);
  EXPECT_NEAR(stats.e2e_request_latency_seconds.sum,
              stats.request_queue_time_seconds.sum + stats.request_prefill_time_seconds.sum +
                  stats.request_decode_time_seconds.sum,
              0.1 + 0.5 * stats.e2e_request_latency_seconds.sum);
}

TEST(LLMEngine, TokensFoundInThePrefixCacheAreReported) {
  Rig rig;
  Received first, again, salted;
  ASSERT_TRUE(rig.engine->Add(Request("a", {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 2), first.Sink()));
  first.WaitForEnd();
  EXPECT_EQ(first.outputs.back().cached_tokens, 0);
  ASSERT_TRUE(rig.engine->Add(Request("b", {1, 2, 3, 4, 5, 6, 7, 8, 9, 11}, 2), again.Sink()));
  again.WaitForEnd();
  EXPECT_EQ(again.outputs.back().cached_tokens, 9);
  EXPECT_EQ(again.outputs.back().prompt_tokens, 10);
  EngineRequest other = Request("c", {1, 2, 3, 4, 5, 6, 7, 8, 9, 11}, 2);
  other.cache_salt = "c";
  ASSERT_TRUE(rig.engine->Add(other, salted.Sink()));
  salted.WaitForEnd();
  EXPECT_EQ(salted.outputs.back().cached_tokens, 0);
  EXPECT_EQ(rig.engine->Stats().prefix_cache_queries, 30u);
  EXPECT_EQ(rig.engine->Stats().prefix_cache_hits, 9u);
}

TEST(LLMEngine, ManyThreadsAddAndAbort) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  Rig rig(Rig::DefaultOptions(), 12);
  constexpr int kThreads = 4, kEach = 60;
  std::vector<Received> received(kThreads * kEach);
  std::vector<EngineRequest> requests(kThreads * kEach);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 rng(seed + static_cast<uint32_t>(t));
      for (int i = 0; i < kEach; ++i) {
        const auto at = static_cast<size_t>(t * kEach + i);
        EngineRequest& request = requests[at];
        request = Request(std::to_string(at), {}, 1 + static_cast<int32_t>(rng() % 20));
        for (size_t n = 1 + rng() % 20; n > 0; --n)
          request.prompt_token_ids.push_back(static_cast<int32_t>(rng() % kVocab));
        const auto added = rig.engine->Add(request, received[at].Sink());
        EXPECT_TRUE(added.has_value());
        if (rng() % 3 == 0) rig.engine->Abort(std::to_string(rng() % static_cast<uint32_t>(at + 1)));
        if (rng() % 8 == 0) rig.engine->Stats();
        if (rng() % 8 == 0) received[at].WaitForEnd();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  rig.engine->Shutdown(600);
  int whole = 0;
  for (size_t i = 0; i < received.size(); ++i) {
    const auto& outputs = received[i].outputs;
    ASSERT_FALSE(outputs.empty()) << i;
    ASSERT_TRUE(outputs.back().finish_reason.has_value());
    EXPECT_EQ(received[i].calls_after_end, 0);
    std::vector<int32_t> expected = Simulate(requests[i], 64).tokens;
    const std::vector<int32_t> tokens = received[i].Tokens();
    if (outputs.back().finish_reason == FinishReason::kAbort) {
      expected.resize(std::min(expected.size(), tokens.size()));
    } else {
      ++whole;
    }
    ASSERT_EQ(tokens, expected) << i;
  }
  EXPECT_GT(whole, 0);
  EXPECT_EQ(rig.engine->Stats().kv_cache_usage, 0);
}

}  // namespace
}  // namespace weft
