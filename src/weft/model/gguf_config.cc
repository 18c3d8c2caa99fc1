// Metadata of a GGUF file as the fields of a config.json.
#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>

#include "weft/core/error.h"
#include "weft/model/gguf_checkpoint.h"

namespace weft::internal {
namespace {

using Json = nlohmann::json;

struct Name {
  std::string_view hf, gguf;
};
constexpr std::array<Name, 3> kTopNames = {
    {{"model.embed_tokens", "token_embd"}, {"model.norm", "output_norm"}, {"lm_head", "output"}}};
constexpr std::array<Name, 11> kLayerNames = {{{"input_layernorm", "attn_norm"},
                                               {"self_attn.q_proj", "attn_q"},
                                               {"self_attn.k_proj", "attn_k"},
                                               {"self_attn.v_proj", "attn_v"},
                                               {"self_attn.o_proj", "attn_output"},
                                               {"self_attn.q_norm", "attn_q_norm"},
                                               {"self_attn.k_norm", "attn_k_norm"},
                                               {"post_attention_layernorm", "ffn_norm"},
                                               {"mlp.gate_proj", "ffn_gate"},
                                               {"mlp.up_proj", "ffn_up"},
                                               {"mlp.down_proj", "ffn_down"}}};

// A count that is either one number or, in files written layer by layer, an array of equal numbers.
std::optional<int64_t> Uniform(const GgufFile& file, const std::string& key) {
  if (!file.IsArray(key)) return file.GetI64(key);
  const auto values = file.GetI64Array(key);
  if (values->empty()) Throw("{}: key \"{}\" is an empty array", file.path(), key);
  for (const int64_t value : *values) {
    if (value != values->front()) {
      Throw("{}: key \"{}\" differs between layers ({} and {}): not supported", file.path(), key, values->front(),
            value);
    }
  }
  return values->front();
}

// f32 metadata as the decimal number that was meant: 1e-05 and not 9.99999974e-06.
std::optional<double> Decimal(const GgufFile& file, const std::string& key) {
  const auto value = file.GetF64(key);
  if (!value) return std::nullopt;
  const auto narrow = static_cast<float>(*value);
  if (static_cast<double>(narrow) != *value || !std::isfinite(narrow)) return value;  // was stored as more than f32
  char text[32];
  const auto written = std::to_chars(text, text + sizeof(text), narrow);  // the shortest text that reads back as narrow
  double exact = 0;
  std::from_chars(text, written.ptr, exact);
  return exact;
}

Json RopeScaling(const GgufFile& file, const std::string& arch) {
  const std::string prefix = arch + ".rope.scaling.";
  const auto linear = file.GetF64(arch + ".rope.scale_linear");  // the key of older files
  const std::string type(
      file.GetString(prefix + "type").value_or(linear && *linear != 1.0 ? std::string_view("linear") : "none"));
  if (type == "none") return nullptr;
  Json scaling = {{"rope_type", type}};
  const auto factor = Decimal(file, prefix + "factor");
  if (factor && *factor != 0.0) {
    scaling["factor"] = *factor;
  } else if (linear) {
    scaling["factor"] = *linear;
  }
  if (type == "linear") return scaling;
  if (type != "yarn") {
    Throw("{}: key \"{}type\" = \"{}\": not supported; none, linear and yarn are", file.path(), prefix, type);
  }
  if (const auto original = file.GetU64(prefix + "original_context_length")) {
    scaling["original_max_position_embeddings"] = *original;
  }
  for (const auto& [key, field] :
       {std::pair{"yarn_beta_fast", "beta_fast"}, std::pair{"yarn_beta_slow", "beta_slow"}}) {
    if (const auto value = Decimal(file, prefix + key)) scaling[field] = *value;
  }
  // A further factor on top of yarn's own.
  std::optional<double> extra = Decimal(file, prefix + "attn_factor");
  if (!extra) extra = Decimal(file, prefix + "yarn_attn_factor");
  if (extra && *extra != 1.0 && factor && *factor > 1.0) {
    scaling["attention_factor"] = *extra * (0.1 * std::log(*factor) + 1.0);
  }
  return scaling;
}

void RefuseWhatChangesTheModel(const GgufFile& file, const std::string& arch, int64_t context_length) {
  const auto refuse_above_zero = [&](const std::string& key, const char* what) {
    const auto value = Uniform(file, key);
    if (value && *value > 0) Throw("{}: key \"{}\" = {}: {} not supported", file.path(), key, *value, what);
  };
  refuse_above_zero(arch + ".expert_count", "mixtures of experts are");
  const std::string window = arch + ".attention.sliding_window";
  const auto tokens = Uniform(file, window);
  if (tokens && *tokens > 0 && *tokens < context_length) {
    Throw("{}: key \"{}\" = {}: sliding-window attention is not supported", file.path(), window, *tokens);
  }
}

}  // namespace

std::optional<std::string> GgufTensorName(std::string_view hf_name) {
  const size_t dot = hf_name.rfind('.');
  if (dot == hf_name.npos) return std::nullopt;
  const std::string_view module = hf_name.substr(0, dot), kind = hf_name.substr(dot);
  if (kind != ".weight" && kind != ".bias") return std::nullopt;
  for (const Name& name : kTopNames) {
    if (module == name.hf) return fmt::format("{}{}", name.gguf, kind);
  }
  constexpr std::string_view kPrefix = "model.layers.";
  if (!module.starts_with(kPrefix)) return std::nullopt;
  const std::string_view rest = module.substr(kPrefix.size());
  const size_t end = rest.find('.');
  if (end == rest.npos || end == 0 || end > 9) return std::nullopt;
  const std::string_view layer = rest.substr(0, end);
  if (!std::all_of(layer.begin(), layer.end(), [](char c) { return c >= '0' && c <= '9'; })) return std::nullopt;
  for (const Name& name : kLayerNames) {
    if (rest.substr(end + 1) == name.hf) return fmt::format("blk.{}.{}{}", layer, name.gguf, kind);
  }
  return std::nullopt;
}

nlohmann::json GgufToHfConfig(const GgufFile& file) {
  const std::string arch(file.RequireString("general.architecture"));
  Json config;
  if (arch == "llama") {
    config["architectures"] = {"LlamaForCausalLM"};
  } else if (arch == "qwen2") {
    config["architectures"] = {"Qwen2ForCausalLM"};
  } else if (arch == "qwen3") {
    config["architectures"] = {"Qwen3ForCausalLM"};
  } else {
    Throw("{}: key \"general.architecture\" = \"{}\": not supported; llama, qwen2 and qwen3 are", file.path(), arch);
  }
  const auto required = [&](const std::string& name) {
    const std::string key = fmt::format("{}.{}", arch, name);
    const auto value = Uniform(file, key);
    if (!value) Throw("{}: key \"{}\" is missing", file.path(), key);
    return *value;
  };
  config["hidden_size"] = required("embedding_length");
  config["intermediate_size"] = required("feed_forward_length");
  config["num_hidden_layers"] = required("block_count");
  const int64_t heads = required("attention.head_count");
  config["num_attention_heads"] = heads;
  config["num_key_value_heads"] = Uniform(file, arch + ".attention.head_count_kv").value_or(heads);
  const int64_t context_length = required("context_length");
  config["max_position_embeddings"] = context_length;
  RefuseWhatChangesTheModel(file, arch, context_length);

  const auto key_length = Uniform(file, arch + ".attention.key_length");
  const auto value_length = Uniform(file, arch + ".attention.value_length");
  if (key_length.value_or(-1) != value_length.value_or(-1)) {
    Throw("{}: keys \"{}.attention.key_length\" and value_length differ ({} and {}): not supported", file.path(), arch,
          key_length.value_or(-1), value_length.value_or(-1));
  }
  // Null rather than absent: the default is embedding_length / head_count in every architecture here.
  config["head_dim"] = key_length ? Json(*key_length) : Json(nullptr);
  const std::string epsilon = arch + ".attention.layer_norm_rms_epsilon";
  const auto eps = Decimal(file, epsilon);
  if (!eps) Throw("{}: key \"{}\" is missing", file.path(), epsilon);
  config["rms_norm_eps"] = *eps;

  config["rope_theta"] = Decimal(file, arch + ".rope.freq_base").value_or(10000.0);
  config["rope_scaling"] = RopeScaling(file, arch);
  if (const auto rotary = file.GetI64(arch + ".rope.dimension_count")) {
    const int64_t head_dim = key_length ? *key_length : heads > 0 ? config["hidden_size"].get<int64_t>() / heads : 0;
    if (*rotary != head_dim) {
      Throw("{}: key \"{}.rope.dimension_count\" = {}: must be the {} dimensions of a head", file.path(), arch, *rotary,
            head_dim);
    }
  }

  const GgufTensorInfo* embedding = file.FindTensor("token_embd.weight");
  if (embedding != nullptr && embedding->dims.size() == 2) {
    config["vocab_size"] = embedding->dims[1];
  } else if (const auto vocab = file.GetU64(arch + ".vocab_size")) {
    config["vocab_size"] = *vocab;
  } else if (const auto tokens = file.GetStringArray("tokenizer.ggml.tokens")) {
    config["vocab_size"] = tokens->size();
  }
  if (const auto bos = file.GetI64("tokenizer.ggml.bos_token_id")) config["bos_token_id"] = *bos;
  Json eos = Json::array();
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    if (const auto id = file.GetI64(key)) eos.push_back(*id);
  }
  config["eos_token_id"] = eos;
  return config;
}

}  // namespace weft::internal
