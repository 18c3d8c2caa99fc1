#include "weft/cli/build_engine.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>

#include "weft/cli/commands.h"
#include "weft/cli/kv_size.h"
#include "weft/cli/multi_process.h"
#include "weft/core/log.h"
#include "weft/engine/data_parallel.h"
#include "weft/engine/llm_engine.h"
#include "weft/model/checkpoint.h"
#include "weft/model/model_path.h"
#include "weft/model/weights.h"
#include "weft/runner/executor.h"
#include "weft/runner/mpi_executor.h"
#include "weft/runner/replicas.h"

namespace weft::cli {
namespace {

using nlohmann::json;

DType DTypeOf(const std::string& name, DType automatic) {
  if (name == "auto") return automatic;
  return name == "float32" ? DType::kF32 : DType::kBF16;
}

ContextExchange ExchangeOf(const std::string& name) {
  if (name == "auto") return ContextExchange::kAuto;
  return name == "gather-q" ? ContextExchange::kGatherQ : ContextExchange::kGatherKv;
}

json ReadGenerationConfig(const std::string& folder, bool must_exist) {
  const std::filesystem::path path = std::filesystem::path(folder) / "generation_config.json";
  std::ifstream file(path);
  if (!file) {
    if (must_exist) Throw("--generation-config = {}: there is no generation_config.json in it", folder);
    return json::object();
  }
  json config = json::parse(file, nullptr, false);
  if (!config.is_object()) Throw("{}: not a JSON object", path.string());
  return config;
}

SamplingDefaults LoadSamplingDefaults(const EngineArgs& args, const std::string& model_path) {
  json config = json::object();
  if (args.generation_config == "auto") {
    if (std::filesystem::is_directory(model_path)) config = ReadGenerationConfig(model_path, false);
  } else if (args.generation_config != "vllm") {
    config = ReadGenerationConfig(args.generation_config, true);
  }
  config.update(args.override_generation_config);
  return ParseGenerationConfig(config);
}

int64_t CheckedMaxLen(const EngineArgs& args, int64_t model_max) {
  if (!args.max_model_len) return model_max;
  if (*args.max_model_len > model_max) {
    throw Error(fmt::format("--max-model-len = {}: the model is made for at most {} tokens "
                            "(--hf-overrides.max_position_embeddings changes that)",
                            *args.max_model_len, model_max),
                ErrorKind::kInvalidArgument, "--max-model-len");
  }
  return *args.max_model_len;
}

}  // namespace

cp::ParallelConfig ParallelConfigOf(const EngineArgs& args) {
  return {
      .data_parallel = args.data_parallel,
      .prefill_context_parallel = args.prefill_context_parallel,
      .decode_context_parallel = args.decode_context_parallel,
      .tensor_parallel = args.tensor_parallel,
      .kv_interleave = args.kv_interleave,
      .block_tokens = args.block_size,
      .pcp_kv_layout = args.pcp_kv_layout == "replicated" ? cp::PcpKvLayout::kReplicated : cp::PcpKvLayout::kSharded,
      .expert_parallel = args.expert_parallel};
}

int64_t PcpMinTokensOf(const EngineArgs& args) {
  const std::string& text = args.pcp_min_tokens;
  if (text == "auto") return 0;
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1) {
    throw Error(fmt::format("--pcp-min-tokens = {}: must be auto or a number of at least 1", text),
                ErrorKind::kInvalidArgument, "--pcp-min-tokens");
  }
  return value;
}

SamplingDefaults ParseGenerationConfig(const json& config) {
  SamplingDefaults defaults;
  const auto number = [&](const char* name) -> std::optional<double> {
    const auto found = config.find(name);
    if (found == config.end() || found->is_null()) return std::nullopt;
    if (!found->is_number()) Throw("generation_config.json: {} = {}: must be a number", name, found->dump());
    return found->get<double>();
  };
  const auto integer = [&](const char* name) -> std::optional<int32_t> {
    const auto value = number(name);
    if (!value) return std::nullopt;
    if (*value != static_cast<double>(static_cast<int32_t>(std::clamp(*value, -2e9, 2e9)))) {
      Throw("generation_config.json: {} = {}: must be a whole number", name, *value);
    }
    return static_cast<int32_t>(*value);
  };
  const auto real = [&](const char* name) -> std::optional<float> {
    const auto value = number(name);
    return value ? std::optional(static_cast<float>(*value)) : std::nullopt;
  };
  defaults.temperature = real("temperature");
  defaults.top_p = real("top_p");
  defaults.top_k = integer("top_k");
  defaults.min_p = real("min_p");
  defaults.repetition_penalty = real("repetition_penalty");
  defaults.max_tokens = integer("max_new_tokens");
  return defaults;
}

int64_t ModelMaxLen(const ModelConfig& config) {
  const RopeConfig& rope = config.rope;
  const int64_t positions = config.max_position_embeddings;
  if (rope.type == RopeConfig::Type::kLinear) {
    return static_cast<int64_t>(static_cast<double>(positions) * rope.factor);
  }
  if (rope.type == RopeConfig::Type::kYarn && rope.original_max_position > 0) {
    // Some configs give the length before scaling as max_position_embeddings, some the one after.
    return std::max(positions, static_cast<int64_t>(static_cast<double>(rope.original_max_position) * rope.factor));
  }
  return positions;
}

BuiltEngine BuildEngine(const EngineArgs& args, const BuildOptions& options) {
  BuiltEngine built;
  const std::shared_ptr<Processes> processes = JoinProcesses(args);
  built.several_processes = processes != nullptr;
  const bool follows = processes != nullptr && processes->rank() > 0;
  built.path = ResolveModelPath(args.model);
  std::shared_ptr<const Checkpoint> checkpoint = OpenCheckpoint(built.path, args.hf_overrides);
  built.config = checkpoint->config();
  built.sampling = LoadSamplingDefaults(args, built.path);
  built.parallel = ParallelConfigOf(args);
  ValidateLayout(built.parallel, built.config);

  const DType dtype = DTypeOf(args.dtype, DType::kBF16);
  const DType kv_dtype = DTypeOf(args.kv_cache_dtype, dtype);
  const int64_t model_max = ModelMaxLen(built.config);
  const int64_t weight_bytes = WeightBytes(built.config, dtype);
  const int64_t available = AvailableMemoryBytes();
  const HostShare share = processes != nullptr ? ShareOfHost(built.parallel, *processes) : HostShare{};
  if (static_cast<double>(weight_bytes) * share.weights > static_cast<double>(available)) {
    Throw("{}: its weights take {:.2f} GiB as {}, but {:.2f} GiB of memory are available", args.model,
          static_cast<double>(weight_bytes) / (1 << 30), NameOf(dtype), static_cast<double>(available) / (1 << 30));
  }
  const cp::KvLayout layout = LayoutOf(built.parallel);
  const KvSizeInput size_input{.block_bytes = VirtualBlockBytes(built.config, built.parallel, kv_dtype),
                               .block_tokens = layout.VirtualBlockTokens(),
                               .weight_bytes = weight_bytes,
                               .available_bytes = available,
                               .max_model_len = CheckedMaxLen(args, model_max),
                               .model_max_len = model_max,
                               .max_num_seqs = args.max_num_seqs,
                               .num_blocks = args.num_blocks_override,
                               .kv_bytes = args.kv_cache_memory,
                               .utilization = args.memory_utilization,
                               .replicas = args.data_parallel};
  const KvSize size = processes != nullptr ? SizeKvCacheOfAll(size_input, share, *processes) : SizeKvCache(size_input);

  LLMEngineOptions engine;
  engine.scheduler.max_model_len = size.max_model_len;
  engine.scheduler.max_num_seqs = args.max_num_seqs;
  engine.scheduler.chunked_prefill = args.chunked_prefill;
  engine.scheduler.prefix_caching = args.prefix_caching;
  engine.scheduler.max_num_batched_tokens = args.max_num_batched_tokens.value_or(
      std::max({int64_t{2048}, args.max_num_seqs, args.chunked_prefill ? int64_t{0} : size.max_model_len}));
  Validate(engine.scheduler);  // before the weights are loaded
  engine.kv_layout = layout;
  engine.vocab_size = built.config.vocab_size;
  engine.max_logprobs = args.max_logprobs;
  engine.max_num_queued_reqs = options.max_num_queued_reqs;
  engine.priority_scheduling = args.scheduling_policy == "priority";
  engine.log_requests = options.log_requests;
  engine.log_stats_interval_s = options.log_stats_interval_s;

  if (!args.skip_tokenizer_init && !follows) {
    built.tokenizer = LoadTokenizer(args.tokenizer ? ResolveModelPath(*args.tokenizer) : built.path);
  }
  engine.eos_token_ids = built.config.eos_token_ids;
  if (built.tokenizer != nullptr) {
    for (const int32_t id : built.tokenizer->eos_token_ids()) {
      if (std::find(engine.eos_token_ids.begin(), engine.eos_token_ids.end(), id) == engine.eos_token_ids.end()) {
        engine.eos_token_ids.push_back(id);
      }
    }
  }

  spdlog::info("weft {}: {}: {} with {} layers, weights {} ({:.2f} GiB), TP {} PCP {} DCP {} DP {}{}", kVersion,
               built.path, built.config.architecture, built.config.num_layers, NameOf(dtype),
               static_cast<double>(weight_bytes) / (1 << 30), args.tensor_parallel, args.prefill_context_parallel,
               args.decode_context_parallel, args.data_parallel, args.expert_parallel ? ", expert parallel" : "");
  const ExecutorOptions executor_options{.parallel = built.parallel,
                                         .dtype = dtype,
                                         .kv_dtype = kv_dtype,
                                         .kernels = args.kernels,
                                         .threads_per_rank = args.threads_per_rank,
                                         .num_blocks = size.num_blocks,
                                         .max_model_len = size.max_model_len,
                                         .exchange = ExchangeOf(args.context_exchange),
                                         .measure_rates = true,
                                         .pcp_min_tokens = PcpMinTokensOf(args),
                                         .context_segment_tokens = args.context_segment_tokens,
                                         .seed = static_cast<uint64_t>(args.seed),
                                         .progress = options.progress,
                                         .step_timeout_s = args.step_timeout_s};
  if (follows) {
    FollowSteps(executor_options, std::move(checkpoint), processes);
    return built;
  }
  std::vector<std::unique_ptr<StepExecutor>> executors;
  if (processes != nullptr) {
    executors = MakeMpiExecutors(executor_options, std::move(checkpoint), processes);
  } else {
    executors = MakeReplicaExecutors(executor_options, std::move(checkpoint));
  }
  std::vector<std::unique_ptr<LLMEngine>> replicas;
  for (auto& executor : executors) {
    replicas.push_back(std::make_unique<LLMEngine>(engine, std::move(executor), built.tokenizer));
  }
  const int64_t capacity = replicas.front()->kv_capacity_tokens();
  spdlog::info("KV cache ({}): {} tokens, {:.1f} requests of {} tokens{}", NameOf(kv_dtype), capacity,
               static_cast<double>(capacity) / static_cast<double>(size.max_model_len), size.max_model_len,
               replicas.size() == 1 ? "" : fmt::format(", on each of {} replicas", replicas.size()));
  if (replicas.size() == 1) {
    built.engine = std::move(replicas.front());
  } else {
    built.engine = std::make_unique<DataParallelEngine>(std::move(replicas));
  }
  return built;
}

}  // namespace weft::cli
