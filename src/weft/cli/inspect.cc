#include <iostream>
#include <map>

#include "weft/cli/build_engine.h"
#include "weft/cli/commands.h"
#include "weft/core/log.h"
#include "weft/model/checkpoint.h"
#include "weft/model/model_path.h"

namespace weft::cli {
namespace {

const char* NameOfRope(RopeConfig::Type type) {
  switch (type) {
    case RopeConfig::Type::kDefault:
      return "default";
    case RopeConfig::Type::kLinear:
      return "linear";
    case RopeConfig::Type::kLlama3:
      return "llama3";
    case RopeConfig::Type::kYarn:
      return "yarn";
  }
  return "";
}

// The names that the supported families use.
std::vector<std::string> TensorNames(const ModelConfig& config) {
  std::vector<std::string> names = {"model.embed_tokens.weight"};
  for (int64_t i = 0; i < config.num_layers; ++i) {
    for (const char* name :
         {"input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.q_proj.bias", "self_attn.k_proj.weight",
          "self_attn.k_proj.bias", "self_attn.v_proj.weight", "self_attn.v_proj.bias", "self_attn.q_norm.weight",
          "self_attn.k_norm.weight", "self_attn.o_proj.weight", "self_attn.o_proj.bias",
          "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.gate_proj.bias", "mlp.up_proj.weight",
          "mlp.up_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias"}) {
      names.push_back(fmt::format("model.layers.{}.{}", i, name));
    }
  }
  names.push_back("model.norm.weight");
  names.push_back("lm_head.weight");
  return names;
}

class Inspect : public Command {
 public:
  Inspect() : options_("weft inspect", "Shows what a model's files hold.", "MODEL", &model_) {
    options_.Group("Output");
    options_.Add("tensors", &tensors_, "List the tensors.");
    options_.Add("hf-overrides", &overrides_, "Replaces fields of config.json: a JSON object, or dotted keys.");
  }

  OptionSet& options() override { return options_; }

  int Run() override {
    InitLogging("warning");
    const std::string path = ResolveModelPath(model_);
    const auto checkpoint = OpenCheckpoint(path, overrides_);
    const ModelConfig& c = checkpoint->config();
    int64_t parameters = 0;
    std::string list;
    for (const std::string& name : TensorNames(c)) {
      if (!checkpoint->Has(name)) continue;
      const std::vector<int64_t> shape = checkpoint->Shape(name);
      int64_t count = 1;
      for (const int64_t n : shape) count *= n;
      parameters += count;
      list += fmt::format("  {:48} {:8} [{}]\n", name, NameOf(checkpoint->NaturalDType(name)), fmt::join(shape, ", "));
    }
    const auto row = [](const char* name, const auto& value) { std::cout << fmt::format("{:24}{}\n", name, value); };
    row("path", path);
    row("architecture", c.architecture);
    row("parameters", fmt::format("{} ({:.2f} B)", parameters, static_cast<double>(parameters) / 1e9));
    row("tensor bytes in files", checkpoint->total_bytes());
    row("layers", c.num_layers);
    row("hidden size", c.hidden_size);
    row("intermediate size", c.intermediate_size);
    row("attention heads", c.num_heads);
    row("KV heads", c.num_kv_heads);
    row("head dim", c.head_dim);
    row("vocabulary", c.vocab_size);
    row("rope", fmt::format("{}, theta {}", NameOfRope(c.rope.type), c.rope.theta));
    row("longest sequence", ModelMaxLen(c));
    row("tied embeddings", c.tie_word_embeddings ? "yes" : "no");
    row("EOS token ids", fmt::format("{}", fmt::join(c.eos_token_ids, ", ")));
    const int64_t kv = 2 * c.num_layers * c.num_kv_heads * c.head_dim;
    row("KV bytes a token", fmt::format("{} as bfloat16, {} as float32", 2 * kv, 4 * kv));
    if (tensors_) std::cout << "tensors (types as they are read)\n" << list;
    return 0;
  }

 private:
  std::string model_;
  bool tensors_ = false;
  nlohmann::json overrides_ = nlohmann::json::object();
  OptionSet options_;
};

}  // namespace

std::unique_ptr<Command> MakeInspect() { return std::make_unique<Inspect>(); }

}  // namespace weft::cli
