#include "weft/runner/test_support.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <utility>

#include "weft/core/error.h"
#include "weft/cp/layout.h"
#include "weft/runner/random.h"

namespace weft::testing {
namespace {

class RandomWeights : public Checkpoint {
 public:
  RandomWeights(const ModelConfig& config, uint64_t seed) : config_(config), seed_(seed) {
    for (const ModelTensor& tensor : ModelTensors(config)) tensors_.emplace(tensor.name, tensor);
  }
  const ModelConfig& config() const override { return config_; }
  bool Has(std::string_view name) const override { return tensors_.find(name) != tensors_.end(); }
  std::vector<int64_t> Shape(std::string_view name) const override {
    const ModelTensor& tensor = Get(name);
    return tensor.rows == 0 ? std::vector<int64_t>{tensor.cols} : std::vector<int64_t>{tensor.rows, tensor.cols};
  }
  DType NaturalDType(std::string_view) const override { return DType::kF32; }
  void Read(std::string_view name, int64_t row0, int64_t rows, int64_t col0, int64_t cols, DType dtype,
            void* dst) const override {
    const ModelTensor& tensor = Get(name);
    const uint64_t key = MixBits(seed_ ^ std::hash<std::string_view>{}(name));
    const bool norm = tensor.kind == ModelTensor::Kind::kNorm;
    // Larger than usual at the output, so that tokens differ clearly.
    const double scale = norm ? 0.2 : tensor.rows == 0 ? 0.3 : 1.6 / std::sqrt(static_cast<double>(tensor.cols));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < cols; ++col) {
        const auto index = static_cast<uint64_t>((row0 + row) * tensor.cols + col0 + col);
        const double sum = UniformAt(key, 2 * index) + UniformAt(key, 2 * index + 1) - 1.0;  // triangular
        const auto value = static_cast<float>((norm ? 1.0 : 0.0) + scale * 2.45 * sum);
        const int64_t at = row * cols + col;
        if (dtype == DType::kF32) {
          static_cast<float*>(dst)[at] = value;
        } else {
          static_cast<bf16*>(dst)[at] = ToBf16(value);
        }
      }
    }
  }
  int64_t total_bytes() const override { return 1; }

 private:
  const ModelTensor& Get(std::string_view name) const {
    const auto it = tensors_.find(name);
    if (it == tensors_.end()) Throw("no tensor {}", name);
    return it->second;
  }
  ModelConfig config_;
  uint64_t seed_;
  std::map<std::string, ModelTensor, std::less<>> tensors_;
};

struct Running {
  std::vector<int32_t> tokens;  // known ones
  std::vector<int32_t> blocks;
  int64_t computed = 0;
  size_t told_output = 0;  // output tokens that the ranks know
  bool admitted = false;
  bool blocks_told = false;
  bool done = false;
};

}  // namespace

uint64_t FreshSeed() {
  const char* given = std::getenv("WEFT_TEST_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  std::printf("WEFT_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

std::shared_ptr<const Checkpoint> RandomCheckpoint(const ModelConfig& config, uint64_t seed) {
  return std::make_shared<RandomWeights>(config, seed);
}

ModelConfig SmallConfig(const SmallModel& model) {
  ModelConfig c;
  c.architecture = "LlamaForCausalLM";
  c.model_type = "llama";
  c.hidden_size = 48;
  c.intermediate_size = 67;
  c.num_layers = 2;
  c.num_heads = model.heads;
  c.num_kv_heads = model.kv_heads;
  c.head_dim = 16;
  c.rotary_dim = 16;
  c.vocab_size = 131;
  c.max_position_embeddings = 4096;
  c.rms_norm_eps = 1e-5f;
  c.tie_word_embeddings = model.tied;
  c.qkv_bias = c.o_bias = c.mlp_bias = model.bias;
  c.qk_norm = model.qk_norm;
  if (model.mla) {
    c.mla = MlaConfig{.q_lora_rank = model.q_lora_rank,
                      .kv_lora_rank = 20,
                      .qk_nope_head_dim = 12,
                      .qk_rope_head_dim = 6,
                      .v_head_dim = 10};
    c.num_kv_heads = 1;
    c.head_dim = 18;
    c.rotary_dim = 6;
    c.rope_interleaved = true;
  }
  if (model.experts > 0) {
    MoeConfig moe;
    moe.num_experts = model.experts;
    moe.experts_per_token = 3;
    moe.expert_ffn = 24;
    moe.norm_topk = true;
    moe.router_f32 = true;
    if (model.sigmoid) {
      moe.scoring = MoeConfig::Scoring::kSigmoid;
      moe.shared_ffn = 29;
      moe.num_groups = 2;
      moe.groups_per_token = 1;
      moe.group_score = MoeConfig::GroupScore::kTop2Sum;
      moe.correction_bias = true;
      moe.routed_scaling = 1.5;
    }
    c.moe = moe;
    c.moe_layers.assign(static_cast<size_t>(c.num_layers), true);
    c.moe_layers[0] = false;
  }
  return c;
}

cp::ModelHeads HeadsOf(const SmallModel& model) {
  return {.heads = static_cast<int32_t>(model.heads),
          .kv_heads = static_cast<int32_t>(model.mla ? 1 : model.kv_heads),
          .mla = model.mla};
}

std::vector<DrivenResult> Drive(StepExecutor& executor, const cp::ParallelConfig& parallel,
                                const std::vector<DrivenRequest>& requests, const DriveOptions& options,
                                std::mt19937_64& rng) {
  static std::atomic<RequestHandle> next_handle = 1;
  const RequestHandle base = next_handle.fetch_add(requests.size());
  const cp::KvLayout layout = LayoutOf(parallel);
  auto chance = [&](double p) { return std::uniform_real_distribution<>(0, 1)(rng) < p; };
  auto below = [&](int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(rng); };

  std::vector<int32_t> free_blocks(static_cast<size_t>(executor.num_blocks()));
  for (size_t i = 0; i < free_blocks.size(); ++i) free_blocks[i] = static_cast<int32_t>(i);
  std::shuffle(free_blocks.begin(), free_blocks.end(), rng);

  std::vector<Running> running(requests.size());
  std::vector<DrivenResult> results(requests.size());
  for (size_t i = 0; i < requests.size(); ++i) running[i].tokens = requests[i].prompt;
  std::vector<RequestHandle> released;
  size_t left = requests.size();
  uint64_t step_number = 0;
  while (left > 0) {
    StepPlan plan;
    plan.step = step_number++;
    plan.capture_logits = true;
    plan.released.swap(released);
    std::vector<size_t> of_step;
    for (size_t i = 0; i < requests.size(); ++i) {
      Running& r = running[i];
      if (r.done || (options.mixed && chance(0.4))) continue;
      if (r.computed > 0 && chance(options.preempt)) {
        free_blocks.insert(free_blocks.begin(), r.blocks.begin(), r.blocks.end());
        r.blocks.clear();
        r.computed = 0;
        r.blocks_told = false;
      }
      const auto known = static_cast<int64_t>(r.tokens.size());
      const auto prompt = static_cast<int64_t>(requests[i].prompt.size());
      RequestStep step;
      step.handle = base + i;
      step.computed = r.computed;
      // A decode row is the newest token of a request all whose other tokens are in the cache and that has output.
      step.prefill = !(r.computed == known - 1 && known > prompt);
      step.tokens = known - r.computed;
      if (step.prefill && options.max_chunk > 0) {
        step.tokens = std::min(step.tokens, 1 + below(options.max_chunk));
      }
      step.sample = r.computed + step.tokens == known;
      const auto need = static_cast<size_t>(layout.BlocksFor(r.computed + step.tokens));
      step.first_block = static_cast<int32_t>(r.blocks_told ? r.blocks.size() : 0);
      if (need > r.blocks.size() + free_blocks.size()) continue;
      while (r.blocks.size() < need) {
        r.blocks.push_back(free_blocks.back());
        free_blocks.pop_back();
      }
      step.block_ids.assign(r.blocks.begin() + step.first_block, r.blocks.end());
      r.blocks_told = true;
      if (!r.admitted) {
        SamplingParams greedy;
        greedy.temperature = 0;
        plan.admitted.push_back({step.handle, requests[i].prompt, greedy});
        r.admitted = true;
      }
      const auto output_known = static_cast<size_t>(known - prompt);
      step.appended_token_ids.assign(r.tokens.begin() + prompt + static_cast<std::ptrdiff_t>(r.told_output),
                                     r.tokens.end());
      r.told_output = output_known;
      plan.requests.push_back(std::move(step));
      of_step.push_back(i);
    }
    if (plan.requests.empty()) {
      released.swap(plan.released);
      continue;
    }
    const StepOutput output = executor.Execute(plan);
    WEFT_CHECK(output.rows.size() == plan.requests.size());
    for (size_t k = 0; k < of_step.size(); ++k) {
      const RequestStep& step = plan.requests[k];
      const RowOutput& row = output.rows[k];
      const size_t i = of_step[k];
      Running& r = running[i];
      WEFT_CHECK(row.handle == step.handle && !row.error);
      WEFT_CHECK(static_cast<int64_t>(row.logit_positions.size()) == step.tokens, "{} of {} rows came back",
                 row.logit_positions.size(), step.tokens);
      const size_t vocab = row.logits.size() / row.logit_positions.size();
      for (size_t p = 0; p < row.logit_positions.size(); ++p) {
        WEFT_CHECK(row.logit_positions[p] == step.computed + static_cast<int64_t>(p));
        const auto begin = row.logits.begin() + static_cast<std::ptrdiff_t>(p * vocab);
        results[i].logits[row.logit_positions[p]].assign(begin, begin + static_cast<std::ptrdiff_t>(vocab));
        if (!row.router_margins.empty()) results[i].router_margins[row.logit_positions[p]] = row.router_margins.at(p);
      }
      r.computed += step.tokens;
      WEFT_CHECK(row.token_id.has_value() == step.sample);
      if (!step.sample) continue;
      const size_t made = r.tokens.size() - requests[i].prompt.size();
      results[i].sampled.resize(made + 1);
      results[i].sampled[made] = *row.token_id;
      if (made < requests[i].forced_output.size()) r.tokens.push_back(requests[i].forced_output[made]);
      if (made + 1 >= requests[i].forced_output.size()) {
        r.done = true;
        --left;
        released.push_back(step.handle);
        free_blocks.insert(free_blocks.begin() + below(static_cast<int64_t>(free_blocks.size()) + 1), r.blocks.begin(),
                           r.blocks.end());
      }
    }
  }
  StepPlan last;
  last.released = released;
  executor.Execute(last);
  return results;
}

std::vector<int32_t> GreedyOutput(StepExecutor& executor, const cp::ParallelConfig& parallel,
                                  const std::vector<int32_t>& prompt, int64_t tokens) {
  std::mt19937_64 rng(1);
  // Whole prompts again and again would be slow; so one request whose output is decided as it goes.
  std::vector<int32_t> output;
  static RequestHandle handle = RequestHandle{1} << 40;
  ++handle;
  const cp::KvLayout layout = LayoutOf(parallel);
  int64_t blocks = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    StepPlan plan;
    RequestStep step;
    step.handle = handle;
    const auto known = static_cast<int64_t>(prompt.size()) + i;
    step.prefill = i == 0;
    step.computed = i == 0 ? 0 : known - 1;
    step.tokens = known - step.computed;
    step.sample = true;
    step.first_block = static_cast<int32_t>(blocks);
    for (; blocks < layout.BlocksFor(known); ++blocks) step.block_ids.push_back(static_cast<int32_t>(blocks));
    if (i == 0) {
      SamplingParams greedy;
      greedy.temperature = 0;
      plan.admitted.push_back({handle, prompt, greedy});
    } else {
      step.appended_token_ids = {output.back()};
    }
    plan.requests.push_back(std::move(step));
    output.push_back(executor.Execute(plan).rows.at(0).token_id.value());
  }
  StepPlan last;
  last.released = {handle};
  executor.Execute(last);
  return output;
}

double RelativeError(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0;
  double norm = 0;
  WEFT_CHECK(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    norm += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(difference / norm);
}

double TopMargin(const std::vector<float>& logits) {
  float best = -std::numeric_limits<float>::infinity();
  float second = best;
  for (const float x : logits) {
    if (x > best) {
      second = std::exchange(best, x);
    } else {
      second = std::max(second, x);
    }
  }
  return static_cast<double>(best) - second;
}

}  // namespace weft::testing
