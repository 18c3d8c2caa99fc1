// Prefill and decode speed of a whole model, and what splitting the prompt over PCP ranks gains, beside the limits of
// the machine measured in the same run. Takes a Hugging Face folder or a GGUF file; the weights may be random.
//
//   bench_e2e MODEL [--lengths 512,4096] [--pcp-lengths 4096,16384] [--chunk 2048] [--threads N] [--decode-steps 32]

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>

#include "machine_limits.h"
#include "session.h"
#include "weft/core/log.h"
#include "weft/runner/executor.h"
#include "weft/runner/step_costs.h"

namespace weft::bench {
namespace {

// Of the layers: those that a token meets, with a mixture its experts alone.
double LayerParameters(const ModelConfig& c) { return QueryCostsOf(c, 0).per_token / 2; }

double LmHeadParameters(const ModelConfig& c) {
  return static_cast<double>(c.vocab_size) * static_cast<double>(c.hidden_size);
}

// 2 FLOP a weight and token, the LM head for the last one only; and half of the square of QK and PV (with MLA of the
// expanded keys and values, each expanded once).
double PrefillFlop(const ModelConfig& c, int64_t n) {
  const cp::QueryCosts costs = QueryCostsOf(c, 0);
  const auto tokens = static_cast<double>(n);
  return costs.per_token * tokens + 2 * LmHeadParameters(c) + costs.per_pair * tokens * tokens / 2;
}

// Weights and KV of the context, bf16 both.
double DecodeBytes(const ModelConfig& c, int64_t context) {
  const int64_t kv_row = c.mla ? c.mla->kv_lora_rank + c.mla->qk_rope_head_dim : 2 * c.num_kv_heads * c.head_dim;
  return 2 * (LayerParameters(c) + LmHeadParameters(c)) +
         2.0 * static_cast<double>(c.num_layers * kv_row) * static_cast<double>(context);
}

int Main(int argc, char** argv) {
  CLI::App app("Speed of a whole model beside the limits of the machine");
  std::string model;
  std::vector<int64_t> lengths = {512, 4096};
  std::vector<int64_t> pcp_lengths = {4096, 16384};
  int64_t chunk = 2048;
  int threads = static_cast<int>(AllowedCpus().size());
  int decode_steps = 32;
  app.add_option("model", model, "Hugging Face folder or GGUF file")->required();
  app.add_option("--lengths", lengths, "prompt lengths for prefill and decode on all threads")->delimiter(',');
  app.add_option("--pcp-lengths", pcp_lengths, "prompt lengths for PCP 1 against PCP 2")->delimiter(',');
  app.add_option("--chunk", chunk, "tokens a step (--max-num-batched-tokens)");
  app.add_option("--threads", threads, "threads of the one rank");
  app.add_option("--decode-steps", decode_steps, "decode steps at each depth");
  CLI11_PARSE(app, argc, argv);
  InitLogging("warning");

  MachineLimits limits;
  {
    ThreadPool pool(threads, AllowedCpus());
    limits = MeasureMachineLimits(pool);
  }
  fmt::print("{}\n", Describe(limits));
  const std::shared_ptr<const Checkpoint> checkpoint = OpenCheckpoint(model);
  const ModelConfig& c = checkpoint->config();
  fmt::print("{}: {} layers, hidden {}, {:.2f} G parameters a token, bf16 weights and KV, chunks of {} tokens\n\n",
             c.architecture, c.num_layers, c.hidden_size, (LayerParameters(c) + LmHeadParameters(c)) / 1e9, chunk);

  if (!lengths.empty()) {
    const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    Session session(checkpoint, {}, threads, longest + decode_steps + 8);
    fmt::print("one rank, {} threads\n", threads);
    fmt::print("| tokens | TTFT s | GFLOP/s | of FMA peak | of sgemm | decode ms | GB/s | of read bandwidth |\n");
    fmt::print("|---|---|---|---|---|---|---|---|\n");
    session.Prefill(std::min<int64_t>(256, longest), chunk);
    for (const int64_t n : lengths) {
      std::vector<double> prefills;
      std::vector<double> decodes;
      for (int repeat = 0; repeat < (n <= 1024 ? 5 : 3); ++repeat) {
        prefills.push_back(session.Prefill(n, chunk));
        decodes.push_back(session.Decode(decode_steps));
      }
      const double ttft = Median(prefills);
      const double gflops = PrefillFlop(c, n) / ttft / 1e9;
      const double decode = Median(decodes);
      const double gb_s = DecodeBytes(c, n + decode_steps / 2) / decode / 1e9;
      fmt::print("| {} | {:.3f} | {:.0f} | {:.0f} % | {:.0f} % | {:.1f} | {:.1f} | {:.0f} % |\n", n, ttft, gflops,
                 100 * gflops / limits.fma_gflops.all, 100 * gflops / limits.sgemm_gflops.all, 1e3 * decode, gb_s,
                 100 * gb_s / limits.read_gb_s.all);
      std::fflush(stdout);
    }
  }

  if (!pcp_lengths.empty()) {
    const int64_t longest = *std::max_element(pcp_lengths.begin(), pcp_lengths.end());
    Session one(checkpoint, {}, 1, longest + 64);
    Session two(checkpoint, {.prefill_context_parallel = 2}, 1, longest + 64);
    fmt::print("\none thread a rank: PCP 1 and 2, by turns\n");
    fmt::print("| tokens | TTFT s, PCP 1 | TTFT s, PCP 2 | speed-up | decode ms, PCP 1 | decode ms, PCP 2 |\n");
    fmt::print("|---|---|---|---|---|---|\n");
    one.Prefill(256, chunk);
    two.Prefill(256, chunk);
    for (const int64_t n : pcp_lengths) {
      std::vector<double> t1, t2, d1, d2, ratios;
      for (int repeat = 0; repeat < (n <= 8192 ? 3 : 1); ++repeat) {
        t1.push_back(one.Prefill(n, chunk));
        d1.push_back(one.Decode(8));
        t2.push_back(two.Prefill(n, chunk));
        d2.push_back(two.Decode(8));
        ratios.push_back(t1.back() / t2.back());
      }
      fmt::print("| {} | {:.2f} | {:.2f} | {:.2f} | {:.1f} | {:.1f} |\n", n, Median(t1), Median(t2), Median(ratios),
                 1e3 * Median(d1), 1e3 * Median(d2));
      std::fflush(stdout);
    }
  }
  return 0;
}

}  // namespace
}  // namespace weft::bench

int main(int argc, char** argv) {
  try {
    return weft::bench::Main(argc, argv);
  } catch (const std::exception& e) {
    fmt::print(stderr, "bench_e2e: error: {}\n", e.what());
    return 1;
  }
}
