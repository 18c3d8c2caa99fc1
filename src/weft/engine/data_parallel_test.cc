#include "weft/engine/data_parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <numeric>
#include <random>
#include <thread>

#include "weft/engine/fake_executor.h"

namespace weft {
namespace {

constexpr int64_t kVocab = 1 << 20;  // so that random tokens hardly ever begin alike

using Tokens = std::vector<int32_t>;

Tokens RandomTokens(int64_t n, std::mt19937_64& rng) {
  Tokens tokens(static_cast<size_t>(n));
  for (int32_t& token : tokens) token = std::uniform_int_distribution<int32_t>(0, kVocab - 1)(rng);
  return tokens;
}

// The end of one request, however it comes.
struct Ending {
  std::mutex mutex;
  std::condition_variable changed;
  Tokens tokens;
  std::optional<RequestOutput> last;
  int ends = 0;

  OutputSink Sink() {
    return [this](RequestOutput&& output) {
      const std::lock_guard lock(mutex);
      tokens.insert(tokens.end(), output.token_ids.begin(), output.token_ids.end());
      if (!output.finish_reason) return;
      last = std::move(output);
      ++ends;
      changed.notify_all();
    };
  }
  RequestOutput Wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return last.has_value(); });
    return *last;
  }
};

struct Rig {
  explicit Rig(size_t replicas, int64_t num_blocks = 512, int64_t max_queued = 0, int64_t max_seqs = 8) {
    std::vector<std::unique_ptr<LLMEngine>> engines;
    for (size_t i = 0; i < replicas; ++i) {
      LLMEngineOptions options;
      options.scheduler.max_model_len = 4096;
      options.scheduler.max_num_batched_tokens = 4096;
      options.scheduler.max_num_seqs = max_seqs;
      options.kv_layout = {8, 1, 2};
      options.vocab_size = kVocab;
      options.max_num_queued_reqs = max_queued;
      auto fake = std::make_unique<FakeExecutor>(num_blocks, kVocab);
      executors.push_back(fake.get());
      engines.push_back(std::make_unique<LLMEngine>(options, std::move(fake), nullptr));
    }
    engine = std::make_unique<DataParallelEngine>(std::move(engines));
  }
  ~Rig() {
    for (FakeExecutor* executor : executors) executor->Allow(-1);
  }
  EngineRequest Request(Tokens prompt, int32_t max_tokens = 2, std::string salt = "") {
    EngineRequest request;
    request.id = fmt::format("r{}", next_id++);
    request.prompt_token_ids = std::move(prompt);
    request.params.max_tokens = max_tokens;
    request.params.ignore_eos = true;
    request.cache_salt = std::move(salt);
    return request;
  }
  RequestOutput Run(Tokens prompt, const std::string& salt = "") {
    Ending ending;
    EXPECT_TRUE(engine->Add(Request(std::move(prompt), 2, salt), ending.Sink()));
    return ending.Wait();
  }
  // Adds a request that goes on until the replicas may execute, or it is aborted.
  Ending& Start(EngineRequest request) {
    Ending& ending = *endings.emplace_back(std::make_unique<Ending>());
    const auto added = engine->Add(std::move(request), ending.Sink());
    EXPECT_TRUE(added) << added.error().what();
    return ending;
  }
  void Allow(int64_t steps) {
    for (FakeExecutor* executor : executors) executor->Allow(steps);
  }
  // Requests that each replica has now.
  std::vector<int64_t> Live() const {
    std::vector<int64_t> live;
    for (const EngineStats& s : engine->StatsByReplica()) {
      live.push_back(s.num_requests_running + s.num_requests_waiting);
    }
    return live;
  }
  // Requests that each replica has ever answered.
  std::vector<uint64_t> Answered() const {
    std::vector<uint64_t> answered;
    for (const EngineStats& s : engine->StatsByReplica()) {
      uint64_t sum = 0;
      for (const auto& [reason, count] : s.request_success) sum += count;
      answered.push_back(sum);
    }
    return answered;
  }

  std::vector<FakeExecutor*> executors;
  std::vector<std::unique_ptr<Ending>> endings;
  std::unique_ptr<DataParallelEngine> engine;
  std::atomic<int> next_id{0};
};

std::mt19937_64 FreshRng() {
  const uint64_t seed = std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  return std::mt19937_64(seed);
}

TEST(ChooseReplica, TheLongestPrefixUnlessItsReplicaIsOverloaded) {
  const auto choose = [](std::vector<SchedulerProspect> prospects, size_t turn = 0) {
    return ChooseReplica(prospects, turn);
  };
  EXPECT_EQ(choose({{.cached_tokens = 10}, {.cached_tokens = 30}, {.cached_tokens = 20}}), 1u);
  // As much ahead as the prefix spares: still there. More: overloaded.
  EXPECT_EQ(choose({{.tokens_ahead = 5}, {.cached_tokens = 100, .tokens_ahead = 105}}), 1u);
  EXPECT_EQ(choose({{.tokens_ahead = 5}, {.cached_tokens = 100, .tokens_ahead = 106}}), 0u);
  // Requests that are decoding count, too.
  EXPECT_EQ(choose({{.cached_tokens = 3 * kRequestTokens, .requests = 3}, {}}), 0u);
  EXPECT_EQ(choose({{.cached_tokens = 3 * kRequestTokens, .requests = 4}, {}}), 1u);
  // Both are overloaded for the third.
  EXPECT_EQ(choose({{.cached_tokens = 8, .tokens_ahead = 900}, {.cached_tokens = 9, .tokens_ahead = 900}, {}}), 2u);
}

TEST(ChooseReplica, TheLeastLoadedAndThenInTurn) {
  const auto choose = [](std::vector<SchedulerProspect> prospects, size_t turn) {
    return ChooseReplica(prospects, turn);
  };
  for (size_t turn = 0; turn < 3; ++turn) {
    EXPECT_EQ(choose({{}, {}, {}}, turn), turn);
    EXPECT_EQ(choose({{.requests = 2}, {.requests = 1}, {.requests = 2}}, turn), 1u);
    EXPECT_EQ(choose({{.tokens_ahead = 300}, {.requests = 1}, {.tokens_ahead = 300}}, turn), 1u);
  }
}

TEST(ChooseReplica, NotWhereTheRequestWouldWaitForOthersToEnd) {
  const auto choose = [](std::vector<SchedulerProspect> prospects) { return ChooseReplica(prospects, 0); };
  EXPECT_EQ(choose({{.cached_tokens = 5000, .must_wait = true}, {.tokens_ahead = 20000}}), 1u);
  EXPECT_EQ(choose({{.cached_tokens = 50, .must_wait = true}, {.must_wait = true}}), 0u);
}

TEST(DataParallel, ConversationsStayWhereTheirPrefixIs) {
  auto rng = FreshRng();
  Rig rig(3);
  // Several conversations at once, each turn behind the tokens of the one before.
  std::vector<Tokens> conversations;
  for (int i = 0; i < 7; ++i) conversations.push_back(RandomTokens(64, rng));
  for (const Tokens& c : conversations) EXPECT_EQ(rig.Run(c).cached_tokens, 0);
  for (int turn = 0; turn < 5; ++turn) {
    for (Tokens& c : conversations) {
      const auto known = static_cast<int32_t>(c.size());
      const Tokens more = RandomTokens(32, rng);
      c.insert(c.end(), more.begin(), more.end());
      EXPECT_GE(rig.Run(c).cached_tokens, known);
    }
  }
  for (const uint64_t answered : rig.Answered()) EXPECT_GE(answered, 2u * 6);  // 7 conversations in turn
  // The same tokens under another salt are others'.
  EXPECT_EQ(rig.Run(conversations[0], "salt").cached_tokens, 0);
}

TEST(DataParallel, ABurstWithACommonPrefixIsSpread) {
  auto rng = FreshRng();
  Rig rig(4, 512, 0, 64);
  const Tokens common = RandomTokens(48, rng);
  rig.Run(common);
  rig.Allow(0);
  for (int i = 0; i < 40; ++i) {
    Tokens prompt = common;
    const Tokens own = RandomTokens(16, rng);
    prompt.insert(prompt.end(), own.begin(), own.end());
    rig.Start(rig.Request(prompt));
  }
  // Nearly evenly: what is known of the prefix makes a request somewhat lighter.
  for (const int64_t live : rig.Live()) {
    EXPECT_GE(live, 8);
    EXPECT_LE(live, 12);
  }
  rig.Allow(-1);
  for (auto& ending : rig.endings) EXPECT_EQ(ending->Wait().finish_reason, FinishReason::kLength);
}

TEST(DataParallel, ALongPrefixIsWorthSomeWaiting) {
  auto rng = FreshRng();
  Rig rig(2, 1024, 0, 64);
  const Tokens history = RandomTokens(3000, rng);
  rig.Run(history);
  const auto home = static_cast<size_t>(rig.Answered()[1] > 0);
  rig.Allow(0);
  rig.Start(rig.Request(RandomTokens(700, rng), 50));
  rig.Start(rig.Request(RandomTokens(700, rng), 50));
  ASSERT_EQ(rig.Live(), (std::vector<int64_t>{1, 1}));
  for (int i = 0; i < 5; ++i) rig.Start(rig.Request(history, 50));
  EXPECT_EQ(rig.Live()[home], 6);
  // The other replica would have it computed by the time that this one comes to it.
  rig.Start(rig.Request(RandomTokens(3900, rng), 50));
  EXPECT_EQ(rig.Live()[1 - home], 2);
}

TEST(DataParallel, FullReplicasAreLeftAlone) {
  auto rng = FreshRng();
  Rig rig(2, 10);  // 160 tokens of KV cache
  const Tokens prompt = RandomTokens(100, rng);
  rig.Run(prompt);
  const auto home = static_cast<size_t>(rig.Answered()[1] > 0);
  rig.Allow(0);
  rig.Start(rig.Request(prompt));  // where its prefix is
  ASSERT_EQ(rig.Live()[home], 1);
  // The prefix is there, but no room for what follows.
  Tokens longer = prompt;
  longer.resize(152, 1);
  rig.Start(rig.Request(longer));
  EXPECT_EQ(rig.Live(), (std::vector<int64_t>{1, 1}));
  rig.Allow(-1);
  for (auto& ending : rig.endings) EXPECT_EQ(ending->Wait().finish_reason, FinishReason::kLength);
}

TEST(DataParallel, AFullQueueIsNoReasonWhileAnotherHasRoom) {
  auto rng = FreshRng();
  Rig rig(2, 512, 1, 2);  // two run, one waits, on each
  rig.Allow(0);
  for (int i = 0; i < 6; ++i) rig.Start(rig.Request(RandomTokens(20, rng)));
  EXPECT_EQ(rig.Live(), (std::vector<int64_t>{3, 3}));
  const auto refused = rig.engine->Add(rig.Request({1}), nullptr);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind(), ErrorKind::kUnavailable);
  rig.Allow(-1);
  for (auto& ending : rig.endings) EXPECT_EQ(ending->Wait().finish_reason, FinishReason::kLength);
}

TEST(DataParallel, RequestsAreRefusedAsByOneEngine) {
  Rig rig(2);
  const auto kind_of = [&](EngineRequest request) {
    const auto added = rig.engine->Add(std::move(request), nullptr);
    EXPECT_FALSE(added);
    return added.error().kind();
  };
  EXPECT_EQ(kind_of(rig.Request({})), ErrorKind::kInvalidArgument);
  EXPECT_EQ(kind_of(rig.Request({kVocab})), ErrorKind::kInvalidArgument);
  rig.Allow(0);
  EngineRequest twice = rig.Request({1, 2, 3});
  rig.Start(twice);
  for (int i = 0; i < 2; ++i) {  // whichever replica's turn it is
    EXPECT_EQ(kind_of(twice), ErrorKind::kInvalidArgument);
    rig.Start(rig.Request({1}));
  }
}

TEST(DataParallel, AbortFindsTheReplica) {
  auto rng = FreshRng();
  Rig rig(3);
  rig.Allow(0);
  std::vector<std::string> ids;
  for (int i = 0; i < 9; ++i) {
    EngineRequest request = rig.Request(RandomTokens(10, rng), 1000);
    ids.push_back(request.id);
    rig.Start(std::move(request));
  }
  ASSERT_EQ(rig.Live(), (std::vector<int64_t>{3, 3, 3}));
  for (int i = 0; i < 9; i += 2) rig.engine->Abort(ids[static_cast<size_t>(i)]);
  rig.engine->Abort("nobody");
  rig.Allow(-1);
  for (size_t i = 0; i < 9; ++i) {
    EXPECT_EQ(rig.endings[i]->Wait().finish_reason, i % 2 == 0 ? FinishReason::kAbort : FinishReason::kLength);
  }
}

TEST(DataParallel, AFailedReplicaIsAFailureOfTheWhole) {
  auto rng = FreshRng();
  Rig rig(2);
  rig.Allow(0);
  std::atomic<bool> broken{false};
  rig.executors[1]->before = [&](const StepPlan&) {
    if (broken) throw std::runtime_error("rank 7 is on fire");
  };
  for (int i = 0; i < 4; ++i) rig.Start(rig.Request(RandomTokens(10, rng), 20));
  EXPECT_EQ(rig.engine->Failure(), "");
  broken = true;
  rig.Allow(-1);
  int failed = 0;
  for (auto& ending : rig.endings) {
    const RequestOutput last = ending->Wait();
    if (last.finish_reason == FinishReason::kError) {
      ++failed;
      EXPECT_NE(last.error.find("rank 7 is on fire"), std::string::npos);
    } else {
      EXPECT_EQ(last.completion_tokens, 20);
    }
  }
  EXPECT_EQ(failed, 2);
  EXPECT_NE(rig.engine->Failure().find("rank 7 is on fire"), std::string::npos);
  for (int i = 0; i < 2; ++i) {
    const auto added = rig.engine->Add(rig.Request({1}), nullptr);
    ASSERT_FALSE(added);
    EXPECT_EQ(added.error().kind(), ErrorKind::kUnavailable);
  }
}

TEST(DataParallel, ShutdownEndsAllReplicasTogether) {
  auto rng = FreshRng();
  for (const bool in_time : {true, false}) {
    Rig rig(3);
    rig.Allow(in_time ? -1 : 0);
    std::vector<Ending*> endings;
    for (int i = 0; i < 6; ++i) endings.push_back(&rig.Start(rig.Request(RandomTokens(10, rng), 30)));
    std::thread release;
    if (!in_time) {
      // The steps under way end after the time to wait has passed.
      release = std::thread([&] {
        while (rig.engine->Add(rig.Request({1}), nullptr)) std::this_thread::yield();
        rig.Allow(1);
        rig.Allow(-1);
      });
    }
    rig.engine->Shutdown(in_time ? 1000 : 0);
    if (release.joinable()) release.join();
    for (Ending* ending : endings) {
      const RequestOutput last = ending->Wait();
      EXPECT_EQ(last.finish_reason, in_time ? FinishReason::kLength : FinishReason::kAbort);
      EXPECT_EQ(ending->ends, 1);
    }
    EXPECT_FALSE(rig.engine->Add(rig.Request({1}), nullptr));
  }
}

TEST(DataParallel, StatsAreSums) {
  auto rng = FreshRng();
  Rig rig(3);
  uint64_t prompts = 0;
  for (int i = 1; i <= 10; ++i) {
    rig.Run(RandomTokens(10 * i, rng));
    prompts += 10 * static_cast<uint64_t>(i);
  }
  const EngineStats sum = rig.engine->Stats();
  EXPECT_EQ(sum.prompt_tokens, prompts);
  EXPECT_EQ(sum.generation_tokens, 20u);
  EXPECT_EQ(sum.prefix_cache_queries, prompts);
  EXPECT_EQ(sum.request_success.at("length"), 10u);
  EXPECT_EQ(sum.kv_tokens_per_shard, std::vector<int64_t>(6, 0));
  EXPECT_EQ(sum.expert_tokens, (std::vector<int64_t>{0, 3 * 2, 3 * 3}));
  const auto& counts = sum.time_to_first_token_seconds.counts;
  EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), uint64_t{0}), 10u);
  double seconds = 0;
  for (const EngineStats& s : rig.engine->StatsByReplica()) {
    EXPECT_GE(s.request_success.at("length"), 3u);
    seconds += s.time_to_first_token_seconds.sum;
  }
  EXPECT_DOUBLE_EQ(sum.time_to_first_token_seconds.sum, seconds);

  rig.Allow(0);
  rig.Start(rig.Request(RandomTokens(20, rng)));
  const EngineStats now = rig.engine->Stats();  // one look: it may be admitted at any moment
  EXPECT_EQ(now.num_requests_running + now.num_requests_waiting, 1);
}

// Every request taken ends once, with its own tokens or aborted, whatever comes at the same time.
TEST(DataParallel, NoRequestIsLostAmongConcurrentAddsAndAborts) {
  auto rng = FreshRng();
  constexpr int kThreads = 4;
  constexpr int kEach = 60;
  struct Sent {
    EngineRequest request;
    Ending ending;
    bool aborted = false;
  };
  std::vector<std::vector<std::unique_ptr<Sent>>> sent(kThreads);
  Rig rig(3, 64, 0, 4);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t, seed = rng()] {
      std::mt19937_64 own(seed);
      for (int i = 0; i < kEach; ++i) {
        auto& one = *sent[t].emplace_back(std::make_unique<Sent>());
        one.request = rig.Request(RandomTokens(1 + static_cast<int64_t>(own() % 50), own), 1 + own() % 20);
        if (own() % 3 == 0) one.request.prompt_token_ids.insert(one.request.prompt_token_ids.begin(), 40, 7);
        ASSERT_TRUE(rig.engine->Add(one.request, one.ending.Sink()));
        if (own() % 3 == 0) {
          Sent& any = *sent[t][own() % sent[t].size()];
          any.aborted = true;
          rig.engine->Abort(any.request.id);
        }
        if (own() % 7 == 0) rig.engine->Stats();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  int whole = 0;
  for (auto& of_thread : sent) {
    for (auto& one : of_thread) {
      const RequestOutput last = one->ending.Wait();
      Tokens all = one->request.prompt_token_ids;
      for (const int32_t token : one->ending.tokens) {
        ASSERT_EQ(token, NextToken(all, kVocab));
        all.push_back(token);
      }
      if (last.finish_reason == FinishReason::kLength) {
        EXPECT_EQ(last.completion_tokens, one->request.params.max_tokens);
        ++whole;
      } else {
        EXPECT_EQ(last.finish_reason, FinishReason::kAbort);
        EXPECT_TRUE(one->aborted);
      }
    }
  }
  EXPECT_GE(whole, kThreads * kEach / 2);
  rig.engine->Shutdown(0);
  uint64_t answered = 0;
  for (const uint64_t n : rig.Answered()) {
    EXPECT_GE(n, kThreads * kEach / 6);
    answered += n;
  }
  EXPECT_EQ(answered, kThreads * kEach);
  for (auto& of_thread : sent) {
    for (auto& one : of_thread) EXPECT_EQ(one->ending.ends, 1);
  }
}

}  // namespace
}  // namespace weft
