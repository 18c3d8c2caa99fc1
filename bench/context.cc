// What context parallelism decides at run time, against what was right: PCP for short prompts and mixes, and gather-Q
// or gather-KV for chunks behind a cached context. Ranks are threads, one thread each.
//
//   bench_context MODEL [--parts short,exchange]

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <random>
#include <string>

#include "session.h"
#include "weft/core/log.h"

namespace weft::bench {
namespace {

std::string Describe(const std::vector<Session::Item>& items) {
  std::string text;
  for (const Session::Item& item : items) {
    text += fmt::format("{}{}{}", text.empty() ? "" : " + ", item.prefill ? "" : "decode at ",
                        item.prefill ? item.tokens : item.computed);
  }
  return text;
}

// PCP 2 must be slower than PCP 1 for no prompt and no mix; and what --pcp-min-tokens auto chooses as fast as the
// better of cutting all prompts and none.
void BenchShort(const std::shared_ptr<const Checkpoint>& checkpoint, int repeats) {
  constexpr int64_t kTokens = 16384;
  const cp::ParallelConfig pcp2{.prefill_context_parallel = 2};
  ExecutorOptions cut, whole;
  cut.pcp_min_tokens = 2;
  whole.pcp_min_tokens = kTokens;
  std::vector<std::unique_ptr<Session>> sessions;
  sessions.push_back(std::make_unique<Session>(checkpoint, cp::ParallelConfig{}, 1, kTokens));
  sessions.push_back(std::make_unique<Session>(checkpoint, pcp2, 1, kTokens));
  sessions.push_back(std::make_unique<Session>(checkpoint, pcp2, 1, kTokens, cut));
  sessions.push_back(std::make_unique<Session>(checkpoint, pcp2, 1, kTokens, whole));
  std::vector<std::vector<Session::Item>> cases;
  for (const int64_t n : {1, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 128, 192, 256, 384, 512}) {
    cases.push_back({{.tokens = n}});
  }
  cases.push_back({{.tokens = 20}, {.tokens = 30}});
  cases.push_back({{.tokens = 7}, {.tokens = 7}, {.tokens = 7}, {.tokens = 7}});
  cases.push_back({{.tokens = 400}, {.tokens = 30}, {.tokens = 20}});
  cases.push_back({{.tokens = 100}, {.tokens = 90}, {.tokens = 80}});
  cases.push_back({{.computed = 2000, .tokens = 1, .prefill = false}, {.tokens = 40}});
  cases.push_back({{.computed = 2000, .tokens = 1, .prefill = false}, {.tokens = 300}});
  cases.push_back(std::vector<Session::Item>(8, {.computed = 500, .tokens = 1, .prefill = false}));
  cases.push_back({{.computed = 3000, .tokens = 64}});
  fmt::print("PCP 2 against PCP 1, one thread a rank: ms of one step, by turns\n");
  fmt::print("| prompt tokens | PCP 1 | PCP 2 | speed-up | all cut | none cut | chosen over the best |\n");
  fmt::print("|---|---|---|---|---|---|---|\n");
  double worst = 1e9;
  for (const auto& items : cases) {
    std::vector<double> times[4], ratios, chosen;
    for (int i = 0; i <= repeats; ++i) {
      double ms[4];
      for (size_t s = 0; s < 4; ++s) ms[s] = 1e3 * sessions[s]->Step(items);
      if (i == 0) continue;
      for (size_t s = 0; s < 4; ++s) times[s].push_back(ms[s]);
      ratios.push_back(ms[0] / ms[1]);
      chosen.push_back(ms[1] / std::min(ms[2], ms[3]));
    }
    worst = std::min(worst, Median(ratios));
    fmt::print("| {} | {:.1f} | {:.1f} | {:.2f} | {:.1f} | {:.1f} | {:.2f} |\n", Describe(items), Median(times[0]),
               Median(times[1]), Median(ratios), Median(times[2]), Median(times[3]), Median(chosen));
    std::fflush(stdout);
  }
  fmt::print("worst speed-up: {:.2f}\n\n", worst);
}

void BenchExchange(const std::shared_ptr<const Checkpoint>& checkpoint, int repeats) {
  constexpr int64_t kLongest = 32768 + 2048;
  struct Mode {
    const char* name;
    ContextExchange exchange;
  };
  constexpr Mode kModes[] = {{"gather-Q", ContextExchange::kGatherQ},
                             {"gather-KV", ContextExchange::kGatherKv},
                             {"auto", ContextExchange::kAuto}};
  for (const bool stream : {false, true}) {
    // One executor at a time would be fairer to the cache, but no two could be compared by turns.
    std::vector<std::unique_ptr<Session>> sessions;
    for (const Mode& mode : kModes) {
      ExecutorOptions options;
      options.exchange = mode.exchange;
      options.stream = stream;
      options.solo_max_tokens = 0;
      options.pcp_min_tokens = 16;
      sessions.push_back(std::make_unique<Session>(checkpoint, cp::ParallelConfig{.prefill_context_parallel = 2}, 1,
                                                   kLongest, options));
    }
    fmt::print("a step of PCP 2 behind a cached context, ms{}\n", stream ? "; keys and queries in messages" : "");
    fmt::print("| rows | context | gather-Q | gather-KV | auto | auto over the best |\n|---|---|---|---|---|---|\n");
    for (const int64_t rows : {1, 16, 64, 256, 1024}) {
      for (const int64_t context : {512, 4096, 32768}) {
        const std::vector<Session::Item> items = {{.computed = context, .tokens = rows, .prefill = rows > 1}};
        std::vector<double> times[3];
        for (int i = 0; i <= repeats; ++i) {
          for (size_t m = 0; m < 3; ++m) {
            const double seconds = sessions[m]->Step(items);
            if (i > 0) times[m].push_back(1e3 * seconds);
          }
        }
        const double q = Median(times[0]), kv = Median(times[1]), chosen = Median(times[2]);
        fmt::print("| {} | {} | {:.1f} | {:.1f} | {:.1f} | {:.2f} |\n", rows, context, q, kv, chosen,
                   chosen / std::min(q, kv));
        std::fflush(stdout);
      }
    }
    fmt::print("\n");
  }
}

int Main(int argc, char** argv) {
  CLI::App app("What context parallelism decides, against what was right");
  std::string model;
  std::vector<std::string> parts = {"short", "exchange"};
  int repeats = 5;
  app.add_option("model", model, "Hugging Face folder or GGUF file")->required();
  app.add_option("--parts", parts, "short, exchange")->delimiter(',')->check(CLI::IsMember({"short", "exchange"}));
  app.add_option("--repeats", repeats, "steps whose median counts")->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  InitLogging("warning");
  const std::shared_ptr<const Checkpoint> checkpoint = OpenCheckpoint(model);
  for (const std::string& part : parts) {
    if (part == "short") BenchShort(checkpoint, repeats);
    if (part == "exchange") BenchExchange(checkpoint, repeats);
  }
  return 0;
}

}  // namespace
}  // namespace weft::bench

int main(int argc, char** argv) {
  try {
    return weft::bench::Main(argc, argv);
  } catch (const std::exception& e) {
    fmt::print(stderr, "bench_context: error: {}\n", e.what());
    return 1;
  }
}
