#include "weft/runner/rank_host.h"

#include <algorithm>
#include <utility>

#include "weft/core/error.h"
#include "weft/core/log.h"
#include "weft/model/progress.h"
#include "weft/runner/measure_rates.h"
#include "weft/runner/random.h"
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

// Ranks of the world that have their groups here.
std::vector<int> RanksHere(const std::vector<RankGroups>& groups) {
  std::vector<int> here;
  for (size_t rank = 0; rank < groups.size(); ++rank) {
    if (groups[rank].world != nullptr) here.push_back(static_cast<int>(rank));
  }
  return here;
}

}  // namespace

RankHost::RankHost(const ExecutorOptions& options, std::shared_ptr<const Checkpoint> checkpoint,
                   std::vector<RankGroups> groups, std::vector<int> cpus,
                   std::function<void(const std::string&)> on_failure)
    : options_(options),
      config_(checkpoint->config()),
      kernels_(KernelsByName(options.kernels)),
      groups_(std::move(groups)),
      here_(RanksHere(groups_)),
      batch_options_{.parallel = options.parallel,
                     .costs = QueryCostsOf(config_, options.pcp_min_tokens),
                     .exchange = options.exchange,
                     .mla = config_.mla.has_value(),
                     .attention = AttentionShapeOf(config_, options.parallel, options.kv_dtype),
                     .rates = options.rates,
                     .solo_max_tokens = options.solo_max_tokens},
      num_blocks_(options.num_blocks),
      on_failure_(std::move(on_failure)) {
  const cp::ParallelConfig& parallel = options.parallel;
  WEFT_CHECK(!here_.empty());
  for (int i = 0; i < parallel.data_parallel; ++i) {
    // Requests of different replicas have the same handles, and are not to draw the same numbers.
    tables_.emplace_back(i == 0 ? options.seed : MixBits(options.seed ^ MixBits(static_cast<uint64_t>(i))));
  }
  // One rank works for its PCP group where it can write to all of its caches and has all experts.
  const bool whole_replicas = here_.size() % replica_size() == 0;
  if (options.stream || parallel.expert_parallel || !whole_replicas) batch_options_.solo_max_tokens = 0;
  if (num_blocks_ == 0) {
    const int64_t block_bytes = VirtualBlockBytes(config_, parallel, options.kv_dtype);
    num_blocks_ = options.kv_cache_bytes / (block_bytes * parallel.data_parallel);
    if (num_blocks_ < 1) {
      Throw("--kv-cache-memory {}: one block of KV cache over all ranks takes {} bytes", options.kv_cache_bytes,
            block_bytes * parallel.data_parallel);
    }
  }
  WEFT_CHECK(num_blocks_ >= 1 && num_blocks_ <= INT32_MAX);

  const int count = static_cast<int>(here_.size());
  threads_per_rank_ =
      options.threads_per_rank > 0 ? options.threads_per_rank : std::max(1, static_cast<int>(cpus.size()) / count);
  LoadAllWeights(*checkpoint, std::max<int>(1, static_cast<int>(cpus.size())));
  const int64_t positions = options.max_model_len > 0 ? options.max_model_len : config_.max_position_embeddings;
  rope_ = std::make_shared<RopeCache>(config_.rope, config_.rotary_dim, positions);

  const auto replicas = static_cast<size_t>(parallel.data_parallel);
  contexts_.resize(replicas);
  expert_loads_.resize(replicas, std::vector<int64_t>(config_.moe ? static_cast<size_t>(config_.moe->num_experts) : 0));
  ranks_.resize(here_.size());
  MakeTeams();
  // On its own thread, so that a rank's memory is touched first, and its pool pinned, where it runs.
  // Pinned where they are as many as the CPUs that this process may use; with fewer, another process's ranks would be
  // pinned to the same first CPUs.
  fits_ = static_cast<size_t>(count * threads_per_rank_) <= cpus.size();
  const bool pin = static_cast<size_t>(count * threads_per_rank_) == cpus.size();
  for (Team& team : teams_) {
    RunOnAll(team, [&](int index) { MakePools(index, pin ? cpus : std::vector<int>{}); });
  }
  LearnRates();
  for (Team& team : teams_) {
    RunOnAll(team, [&](int index) { MakeRank(index); });
  }
  const auto world = static_cast<int>(groups_.size());
  spdlog::info("{}{} rank{} x {} thread{}{}, kernels {} ({}), {} virtual blocks of {} tokens",
               count < world ? fmt::format("{} of ", count) : "", world, world == 1 ? "" : "s", threads_per_rank_,
               threads_per_rank_ == 1 ? "" : "s", pin ? ", pinned" : "", kernels_.name, kernels_.target, num_blocks_,
               parallel.block_tokens * parallel.KvShards());
}

RankHost::~RankHost() {
  // Ranks are torn down where they were made.
  for (Team& team : teams_) {
    team.threads->RunOnAll([&](int i) { ranks_[static_cast<size_t>(team.first + i)].reset(); });
  }
}

void RankHost::MakeTeams() {
  const int count = static_cast<int>(here_.size());
  // Replicas that share nothing but weights have their own pace, where all of their ranks are here.
  const bool together = options_.parallel.expert_parallel || here_.size() < groups_.size();
  const int size = together ? count : count / options_.parallel.data_parallel;
  for (int first = 0; first < count; first += size) {
    const auto abort = [this, first, size] {
      for (int index = first; index < first + size; ++index) GroupsOf(index).Abort();
    };
    teams_.push_back({first, std::make_unique<RankThreads>(size, abort)});
  }
}

void RankHost::RunOnAll(Team& team, FunctionRef<void(int)> f) {
  team.threads->RunOnAll([&](int i) {
    try {
      f(team.first + i);
    } catch (const std::exception& e) {
      if (on_failure_) on_failure_(e.what());
      throw;
    }
  });
}

RankHost::Outputs RankHost::Step(std::span<const StepPlan* const> plans) {
  WEFT_CHECK(plans.size() == tables_.size());
  static const StepPlan kNothing;
  std::vector<const StepPlan*> work(plans.begin(), plans.end());  // not null
  std::vector<StepDeal> deals(plans.size());
  int64_t most_rows = 0;
  size_t given = 0;
  size_t last = 0;
  for (size_t i = 0; i < plans.size(); ++i) {
    if (work[i] == nullptr) {
      work[i] = &kNothing;
      continue;
    }
    ++given;
    last = i;
    tables_[i].Apply(*work[i]);
  }
  for (size_t i = 0; i < plans.size(); ++i) {
    deals[i] = DealStep(*work[i], batch_options_);
    // Only the ranks that share experts have to know of each other's rows.
    if (options_.parallel.expert_parallel) most_rows = std::max(most_rows, MostRows(deals[i]));
  }
  WEFT_CHECK(steps_together() || given == 1, "{} plans for replicas that step alone", given);
  // By rank here; each rank's place is there before the threads write.
  std::vector<std::vector<RowOutput>> found(ranks_.size());
  const auto idle = [](const StepPlan* plan) { return plan->requests.empty(); };
  const auto step = [&](int index) {
    const cp::RankCoord& coord = GroupsOf(index).coord;
    const auto replica = static_cast<size_t>(coord.dp);
    // Only where experts are shared does a replica without rows have a part in the others' step.
    if (idle(work[replica]) && !options_.parallel.expert_parallel) return;
    if (deals[replica].solo && coord.pcp != 0) return;
    found[static_cast<size_t>(index)] =
        ranks_[static_cast<size_t>(index)]->runner->Step(*work[replica], deals[replica], tables_[replica], most_rows);
  };
  if (!std::ranges::all_of(work, idle)) {
    Team& team = teams_[steps_together() ? 0 : last];
    RunOnAll(team, step);
    CountExpertLoad(team);
    CountContext(team, work, deals);
  }
  Outputs outputs(plans.size());
  for (size_t index = 0; index < found.size(); ++index) {
    const auto replica = static_cast<size_t>(GroupsOf(static_cast<int>(index)).coord.dp);
    outputs[replica].push_back(std::move(found[index]));
  }
  return outputs;
}

void RankHost::CountExpertLoad(const Team& team) {
  if (!config_.moe) return;
  const auto experts = static_cast<size_t>(config_.moe->num_experts);
  const auto dp = [&](int index) { return static_cast<size_t>(GroupsOf(index).coord.dp); };
  const std::lock_guard lock(load_mutex_);
  for (int i = 0; i < team.threads->size(); ++i) expert_loads_[dp(team.first + i)].assign(experts, 0);
  for (int i = 0; i < team.threads->size(); ++i) {
    const int index = team.first + i;
    // Without expert parallelism the ranks of a TP group have slices of each expert, and run the same rows.
    if (!options_.parallel.expert_parallel && GroupsOf(index).coord.tp != 0) continue;
    const std::span<const int64_t> load = ranks_[static_cast<size_t>(index)]->runner->expert_load();
    std::vector<int64_t>& sum = expert_loads_[dp(index)];
    for (size_t e = 0; e < experts; ++e) sum[e] += load[e];
  }
}

void RankHost::CountContext(const Team& team, std::span<const StepPlan* const> work, std::span<const StepDeal> deals) {
  const std::lock_guard lock(load_mutex_);
  for (size_t i = 0; i < work.size(); ++i) {
    if (work[i]->requests.empty()) continue;
    contexts_[i] += weft::CountContext(*work[i], deals[i]);
    contexts_[i].exchanged_bytes = 0;
  }
  for (int i = 0; i < team.threads->size(); ++i) {
    const int index = team.first + i;
    const auto replica = static_cast<size_t>(GroupsOf(index).coord.dp);
    if (work[replica]->requests.empty()) continue;
    contexts_[replica].exchanged_bytes +=
        static_cast<uint64_t>(ranks_[static_cast<size_t>(index)]->runner->exchanged_bytes());
  }
}

ContextCounts RankHost::Context(size_t replica) const {
  const std::lock_guard lock(load_mutex_);
  return contexts_.at(replica);
}

std::vector<int64_t> RankHost::ExpertLoad(size_t replica) const {
  const std::lock_guard lock(load_mutex_);
  return expert_loads_.at(replica);
}

std::vector<std::vector<RowOutput>> RankHost::Step(const StepPlan& plan) {
  const StepPlan* const plans[] = {&plan};
  return std::move(Step(plans).front());
}

void RankHost::LoadAllWeights(const Checkpoint& checkpoint, int threads) {
  ThreadPool pool(threads);
  int64_t elements = 0;
  for (const ModelTensor& tensor : ModelTensors(config_)) elements += tensor.elements();
  LoadProgress::Options show;
  if (!options_.progress) show.mode = LoadProgress::Mode::kOff;
  LoadProgress progress("Loading weights", elements * static_cast<int64_t>(SizeOf(options_.dtype)), show);
  const auto count = [&](int64_t bytes) { progress.Add(bytes); };
  const int tp = options_.parallel.tensor_parallel;
  const int world = options_.parallel.WorldSize();
  const bool whole = options_.parallel.expert_parallel;
  weights_.resize(static_cast<size_t>(tp));
  if (config_.moe) experts_.resize(static_cast<size_t>(whole ? world : tp));
  for (const int rank : here_) {
    const int i = groups_[static_cast<size_t>(rank)].coord.tp;
    auto& weights = weights_[static_cast<size_t>(i)];
    if (weights == nullptr) weights = LoadWeights(checkpoint, tp, i, options_.dtype, kernels_, pool, count);
  }
  if (config_.moe) {
    const int64_t experts = config_.moe->num_experts;
    for (const int rank : here_) {
      const int i = whole ? rank : groups_[static_cast<size_t>(rank)].coord.tp;
      auto& held = experts_[static_cast<size_t>(i)];
      if (held != nullptr) continue;
      const ExpertSlice slice = whole ? ExpertSlice{.experts = SplitRange(experts, world, i)}
                                      : ExpertSlice{.experts = {0, experts}, .tp_size = tp, .tp = i};
      held = LoadExperts(checkpoint, slice, options_.dtype, kernels_, pool, count);
    }
  }
  progress.Finish();
}

std::vector<int> RankHost::CpusOf(const std::vector<int>& cpus, int index) const {
  if (cpus.empty()) return {};
  const auto first = cpus.begin() + index * threads_per_rank_;
  return {first, first + threads_per_rank_};
}

void RankHost::LearnRates() {
  const bool processes = here_.size() < groups_.size();
  batch_options_.messages = options_.stream;
  const bool asks_when_to_cut = options_.pcp_min_tokens == 0 && options_.parallel.prefill_context_parallel > 1;
  const bool wanted = options_.exchange == ContextExchange::kAuto || asks_when_to_cut;
  if (!processes && !(options_.measure_rates && wanted)) return;
  // The ranks of one team: those of the first replica, where each steps alone, speak for all.
  RunOnAll(teams_.front(), [&](int index) {
    const RankGroups& groups = GroupsOf(index);
    cp::MachineRates rates = options_.rates;
    if (options_.measure_rates) {
      rates = MeasureRates(kernels_, batch_options_.attention, *weights_[static_cast<size_t>(groups.coord.tp)],
                           *ranks_[static_cast<size_t>(index)]->pool, *groups.cp, options_.stream);
    }
    const bool messages = processes && AnyRank(!groups.cp->shares_memory(), *groups.world);
    if (processes) rates = AgreeOnRates(rates, *groups.world);
    if (index != 0) return;
    batch_options_.rates = rates;
    batch_options_.messages = messages || options_.stream;
  });
  cp::QueryCosts& costs = batch_options_.costs;
  if (asks_when_to_cut) {
    const double layer_flop =
        costs.per_token / static_cast<double>(config_.num_layers * options_.parallel.tensor_parallel);
    costs.min_tokens_to_cut =
        cp::MinTokensToCut(batch_options_.rates, static_cast<double>(SizeOf(options_.dtype)), layer_flop,
                           options_.parallel.prefill_context_parallel, batch_options_.solo_max_tokens > 0);
  }
  if (options_.measure_rates) {
    if (asks_when_to_cut) spdlog::info("prompts are cut over PCP ranks from {} new tokens on", costs.min_tokens_to_cut);
    spdlog::info(
        "measured: prefill attention {:.0f} GFLOP/s, reads {:.1f} GB/s a rank{}", batch_options_.rates.flop_per_s / 1e9,
        batch_options_.rates.read_bytes_per_s / 1e9,
        batch_options_.rates.exchange_bytes_per_s > 0
            ? fmt::format(", exchange {:.2f} GB/s and {:.0f} us", batch_options_.rates.exchange_bytes_per_s / 1e9,
                          1e6 * batch_options_.rates.latency_s)
            : "");
  }
}

void RankHost::MakePools(int index, const std::vector<int>& cpus) {
  auto& rank = ranks_[static_cast<size_t>(index)];
  rank = std::make_unique<Rank>();
  RankGroups& groups = GroupsOf(index);
  rank->pool = std::make_unique<ThreadPool>(threads_per_rank_, CpusOf(cpus, index));
  if (batch_options_.solo_max_tokens > 0 && groups.coord.pcp == 0 && groups.pcp->size() > 1) {
    // On the same CPUs as the pools of the PCP group, which sleep while this one works.
    std::vector<int> joint;
    for (int pcp = 0; pcp < groups.pcp->size(); ++pcp) {
      const std::vector<int> part = CpusOf(cpus, index + pcp * options_.parallel.tensor_parallel);
      joint.insert(joint.end(), part.begin(), part.end());
    }
    const int threads = fits_ ? groups.pcp->size() * threads_per_rank_ : 1;
    rank->joint_pool = std::make_unique<ThreadPool>(threads, joint);
  }
}

void RankHost::MakeRank(int index) {
  Rank* rank = ranks_[static_cast<size_t>(index)].get();
  RankGroups& groups = GroupsOf(index);
  rank->cache = std::make_unique<KvCache>(ShapeOf(config_, options_.parallel, options_.kv_dtype, num_blocks_));
  // Where replicas begin in the middle of a process, some groups of a replica are within one and others of the same
  // kind are not: then all of them exchange in messages.
  const bool straddles = here_.size() % replica_size() != 0 && replica_size() % here_.size() != 0;
  rank->runner = std::make_unique<ModelRunner>(Transformer::Options{
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
      .stream = options_.stream || straddles});
}

std::shared_ptr<const ExpertWeights> RankHost::ExpertsOf(const cp::RankCoord& coord) const {
  if (experts_.empty()) return nullptr;
  return experts_[static_cast<size_t>(options_.parallel.expert_parallel ? coord.rank : coord.tp)];
}

int64_t VirtualBlockBytes(const ModelConfig& config, const cp::ParallelConfig& parallel, DType kv_dtype) {
  return ShapeOf(config, parallel, kv_dtype, 1).block_bytes() * parallel.WorldSize() / parallel.data_parallel;
}

}  // namespace weft
