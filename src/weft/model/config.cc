#include "weft/model/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string_view>

#include "weft/core/error.h"

namespace weft {
namespace {

using Json = nlohmann::json;

// Bounds that no model comes near; they keep every product of two sizes inside 64 bits.
constexpr int64_t kMaxWidth = int64_t{1} << 24;
constexpr int64_t kMaxVocab = int64_t{1} << 28;
constexpr int64_t kMaxLayers = 1 << 16;
constexpr int64_t kMaxHeads = 1 << 16;
constexpr int64_t kMaxHeadDim = 1 << 14;
constexpr int64_t kMaxPositions = std::numeric_limits<int32_t>::max();

struct Family {
  std::string_view architecture;
  std::string_view model_type;
};
constexpr std::array<Family, 4> kFamilies = {{{"LlamaForCausalLM", "llama"},
                                              {"MistralForCausalLM", "mistral"},
                                              {"Qwen2ForCausalLM", "qwen2"},
                                              {"Qwen3ForCausalLM", "qwen3"}}};

// An error's copy of a value: long ones are cut.
std::string Show(const Json& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

// The fields of one JSON object. `where` is put before their names in errors ("rope_scaling.").
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {}

  // Null where the field is absent or null.
  const Json* Find(const char* name) const {
    const auto it = object_.find(name);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  bool Present(const char* name) const { return object_.contains(name); }

  [[noreturn]] void Refuse(const char* name, const Json& value, std::string_view rule) const {
    throw Error(fmt::format("model config: {}{} = {}: {}", where_, name, Show(value), rule),
                ErrorKind::kInvalidArgument, where_ + name);
  }
  [[noreturn]] void Missing(const char* name) const {
    throw Error(fmt::format("model config: {}{} is missing", where_, name), ErrorKind::kInvalidArgument, where_ + name);
  }

  int64_t Int(const char* name, int64_t min, int64_t max, std::optional<int64_t> absent = {}) const {
    const Json* value = Find(name);
    if (value == nullptr) {
      if (!absent) Missing(name);
      return *absent;
    }
    return ToInt(name, *value, min, max);
  }

  int64_t ToInt(const char* name, const Json& value, int64_t min, int64_t max) const {
    bool fits = value.is_number_integer();
    if (fits && value.is_number_unsigned()) {
      fits = value.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    }
    const int64_t number = fits ? value.get<int64_t>() : 0;
    if (!fits || number < min || number > max) {
      Refuse(name, value, fmt::format("must be an integer from {} to {}", min, max));
    }
    return number;
  }

  // A finite number in [min, max].
  double Number(const char* name, double min, double max, std::optional<double> absent = {}) const {
    const Json* value = Find(name);
    if (value == nullptr) {
      if (!absent) Missing(name);
      return *absent;
    }
    const double number = value->is_number() ? value->get<double>() : std::nan("");
    if (!(number >= min && number <= max)) {
      Refuse(name, *value, fmt::format("must be a number from {} to {}", min, max));
    }
    return number;
  }

  bool Bool(const char* name, bool absent) const {
    const Json* value = Find(name);
    if (value == nullptr) return absent;
    if (!value->is_boolean()) Refuse(name, *value, "must be true or false");
    return value->get<bool>();
  }

  std::string String(const char* name, const std::string& absent) const {
    const Json* value = Find(name);
    if (value == nullptr) return absent;
    if (!value->is_string()) Refuse(name, *value, "must be a string");
    return value->get<std::string>();
  }

 private:
  const Json& object_;
  std::string where_;
};

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
  if (c.model_type != "qwen2" && c.model_type != "qwen3") return;
  if (!fields.Bool("use_sliding_window", false)) return;
  if (!fields.Present("sliding_window")) window = 4096;
  const int64_t full_layers = fields.Int("max_window_layers", 0, kMaxLayers, 28);
  if (window > 0 && window < c.max_position_embeddings && full_layers < c.num_layers) {
    fields.Refuse("use_sliding_window", true, kRule);
  }
}

RopeConfig ParseRope(const Fields& config, int64_t max_positions, double* partial_rotary_factor) {
  RopeConfig rope;
  const Json empty = Json::object();
  const Json* scaling = config.Find("rope_scaling");
  const Json* parameters = config.Find("rope_parameters");
  for (const auto& [name, value] : {std::pair{"rope_scaling", scaling}, std::pair{"rope_parameters", parameters}}) {
    if (value == nullptr) continue;
    if (!value->is_object()) config.Refuse(name, *value, "must be an object");
    for (const auto& [key, inner] : value->items()) {
      if (inner.is_object()) config.Refuse(name, *value, "rope that differs between layers is not supported");
    }
  }
  const bool old_spelling = scaling != nullptr && !scaling->empty();
  const Fields fields(old_spelling            ? *scaling
                      : parameters != nullptr ? *parameters
                                              : empty,
                      old_spelling ? "rope_scaling." : "rope_parameters.");
  const Fields other(parameters != nullptr ? *parameters : empty, "rope_parameters.");

  constexpr double kMin = 1e-3, kMax = 1e18;
  rope.theta = fields.Number("rope_theta", kMin, kMax,
                             other.Number("rope_theta", kMin, kMax, config.Number("rope_theta", kMin, kMax, 10000.0)));
  *partial_rotary_factor =
      fields.Number("partial_rotary_factor", 0.0, 1.0, config.Number("partial_rotary_factor", 0.0, 1.0, 1.0));

  // Both spellings of the type occur; the newer one goes first.
  const std::string type = fields.String("rope_type", fields.String("type", "default"));
  const char* type_field = fields.Find("rope_type") != nullptr ? "rope_type" : "type";
  const auto original = [&] {
    return fields.Int("original_max_position_embeddings", 1, kMaxPositions,
                      config.Int("original_max_position_embeddings", 1, kMaxPositions, max_positions));
  };
  if (type == "default") {
    rope.type = RopeConfig::Type::kDefault;
  } else if (type == "linear") {
    rope.type = RopeConfig::Type::kLinear;
    rope.factor = fields.Number("factor", kMin, kMax);
  } else if (type == "llama3") {
    rope.type = RopeConfig::Type::kLlama3;
    rope.factor = fields.Number("factor", kMin, kMax);
    rope.low_freq_factor = fields.Number("low_freq_factor", kMin, kMax);
    rope.high_freq_factor = fields.Number("high_freq_factor", kMin, kMax);
    rope.original_max_position = original();
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      fields.Refuse("high_freq_factor", rope.high_freq_factor,
                    fmt::format("must be above low_freq_factor = {}", rope.low_freq_factor));
    }
  } else if (type == "yarn") {
    rope.type = RopeConfig::Type::kYarn;
    rope.original_max_position = original();
    rope.factor = fields.Number("factor", kMin, kMax,
                                static_cast<double>(max_positions) / static_cast<double>(rope.original_max_position));
    // 0 means "not given" in the original, for these four.
    const auto or_default = [](double value, double otherwise) { return value == 0.0 ? otherwise : value; };
    rope.beta_fast = or_default(fields.Number("beta_fast", 0.0, kMax, 32.0), 32.0);
    rope.beta_slow = or_default(fields.Number("beta_slow", 0.0, kMax, 1.0), 1.0);
    if (rope.beta_fast < rope.beta_slow) {
      fields.Refuse("beta_fast", rope.beta_fast, fmt::format("must not be below beta_slow = {}", rope.beta_slow));
    }
    rope.truncate = fields.Bool("truncate", true);
    if (fields.Find("attention_factor") != nullptr) {
      rope.attention_factor = fields.Number("attention_factor", kMin, kMax);
    }
    if (fields.Find("mscale") != nullptr) rope.mscale = fields.Number("mscale", 0.0, kMax);
    if (fields.Find("mscale_all_dim") != nullptr) rope.mscale_all_dim = fields.Number("mscale_all_dim", 0.0, kMax);
    if (rope.theta <= 1.0) config.Refuse("rope_theta", rope.theta, "must be above 1 with yarn");
  } else {
    fields.Refuse(type_field, type, "not supported; these rope types are: default, linear, llama3, yarn");
  }
  return rope;
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
  if (const Json* quantization = fields.Find("quantization_config")) {
    fields.Refuse("quantization_config", *quantization, "quantised Hugging Face checkpoints are not supported");
  }
  c.hidden_size = fields.Int("hidden_size", 1, kMaxWidth);
  c.intermediate_size = fields.Int("intermediate_size", 1, kMaxWidth);
  c.num_layers = fields.Int("num_hidden_layers", 1, kMaxLayers);
  c.num_heads = fields.Int("num_attention_heads", 1, kMaxHeads);
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
  c.vocab_size = fields.Int("vocab_size", 1, kMaxVocab);
  c.max_position_embeddings =
      fields.Int("max_position_embeddings", 1, kMaxPositions, c.model_type == "llama" ? 2048 : 32768);
  c.rms_norm_eps = static_cast<float>(fields.Number("rms_norm_eps", 0.0, 1.0, 1e-6));
  c.tie_word_embeddings = fields.Bool("tie_word_embeddings", false);

  const std::string activation = fields.String("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    fields.Refuse("hidden_act", activation, "not supported; silu is");
  }
  if (c.model_type == "qwen2") {
    c.qkv_bias = true;  // in the original's code, not in its config
  } else if (c.model_type != "mistral") {
    c.qkv_bias = c.o_bias = fields.Bool("attention_bias", false);
  }
  if (c.model_type == "llama") c.mlp_bias = fields.Bool("mlp_bias", false);
  c.qk_norm = c.model_type == "qwen3";

  double partial_rotary_factor = 1.0;
  c.rope = ParseRope(fields, c.max_position_embeddings, &partial_rotary_factor);
  c.rotary_dim = static_cast<int64_t>(static_cast<double>(c.head_dim) * partial_rotary_factor);
  if (c.rotary_dim < 2 || c.rotary_dim % 2 != 0) {
    fields.Refuse("head_dim", c.head_dim,
                  fmt::format("rope turns {} of these dimensions: must be an even number, 2 at least", c.rotary_dim));
  }
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

std::vector<ModelTensor> ModelTensors(const ModelConfig& c) {
  using Kind = ModelTensor::Kind;
  std::vector<ModelTensor> tensors;
  const auto add = [&](std::string name, Kind kind, int64_t rows, int64_t cols) {
    tensors.push_back({std::move(name), kind, rows, cols});
  };
  const auto linear = [&](const std::string& name, int64_t out, int64_t in, bool bias) {
    add(name + ".weight", Kind::kMatrix, out, in);
    if (bias) add(name + ".bias", Kind::kBias, 0, out);
  };
  const int64_t q = c.num_heads * c.head_dim;
  const int64_t kv = c.num_kv_heads * c.head_dim;
  add("model.embed_tokens.weight", Kind::kEmbedding, c.vocab_size, c.hidden_size);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const std::string layer = fmt::format("model.layers.{}.", i);
    add(layer + "input_layernorm.weight", Kind::kNorm, 0, c.hidden_size);
    linear(layer + "self_attn.q_proj", q, c.hidden_size, c.qkv_bias);
    linear(layer + "self_attn.k_proj", kv, c.hidden_size, c.qkv_bias);
    linear(layer + "self_attn.v_proj", kv, c.hidden_size, c.qkv_bias);
    linear(layer + "self_attn.o_proj", c.hidden_size, q, c.o_bias);
    if (c.qk_norm) {
      add(layer + "self_attn.q_norm.weight", Kind::kNorm, 0, c.head_dim);
      add(layer + "self_attn.k_norm.weight", Kind::kNorm, 0, c.head_dim);
    }
    add(layer + "post_attention_layernorm.weight", Kind::kNorm, 0, c.hidden_size);
    linear(layer + "mlp.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    linear(layer + "mlp.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    linear(layer + "mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias);
  }
  add("model.norm.weight", Kind::kNorm, 0, c.hidden_size);
  if (!c.tie_word_embeddings) add("lm_head.weight", Kind::kMatrix, c.vocab_size, c.hidden_size);
  return tensors;
}

RopeTable MakeRopeTable(const RopeConfig& rope, int64_t rotary_dim) {
  WEFT_CHECK(rotary_dim > 0 && rotary_dim % 2 == 0, "rotary_dim {}", rotary_dim);
  const int64_t half = rotary_dim / 2;
  const auto dim = static_cast<double>(rotary_dim);
  RopeTable table;
  table.inv_freq.resize(static_cast<size_t>(half));
  for (int64_t i = 0; i < half; ++i) {
    table.inv_freq[static_cast<size_t>(i)] = std::pow(rope.theta, -2.0 * static_cast<double>(i) / dim);
  }

  switch (rope.type) {
    case RopeConfig::Type::kDefault:
      break;
    case RopeConfig::Type::kLinear:
      for (double& f : table.inv_freq) f /= rope.factor;
      break;
    case RopeConfig::Type::kLlama3: {
      if (!rope.freq_divisors.empty()) break;  // the divisors hold the result of this rule
      const auto old = static_cast<double>(rope.original_max_position);
      for (double& f : table.inv_freq) {
        // 0 from wavelength old / low_freq_factor upwards: divided; 1 up to old / high_freq_factor: as it is.
        const double wavelength = 2.0 * M_PI / f;
        const double smooth = std::clamp(
            (old / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0);
        f *= (1.0 - smooth) / rope.factor + smooth;
      }
      break;
    }
    case RopeConfig::Type::kYarn: {
      // The dimension that turns `rotations` times over the original context.
      const auto dimension_of = [&](double rotations) {
        return dim * std::log(static_cast<double>(rope.original_max_position) / (rotations * 2.0 * M_PI)) /
               (2.0 * std::log(rope.theta));
      };
      double low = dimension_of(rope.beta_fast);
      double high = dimension_of(rope.beta_slow);
      if (rope.truncate) {
        low = std::floor(low);
        high = std::ceil(high);
      }
      low = std::max(low, 0.0);
      high = std::min(high, dim - 1.0);
      if (high == low) high += 0.001;
      for (int64_t i = 0; i < half; ++i) {
        double& f = table.inv_freq[static_cast<size_t>(i)];
        const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
        f = f / rope.factor * ramp + f * (1.0 - ramp);
      }
      const auto mscale = [&](double m) { return rope.factor <= 1.0 ? 1.0 : 0.1 * m * std::log(rope.factor) + 1.0; };
      if (rope.attention_factor) {
        table.attention_factor = *rope.attention_factor;
      } else if (rope.mscale.value_or(0.0) != 0.0 && rope.mscale_all_dim.value_or(0.0) != 0.0) {
        table.attention_factor = mscale(*rope.mscale) / mscale(*rope.mscale_all_dim);
      } else {
        table.attention_factor = mscale(1.0);
      }
      break;
    }
  }
  if (!rope.freq_divisors.empty()) {
    WEFT_CHECK(static_cast<int64_t>(rope.freq_divisors.size()) == half, "{} divisors for {} frequencies",
               rope.freq_divisors.size(), half);
    for (int64_t i = 0; i < half; ++i) {
      table.inv_freq[static_cast<size_t>(i)] /= rope.freq_divisors[static_cast<size_t>(i)];
    }
  }
  return table;
}

}  // namespace weft
