#pragma once
// The options that every command with a model has: which model, how it is split, how much it may take.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "weft/core/options.h"

namespace weft::cli {

struct EngineArgs {
  std::string model;
  std::optional<std::string> tokenizer;
  bool skip_tokenizer_init = false;
  std::string dtype = "auto";
  int64_t seed = 0;
  std::optional<int64_t> max_model_len;
  int32_t max_logprobs = 20;
  nlohmann::json hf_overrides = nlohmann::json::object();
  std::string generation_config = "auto";
  nlohmann::json override_generation_config = nlohmann::json::object();

  int32_t data_parallel = 1;
  int32_t tensor_parallel = 1;
  int32_t prefill_context_parallel = 1;
  int32_t decode_context_parallel = 1;
  int32_t kv_interleave = 1;
  std::string pcp_kv_layout = "sharded";
  std::string pcp_min_tokens = "auto";
  std::string context_exchange = "auto";
  int64_t context_segment_tokens = 8192;
  bool expert_parallel = false;
  int32_t threads_per_rank = 0;
  std::string kernels = "auto";

  int32_t block_size = 128;
  std::string kv_cache_dtype = "auto";
  std::optional<double> memory_utilization;
  std::optional<int64_t> kv_cache_memory;
  std::optional<int64_t> num_blocks_override;

  int64_t max_num_seqs = 256;
  std::optional<int64_t> max_num_batched_tokens;
  bool chunked_prefill = true;
  bool prefix_caching = true;
  std::string scheduling_policy = "fcfs";

  double step_timeout_s = 600;

  std::string log_level = "info";

  // vLLM's way to start on several hosts; here mpirun's part. See JoinProcesses.
  struct Nodes {
    int32_t count = 1;
    int32_t rank = 0;
    std::string master_addr = "127.0.0.1";
    int32_t master_port = 29501;
    bool headless = false;
  } nodes;

  // Exist for scripts written for vLLM: taken at their defaults, else refused or of no effect.
  struct Foreign {
    bool trust_remote_code = false;
    bool enforce_eager = false;
    bool async_scheduling = false;
    int32_t pipeline_parallel = 1;
    std::string executor_backend = "mp";
    double swap_space = 4;
    double cpu_offload = 0;
    std::optional<std::string> quantization;
    std::optional<std::string> compilation_config;
    std::string load_format = "auto";
    nlohmann::json speculative_config = nlohmann::json::object();
    nlohmann::json kv_transfer_config = nlohmann::json::object();
    nlohmann::json additional_config = nlohmann::json::object();
  } foreign;
};

// Of them, those that say how a prompt and its KV cache are laid out over the ranks (not --block-size).
void DeclareLayoutOptions(OptionSet& options, EngineArgs& args);
void DeclareEngineOptions(OptionSet& options, EngineArgs& args);

}  // namespace weft::cli
