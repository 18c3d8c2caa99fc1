// weft-make-checkpoint: a checkpoint of random weights from any supported config.json, to measure speed with.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "weft/core/error.h"
#include "weft/core/log.h"
#include "weft/model/config.h"
#include "weft/model/file_io.h"
#include "weft/model/progress.h"
#include "weft/model/random_checkpoint.h"

namespace {

int Run(const std::string& config_path, const std::string& out, const weft::ConfigCut& cut, const std::string& dtype,
        double shard_gib, uint64_t seed) {
  const nlohmann::json config = weft::CutConfig(weft::ReadJsonFile(config_path), cut);
  weft::RandomCheckpointOptions options;
  options.seed = seed;
  options.dtype = dtype == "f32" ? weft::DType::kF32 : weft::DType::kBF16;
  options.max_shard_bytes = static_cast<int64_t>(shard_gib * 1073741824.0);
  int64_t total = 0;
  for (const weft::ModelTensor& tensor : weft::ModelTensors(weft::ParseModelConfig(config))) {
    total += tensor.elements() * static_cast<int64_t>(weft::SizeOf(options.dtype));
  }
  weft::LoadProgress progress("Writing " + out, total);
  options.on_bytes = [&](int64_t bytes) { progress.Add(bytes); };
  weft::WriteRandomCheckpoint(config, out, options);
  progress.Finish();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Writes a checkpoint of random weights in Hugging Face layout (no tokenizer)", "weft-make-checkpoint");
  std::string config, out, dtype = "bf16";
  weft::ConfigCut cut;
  double shard_gib = 4.0;
  uint64_t seed = 0;
  app.add_option("--config", config, "config.json of the model")->required();
  app.add_option("--out", out, "folder to write to; must hold no model yet")->required();
  app.add_option("--seed", seed, "of the weights")->capture_default_str();
  app.add_option("--layers", cut.layers, "the first so many of the config's; one with experts is always among them")
      ->check(CLI::PositiveNumber);
  app.add_option("--experts", cut.experts, "so many of the config's routed experts")->check(CLI::PositiveNumber);
  app.add_option("--dtype", dtype, "of the weights")->check(CLI::IsMember({"bf16", "f32"}))->capture_default_str();
  app.add_option("--shard-gib", shard_gib, "largest size of a file, GiB")
      ->check(CLI::Range(1e-6, 1e6))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    weft::InitLogging();
    return Run(config, out, cut, dtype, shard_gib, seed);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "weft-make-checkpoint: %s\n", error.what());
    return 1;
  }
}
