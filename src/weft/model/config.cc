#include "weft/model/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string_view>

#include "weft/core/error.h"
#include "weft/model/config_fields.h"

namespace weft {
namespace {

using internal::Fields;
using internal::Json;
using internal::kMaxHeadDim;
using internal::kMaxHeads;
using internal::kMaxLayers;
using internal::kMaxPositions;
using internal::kMaxVocab;
using internal::kMaxWidth;
using internal::Show;

struct Family {
  std::string_view architecture;
  std::string_view model_type;
};
constexpr std::array<Family, 8> kFamilies = {{{"LlamaForCausalLM", "llama"},
                                              {"MistralForCausalLM", "mistral"},
                                              {"Qwen2ForCausalLM", "qwen2"},
                                              {"Qwen3ForCausalLM", "qwen3"},
                                              {"Qwen2MoeForCausalLM", "qwen2_moe"},
                                              {"Qwen3MoeForCausalLM", "qwen3_moe"},
                                              {"DeepseekV2ForCausalLM", "deepseek_v2"},
                                              {"DeepseekV3ForCausalLM", "deepseek_v3"}}};

bool IsDeepseek(const ModelConfig& c) { return c.model_type.starts_with("deepseek"); }
bool IsQwen2(const ModelConfig& c) { return c.model_type.starts_with("qwen2"); }
bool IsQwen3(const ModelConfig& c) { return c.model_type.starts_with("qwen3"); }

const Family& FindFamily(const Fields& fields) {
  std::string supported;
  for (const Family& family : kFamilies) {
    supported += (supported.empty() ? "" : ", ") + std::string(family.architecture);
  }
  if (const Json* list = fields.Find("architectures")) {
    if (!list->is_array()) fields.Refuse("architectures", *list, "must be a list of names");
    for (const Json& entry : *list) {
      for (const Family& family : kFamilies) {
        if (entry.is_string() && entry.get_ref<const std::string&>() == family.architecture) return family;
      }
    }
    if (!list->empty()) fields.Refuse("architectures", *list, "not supported; these are: " + supported);
  }
  const std::string type = fields.String("model_type", "");
  for (const Family& family : kFamilies) {
    if (type == family.model_type) return family;
  }
  if (type.empty()) fields.Missing("architectures");
  fields.Refuse("model_type", type, "not supported; these architectures are: " + supported);
}

// Qwen's config.json carries sliding_window even where it is off; only a window that some layer uses within
// max_position_embeddings would change the result.
void RefuseSlidingWindow(const Fields& fields, const ModelConfig& c) {
  constexpr auto kRule = "sliding-window attention is not supported";
  if (const Json* types = fields.Find("layer_types")) {
    if (!types->is_array()) fields.Refuse("layer_types", *types, "must be a list");
    for (const Json& type : *types) {
      if (type != "full_attention") fields.Refuse("layer_types", type, kRule);
    }
    return;
  }
  int64_t window = fields.Int("sliding_window", 0, kMaxPositions, 0);
  if (c.model_type == "mistral") {
    if (!fields.Present("sliding_window"))
      window = 4096;  // the class's default; published configs say null or a number
    if (window > 0 && window < c.max_position_embeddings) fields.Refuse("sliding_window", window, kRule);
    return;
  }
  if (!IsQwen2(c) && !IsQwen3(c)) return;
  if (!fields.Bool("use_sliding_window", false)) return;
  if (!fields.Present("sliding_window")) window = 4096;
  // Qwen3-MoE's class reads max_window_layers nowhere: its window is that of all layers.
  const int64_t full_layers = c.model_type == "qwen3_moe" ? 0 : fields.Int("max_window_layers", 0, kMaxLayers, 28);
  if (window > 0 && window < c.max_position_embeddings && full_layers < c.num_layers) {
    fields.Refuse("use_sliding_window", true, kRule);
  }
}

void AddEos(const Fields& fields, std::vector<int32_t>& ids) {
  const Json* value = fields.Find("eos_token_id");
  if (value == nullptr) return;
  const auto add = [&](const Json& id) {
    const auto token = static_cast<int32_t>(fields.ToInt("eos_token_id", id, 0, std::numeric_limits<int32_t>::max()));
    if (std::find(ids.begin(), ids.end(), token) == ids.end()) ids.push_back(token);
  };
  if (value->is_array()) {
    for (const Json& id : *value) add(id);
  } else {
    add(*value);
  }
}

// Attention heads of their own keys and values.
void ParseHeads(const Fields& fields, ModelConfig& c) {
  // Null means one KV head per head in all families; absent does so only in Llama's class, the others have odd
  // defaults.
  const bool kv_defaults = c.model_type == "llama" || fields.Present("num_key_value_heads");
  c.num_kv_heads =
      fields.Int("num_key_value_heads", 1, kMaxHeads, kv_defaults ? std::optional<int64_t>(c.num_heads) : std::nullopt);
  if (c.num_heads % c.num_kv_heads != 0) {
    fields.Refuse("num_key_value_heads", c.num_kv_heads,
                  fmt::format("must divide num_attention_heads = {}", c.num_heads));
  }
  if (fields.Find("head_dim") != nullptr) {
    c.head_dim = fields.Int("head_dim", 1, kMaxHeadDim);
  } else if (c.model_type == "qwen3" && !fields.Present("head_dim")) {
    c.head_dim = 128;  // Qwen3Config's default, whatever hidden_size is
  } else if (c.hidden_size % c.num_heads != 0) {
    fields.Refuse("hidden_size", c.hidden_size,
                  fmt::format("must be a multiple of num_attention_heads = {} where head_dim is absent", c.num_heads));
  } else {
    c.head_dim = c.hidden_size / c.num_heads;
  }
  if (c.num_heads * c.head_dim > kMaxWidth) {
    fields.Refuse("head_dim", c.head_dim, fmt::format("num_attention_heads * head_dim is above {}", kMaxWidth));
  }
}

int64_t DefaultPositions(const ModelConfig& c) {
  if (c.model_type == "llama" || c.model_type == "deepseek_v2") return 2048;
  return c.model_type == "deepseek_v3" ? 4096 : 32768;
}

// Block-scaled FP8, as DeepSeek-V3 and Qwen3 are published: the one quantisation that Checkpoint::Read undoes.
void ParseQuantization(const Fields& fields, ModelConfig& c) {
  const Json* quantization = fields.Find("quantization_config");
  if (quantization == nullptr) return;
  if (!quantization->is_object()) fields.Refuse("quantization_config", *quantization, "must be an object");
  const Fields quant(*quantization, "quantization_config.");
  const std::string method = quant.String("quant_method", "");
  if (method != "fp8") {
    const char* name = quant.Find("quant_method") != nullptr ? "quant_method" : "quant_type";
    const Json* value = quant.Find(name);
    const char* rule = "this quantisation is not supported; fp8 with weight_block_size is";
    if (value != nullptr) quant.Refuse(name, *value, rule);
    fields.Refuse("quantization_config", *quantization, rule);
  }
  const std::string format = quant.String("fmt", "e4m3");
  if (format != "e4m3" && format != "float8_e4m3fn") quant.Refuse("fmt", format, "not supported; e4m3 is");
  const Json* block = quant.Find("weight_block_size");
  if (block == nullptr) quant.Missing("weight_block_size");
  if (!block->is_array() || block->size() != 2) {
    quant.Refuse("weight_block_size", *block, "must be two numbers: rows and columns");
  }
  c.fp8_blocks = Fp8Blocks{quant.ToInt("weight_block_size", (*block)[0], 1, kMaxWidth),
                           quant.ToInt("weight_block_size", (*block)[1], 1, kMaxWidth)};
}

std::optional<DType> ParseDType(const Fields& fields) {
  const char* name = fields.Find("dtype") != nullptr ? "dtype" : "torch_dtype";
  std::string text = fields.String(name, "");
  if (text.starts_with("torch.")) text = text.substr(6);
  if (text == "float32") return DType::kF32;
  if (text == "float16") return DType::kF16;
  if (text == "bfloat16") return DType::kBF16;
  return std::nullopt;  // only a hint: the files say what the weights are
}

}  // namespace

ModelConfig ParseModelConfig(const Json& config) {
  if (!config.is_object()) Throw("model config: must be a JSON object, not {}", config.type_name());
  const Fields fields(config, "");
  const Family& family = FindFamily(fields);

  ModelConfig c;
  c.architecture = family.architecture;
  c.model_type = family.model_type;
  ParseQuantization(fields, c);
  c.hidden_size = fields.Int("hidden_size", 1, kMaxWidth);
  c.intermediate_size = fields.Int("intermediate_size", 1, kMaxWidth);
  c.num_layers = fields.Int("num_hidden_layers", 1, kMaxLayers);
  c.num_heads = fields.Int("num_attention_heads", 1, kMaxHeads);
  if (IsDeepseek(c)) {
    internal::ParseLatentAttention(fields, c);
  } else {
    ParseHeads(fields, c);
  }
  c.vocab_size = fields.Int("vocab_size", 1, kMaxVocab);
  c.max_position_embeddings = fields.Int("max_position_embeddings", 1, kMaxPositions, DefaultPositions(c));
  c.rms_norm_eps = static_cast<float>(fields.Number("rms_norm_eps", 0.0, 1.0, 1e-6));
  c.tie_word_embeddings = fields.Bool("tie_word_embeddings", false);

  const std::string activation = fields.String("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    fields.Refuse("hidden_act", activation, "not supported; silu is");
  }
  if (IsQwen2(c)) {
    // Qwen2's is in the original's code, not in its config.
    c.qkv_bias = c.model_type == "qwen2" || fields.Bool("qkv_bias", true);
  } else if (c.model_type != "mistral") {
    c.qkv_bias = c.o_bias = fields.Bool("attention_bias", false);
  }
  if (c.model_type == "llama") c.mlp_bias = fields.Bool("mlp_bias", false);
  c.qk_norm = IsQwen3(c);

  double partial_rotary_factor = 1.0;
  c.rope = internal::ParseRope(fields, c.max_position_embeddings, &partial_rotary_factor);
  if (!c.mla) {
    c.rotary_dim = static_cast<int64_t>(static_cast<double>(c.head_dim) * partial_rotary_factor);
    if (c.rotary_dim < 2 || c.rotary_dim % 2 != 0) {
      fields.Refuse("head_dim", c.head_dim,
                    fmt::format("rope turns {} of these dimensions: must be an even number, 2 at least", c.rotary_dim));
    }
  }
  if (IsDeepseek(c) || c.model_type.ends_with("_moe")) internal::ParseExperts(fields, c);
  RefuseSlidingWindow(fields, c);

  if (const Json* bos = fields.Find("bos_token_id"); bos != nullptr && !bos->is_array()) {
    c.bos_token_id = static_cast<int32_t>(fields.Int("bos_token_id", 0, std::numeric_limits<int32_t>::max()));
  }
  AddEos(fields, c.eos_token_ids);
  c.dtype = ParseDType(fields);
  return c;
}

void ApplyConfigOverrides(const Json& overrides, Json& config) {
  if (overrides.is_null()) return;
  if (!overrides.is_object()) Throw("hf-overrides = {}: must be a JSON object", Show(overrides));
  // rope_parameters of the file would hide a rope_theta given beside it, and its type a rope_scaling of null.
  if (!overrides.contains("rope_parameters") && config.contains("rope_parameters")) {
    Json& parameters = config["rope_parameters"];
    if (overrides.contains("rope_scaling") && parameters.is_object()) {
      Json kept = Json::object();
      for (const char* name : {"rope_theta", "partial_rotary_factor"}) {
        if (parameters.contains(name)) kept[name] = parameters[name];
      }
      parameters = std::move(kept);
    }
    if (overrides.contains("rope_theta") && parameters.is_object()) parameters.erase("rope_theta");
  }
  config.update(overrides);
}

void AddGenerationConfig(const Json& generation_config, ModelConfig& config) {
  if (!generation_config.is_object()) Throw("generation_config.json: must be a JSON object");
  AddEos(Fields(generation_config, "generation_config.json: "), config.eos_token_ids);
}

double ModelConfig::attention_scale() const {
  double scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  if (mla && rope.type == RopeConfig::Type::kYarn && rope.mscale_all_dim.value_or(0.0) != 0.0 && rope.factor > 1.0) {
    const double mscale = 0.1 * *rope.mscale_all_dim * std::log(rope.factor) + 1.0;
    scale *= mscale * mscale;
  }
  return scale;
}

}  // namespace weft
