#pragma once
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "weft/api/openai_request.h"
#include "weft/cli/engine_args.h"
#include "weft/cp/grid.h"
#include "weft/engine/engine.h"
#include "weft/model/config.h"
#include "weft/text/tokenizer.h"

namespace weft::cli {

// A loaded model that takes requests.
struct BuiltEngine {
  std::string path;  // of the model's files
  ModelConfig config;
  cp::ParallelConfig parallel;
  std::shared_ptr<const Tokenizer> tokenizer;  // null with --skip-tokenizer-init
  SamplingDefaults sampling;                   // for what a request leaves out
  // Null in all but the first of several processes: they have done their part by then, and nothing is left to do.
  std::unique_ptr<Engine> engine;
  bool several_processes = false;
};

struct BuildOptions {
  bool progress = true;
  bool log_requests = false;
  double log_stats_interval_s = 0;
  int64_t max_num_queued_reqs = 0;
};

// What the options say; nothing is checked against a model yet.
cp::ParallelConfig ParallelConfigOf(const EngineArgs& args);
// --pcp-min-tokens, 0 for auto. Throws weft::Error.
int64_t PcpMinTokensOf(const EngineArgs& args);

// Throws weft::Error. Collective where mpirun has started several processes: returns in the others when process 0 lets
// them go.
BuiltEngine BuildEngine(const EngineArgs& args, const BuildOptions& options = {});

// The longest sequence that the model's positions are made for, with what its rope scaling adds.
int64_t ModelMaxLen(const ModelConfig& config);

// The fields of generation_config.json that requests may leave out. Throws weft::Error for a value of a wrong type.
SamplingDefaults ParseGenerationConfig(const nlohmann::json& config);

}  // namespace weft::cli
