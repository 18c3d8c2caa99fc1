#include "weft/runner/executor.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <vector>

#include "weft/core/error.h"
#include "weft/core/log.h"
#include "weft/kernels/table.h"
#include "weft/model/progress.h"
#include "weft/model/transformer.h"
#include "weft/parallel/groups.h"
#include "weft/parallel/rank_threads.h"
#include "weft/runner/model_runner.h"
#include "weft/runner/request_table.h"
#include "weft/runner/step_costs.h"

namespace weft {
namespace {

KvCacheShape ShapeOf(const ModelConfig& config, const cp::ParallelConfig& parallel, DType kv_dtype, int64_t blocks) {
  if (config.mla) {
    // One row [latent, k_rope] a token, the same on all TP ranks; values are read out of it.
    return {.dtype = kv_dtype,
            .layers = config.num_layers,
            .blocks = blocks,
            .block_tokens = parallel.block_tokens,
            .kv_heads = 1,
            .k_dim = config.mla->kv_lora_rank + config.mla->qk_rope_head_dim,
            .v_dim = 0};
  }
  return {.dtype = kv_dtype,
          .layers = config.num_layers,
          .blocks = blocks,
          .block_tokens = parallel.block_tokens,
          .kv_heads = std::max<int64_t>(1, config.num_kv_heads / parallel.tensor_parallel),
          .k_dim = config.head_dim,
          .v_dim = config.head_dim};
}

class ThreadExecutor : public StepExecutor {
 public:
  ThreadExecutor(const ExecutorOptions& options, std::shared_ptr<const Checkpoint> checkpoint)
      : options_(options),
        config_(checkpoint->config()),
        kernels_(KernelsByName(options.kernels)),
        batch_options_{
            .parallel = options.parallel,
            .costs = QueryCostsOf(config_, options.pcp_min_tokens),
            .exchange = options.exchange,
            .mla = config_.mla.has_value(),
            .solo_max_tokens = options.stream || options.parallel.expert_parallel ? 0 : options.solo_max_tokens},
        table_(options.seed),
        num_blocks_(options.num_blocks) {
    cp::Validate(options.parallel, {.heads = static_cast<int32_t>(config_.num_heads),
                                    .kv_heads = static_cast<int32_t>(config_.num_kv_heads),
                                    .mla = config_.mla.has_value()});
    WEFT_CHECK(options.parallel.data_parallel == 1, "one executor is one replica");
    if (num_blocks_ == 0) {
      const int64_t block_bytes = VirtualBlockBytes(config_, options.parallel, options.kv_dtype);
      num_blocks_ = options.kv_cache_bytes / block_bytes;
      if (num_blocks_ < 1) {
        Throw("--kv-cache-memory {}: one block of KV cache over all ranks takes {} bytes", options.kv_cache_bytes,
              block_bytes);
      }
    }
    WEFT_CHECK(num_blocks_ >= 1 && num_blocks_ <= INT32_MAX);

    const int world = options.parallel.WorldSize();
    const std::vector<int> cpus = AllowedCpus();
    threads_per_rank_ =
        options.threads_per_rank > 0 ? options.threads_per_rank : std::max(1, static_cast<int>(cpus.size()) / world);
    LoadAllWeights(*checkpoint, std::max<int>(1, static_cast<int>(cpus.size())));
    const int64_t positions = options.max_model_len > 0 ? options.max_model_len : config_.max_position_embeddings;
    rope_ = std::make_shared<RopeCache>(config_.rope, config_.rotary_dim, positions);

    groups_ = MakeThreadGroups(options.parallel);
    ranks_.resize(static_cast<size_t>(world));
    threads_ = std::make_unique<RankThreads>(world, [this] { AbortAll(groups_); });
    // On its own thread, so that a rank's memory is touched first, and its pool pinned, where it runs.
    // Pinned where they are as many as the CPUs that this process may use; with fewer, another process's ranks would be
    // pinned to the same first CPUs.
    fits_ = static_cast<size_t>(world * threads_per_rank_) <= cpus.size();
    const bool pin = static_cast<size_t>(world * threads_per_rank_) == cpus.size();
    threads_->RunOnAll([&](int rank) { MakeRank(rank, pin ? cpus : std::vector<int>{}); });
    spdlog::info("{} rank{} x {} thread{}{}, kernels {} ({}), {} virtual blocks of {} tokens", world,
                 world == 1 ? "" : "s", threads_per_rank_, threads_per_rank_ == 1 ? "" : "s", pin ? ", pinned" : "",
                 kernels_.name, kernels_.target, num_blocks_,
                 options.parallel.block_tokens * options.parallel.KvShards());
  }

  ~ThreadExecutor() override {
    // Ranks are torn down where they were made.
    if (threads_) threads_->RunOnAll([this](int rank) { ranks_[static_cast<size_t>(rank)].reset(); });
  }

  StepOutput Execute(const StepPlan& plan) override {
    table_.Apply(plan);
    if (plan.requests.empty()) return {};
    std::vector<std::vector<RowOutput>> outputs(ranks_.size());
    const bool solo = IsSolo(plan, batch_options_);
    threads_->RunOnAll([&](int rank) {
      if (solo && groups_[static_cast<size_t>(rank)].coord.pcp != 0) return;
      outputs[static_cast<size_t>(rank)] = ranks_[static_cast<size_t>(rank)]->runner->Step(plan, table_);
    });
    return MergeOutputs(plan, std::move(outputs));
  }

  int64_t num_blocks() const override { return num_blocks_; }

 private:
  struct Rank {
    std::unique_ptr<ThreadPool> joint_pool;
    std::unique_ptr<ThreadPool> pool;
    std::unique_ptr<KvCache> cache;
    std::unique_ptr<ModelRunner> runner;
  };

  void LoadAllWeights(const Checkpoint& checkpoint, int threads) {
    ThreadPool pool(threads);
    int64_t elements = 0;
    for (const ModelTensor& tensor : ModelTensors(config_)) elements += tensor.elements();
    LoadProgress::Options show;
    if (!options_.progress) show.mode = LoadProgress::Mode::kOff;
    LoadProgress progress("Loading weights", elements * static_cast<int64_t>(SizeOf(options_.dtype)), show);
    const int tp = options_.parallel.tensor_parallel;
    for (int i = 0; i < tp; ++i) {
      weights_.push_back(
          LoadWeights(checkpoint, tp, i, options_.dtype, kernels_, pool, [&](int64_t bytes) { progress.Add(bytes); }));
    }
    if (config_.moe) {
      const int64_t experts = config_.moe->num_experts;
      const bool whole = options_.parallel.expert_parallel;
      for (int i = 0; i < (whole ? options_.parallel.WorldSize() : tp); ++i) {
        const ExpertSlice slice = whole ? ExpertSlice{.experts = SplitRange(experts, options_.parallel.WorldSize(), i)}
                                        : ExpertSlice{.experts = {0, experts}, .tp_size = tp, .tp = i};
        experts_.push_back(LoadExperts(checkpoint, slice, options_.dtype, kernels_, pool,
                                       [&](int64_t bytes) { progress.Add(bytes); }));
      }
    }
    progress.Finish();
  }

  // The CPUs of a rank's threads; none where there are not enough to pin.
  std::vector<int> CpusOf(const std::vector<int>& cpus, int rank) const {
    if (cpus.empty()) return {};
    const auto first = cpus.begin() + rank * threads_per_rank_;
    return {first, first + threads_per_rank_};
  }

  void MakeRank(int index, const std::vector<int>& cpus) {
    auto rank = std::make_unique<Rank>();
    RankGroups& groups = groups_[static_cast<size_t>(index)];
    rank->pool = std::make_unique<ThreadPool>(threads_per_rank_, CpusOf(cpus, index));
    if (groups.coord.pcp == 0 && groups.pcp->size() > 1) {
      // On the same CPUs as the pools of the PCP group, which sleep while this one works.
      std::vector<int> joint;
      for (int pcp = 0; pcp < groups.pcp->size(); ++pcp) {
        const std::vector<int> part = CpusOf(cpus, index + pcp * options_.parallel.tensor_parallel);
        joint.insert(joint.end(), part.begin(), part.end());
      }
      const int threads = fits_ ? groups.pcp->size() * threads_per_rank_ : 1;
      rank->joint_pool = std::make_unique<ThreadPool>(threads, joint);
    }
    rank->cache = std::make_unique<KvCache>(ShapeOf(config_, options_.parallel, options_.kv_dtype, num_blocks_));
    rank->runner = std::make_unique<ModelRunner>(
        Transformer::Options{
            .config = &config_,
            .weights = weights_[static_cast<size_t>(groups.coord.tp)],
            .experts = ExpertsOf(groups.coord),
            .rope = rope_,
            .cache = rank->cache.get(),
            .parallel = options_.parallel,
            .coord = groups.coord,
            .groups = {groups.tp.get(), groups.pcp.get(), groups.dcp.get(), groups.cp.get(), groups.world.get()},
            .expert_parallel = options_.parallel.expert_parallel,
            .kernels = &kernels_,
            .pool = rank->pool.get(),
            .joint_pool = rank->joint_pool.get(),
            .context_segment_tokens = options_.context_segment_tokens,
            .stream = options_.stream},
        batch_options_);
    ranks_[static_cast<size_t>(index)] = std::move(rank);
  }

  std::shared_ptr<const ExpertWeights> ExpertsOf(const cp::RankCoord& coord) const {
    if (experts_.empty()) return nullptr;
    return experts_[static_cast<size_t>(options_.parallel.expert_parallel ? coord.rank : coord.tp)];
  }

  ExecutorOptions options_;
  ModelConfig config_;
  const KernelTable& kernels_;
  const BatchOptions batch_options_;
  RequestTable table_;
  int64_t num_blocks_;
  int threads_per_rank_ = 1;
  bool fits_ = false;                                          // every rank's threads can have CPUs of their own
  std::vector<std::shared_ptr<const ModelWeights>> weights_;   // by TP index
  std::vector<std::shared_ptr<const ExpertWeights>> experts_;  // by rank with expert parallelism, else by TP index
  std::shared_ptr<const RopeCache> rope_;
  std::vector<RankGroups> groups_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::unique_ptr<RankThreads> threads_;
};

}  // namespace

int64_t VirtualBlockBytes(const ModelConfig& config, const cp::ParallelConfig& parallel, DType kv_dtype) {
  return ShapeOf(config, parallel, kv_dtype, 1).block_bytes() * parallel.WorldSize() / parallel.data_parallel;
}

std::unique_ptr<StepExecutor> MakeThreadExecutor(const ExecutorOptions& options,
                                                 std::shared_ptr<const Checkpoint> checkpoint) {
  return std::make_unique<ThreadExecutor>(options, std::move(checkpoint));
}

}  // namespace weft
