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
constexpr std::array<Name, 26> kLayerNames = {{{"input_layernorm", "attn_norm"},
                                               {"self_attn.q_proj", "attn_q"},
                                               {"self_attn.k_proj", "attn_k"},
                                               {"self_attn.v_proj", "attn_v"},
                                               {"self_attn.o_proj", "attn_output"},
                                               {"self_attn.q_norm", "attn_q_norm"},
                                               {"self_attn.k_norm", "attn_k_norm"},
                                               {"self_attn.q_a_proj", "attn_q_a"},
                                               {"self_attn.q_a_layernorm", "attn_q_a_norm"},
                                               {"self_attn.q_b_proj", "attn_q_b"},
                                               {"self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"},
                                               {"self_attn.kv_a_layernorm", "attn_kv_a_norm"},
                                               {"self_attn.kv_b_proj", "attn_kv_b"},
                                               {"post_attention_layernorm", "ffn_norm"},
                                               {"mlp.gate_proj", "ffn_gate"},
                                               {"mlp.up_proj", "ffn_up"},
                                               {"mlp.down_proj", "ffn_down"},
                                               {"mlp.gate", "ffn_gate_inp"},
                                               {"mlp.gate.e_score_correction_bias", "exp_probs_b.bias"},
                                               {"mlp.shared_experts.gate_proj", "ffn_gate_shexp"},
                                               {"mlp.shared_experts.up_proj", "ffn_up_shexp"},
                                               {"mlp.shared_experts.down_proj", "ffn_down_shexp"},
                                               {"mlp.shared_expert.gate_proj", "ffn_gate_shexp"},
                                               {"mlp.shared_expert.up_proj", "ffn_up_shexp"},
                                               {"mlp.shared_expert.down_proj", "ffn_down_shexp"},
                                               {"mlp.shared_expert_gate", "ffn_gate_inp_shexp"}}};
constexpr std::array<Name, 3> kExpertNames = {
    {{"gate_proj", "ffn_gate_exps"}, {"up_proj", "ffn_up_exps"}, {"down_proj", "ffn_down_exps"}}};

struct Architecture {
  std::string_view gguf, hf;
  bool experts;
};
// deepseek2 is DeepseekV3ForCausalLM where the experts' gate is a sigmoid.
constexpr std::array<Architecture, 6> kArchitectures = {{{"llama", "LlamaForCausalLM", false},
                                                         {"qwen2", "Qwen2ForCausalLM", false},
                                                         {"qwen3", "Qwen3ForCausalLM", false},
                                                         {"qwen2moe", "Qwen2MoeForCausalLM", true},
                                                         {"qwen3moe", "Qwen3MoeForCausalLM", true},
                                                         {"deepseek2", "DeepseekV2ForCausalLM", true}}};

// A layer's or an expert's number at the beginning of `text`, with the dot behind it, which are cut off.
std::optional<int64_t> TakeNumber(std::string_view& text) {
  const size_t end = text.find('.');
  if (end == text.npos || end == 0 || end > 9) return std::nullopt;
  int64_t number = 0;
  for (const char c : text.substr(0, end)) {
    if (c < '0' || c > '9') return std::nullopt;
    number = 10 * number + (c - '0');
  }
  text.remove_prefix(end + 1);
  return number;
}

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

Json RopeScaling(const GgufFile& file, const std::string& arch, bool latent) {
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
  if (latent) {
    if (extra && *extra != 1.0) {
      Throw("{}: key \"{}attn_factor\" = {}: not supported with this architecture", file.path(), prefix, *extra);
    }
    // A tenth of mscale_all_dim, to the seven digits of f32. mscale is not in the files; in all models of this
    // architecture it is the same.
    if (const auto log_multiplier = Decimal(file, prefix + "yarn_log_multiplier")) {
      scaling["mscale_all_dim"] = scaling["mscale"] = std::round(*log_multiplier * 1e7) / 1e6;
    }
  } else if (extra && *extra != 1.0 && factor && *factor > 1.0) {
    scaling["attention_factor"] = *extra * (0.1 * std::log(*factor) + 1.0);
  }
  return scaling;
}

void RefuseWhatChangesTheModel(const GgufFile& file, const std::string& arch, bool experts, int64_t context_length) {
  const auto refuse_above_zero = [&](const std::string& key, const char* what) {
    const auto value = Uniform(file, key);
    if (value && *value > 0) Throw("{}: key \"{}\" = {}: {} not supported", file.path(), key, *value, what);
  };
  if (!experts) refuse_above_zero(arch + ".expert_count", "mixtures of experts of this architecture are");
  const std::string temperature = arch + ".attention.temperature_scale";
  const auto scale = file.GetF64(temperature);
  if (scale && *scale != 0.0) {
    Throw("{}: key \"{}\" = {}: scores that depend on the position are not supported", file.path(), temperature,
          *scale);
  }
  const std::string window = arch + ".attention.sliding_window";
  const auto tokens = Uniform(file, window);
  if (tokens && *tokens > 0 && *tokens < context_length) {
    Throw("{}: key \"{}\" = {}: sliding-window attention is not supported", file.path(), window, *tokens);
  }
}

// Heads of their own keys and values.
void AddHeads(const GgufFile& file, const std::string& arch, int64_t heads, Json& config) {
  const auto key_length = Uniform(file, arch + ".attention.key_length");
  const auto value_length = Uniform(file, arch + ".attention.value_length");
  if (key_length.value_or(-1) != value_length.value_or(-1)) {
    Throw("{}: keys \"{}.attention.key_length\" and value_length differ ({} and {}): not supported", file.path(), arch,
          key_length.value_or(-1), value_length.value_or(-1));
  }
  // Null rather than absent: the default is embedding_length / head_count in every architecture here.
  config["head_dim"] = key_length ? Json(*key_length) : Json(nullptr);
  if (const auto rotary = file.GetI64(arch + ".rope.dimension_count")) {
    const int64_t head_dim = key_length ? *key_length : heads > 0 ? config["hidden_size"].get<int64_t>() / heads : 0;
    if (*rotary != head_dim) {
      Throw("{}: key \"{}.rope.dimension_count\" = {}: must be the {} dimensions of a head", file.path(), arch, *rotary,
            head_dim);
    }
  }
}

// Multi-head latent attention. Files written since it is computed in its absorbed form give the sizes of a head as
// key_length_mla and value_length_mla (key_length and value_length are those of the cache), older ones as key_length
// and value_length.
void AddLatentAttention(const GgufFile& file, const std::string& arch, Json& config) {
  const auto required = [&](const std::string& name, const std::string& otherwise) {
    auto value = Uniform(file, fmt::format("{}.{}", arch, name));
    if (!value && !otherwise.empty()) value = Uniform(file, fmt::format("{}.{}", arch, otherwise));
    if (!value) Throw("{}: key \"{}.{}\" is missing", file.path(), arch, otherwise.empty() ? name : otherwise);
    return *value;
  };
  const int64_t rope = required("rope.dimension_count", "");
  const int64_t key = required("attention.key_length_mla", "attention.key_length");
  if (key <= rope) {
    Throw("{}: the keys of a head have {} values, key \"{}.rope.dimension_count\" = {}: must be less", file.path(), key,
          arch, rope);
  }
  config["qk_rope_head_dim"] = rope;
  config["qk_nope_head_dim"] = key - rope;
  config["v_head_dim"] = required("attention.value_length_mla", "attention.value_length");
  config["kv_lora_rank"] = required("attention.kv_lora_rank", "");
  const auto q_lora = Uniform(file, arch + ".attention.q_lora_rank");
  config["q_lora_rank"] = q_lora && *q_lora > 0 ? Json(*q_lora) : Json(nullptr);
}

void AddExperts(const GgufFile& file, const std::string& arch, Json& config) {
  const auto count = [&](const char* name) { return Uniform(file, fmt::format("{}.{}", arch, name)); };
  const auto copy = [&](const char* name, const char* field) {
    if (const auto value = count(name)) config[field] = *value;
  };
  const bool deepseek = arch == "deepseek2";
  // Layers behind the model's own, for guessing further tokens.
  if (const auto extra = count("nextn_predict_layers")) {
    config["num_hidden_layers"] = config["num_hidden_layers"].get<int64_t>() - *extra;
  }
  const int64_t experts = count("expert_count").value_or(0);
  config[deepseek ? "n_routed_experts" : "num_experts"] = deepseek && experts == 0 ? Json(nullptr) : Json(experts);
  copy("expert_used_count", "num_experts_per_tok");
  copy("expert_feed_forward_length", "moe_intermediate_size");
  // Softmax is 1, and what older files, which have no such key, mean; sigmoid is 2.
  const std::string gating_key = arch + ".expert_gating_func";
  const int64_t gating = file.GetI64(gating_key).value_or(0);
  const auto normed = file.GetBool(arch + ".expert_weights_norm");
  if (gating < 0 || gating > (deepseek ? 2 : 1)) {
    Throw("{}: key \"{}\" = {}: not supported; {}", file.path(), gating_key, gating,
          deepseek ? "1 (softmax) and 2 (sigmoid) are" : "1 (softmax) is");
  }
  if (!deepseek) {
    copy("expert_shared_feed_forward_length", "shared_expert_intermediate_size");
    config["norm_topk_prob"] = normed.value_or(arch == "qwen3moe");
    return;
  }
  const bool sigmoid = gating == 2;
  if (sigmoid) config["architectures"] = {"DeepseekV3ForCausalLM"};
  config["scoring_func"] = sigmoid ? "sigmoid" : "softmax";
  config["norm_topk_prob"] = normed.value_or(false);
  copy("leading_dense_block_count", "first_k_dense_replace");
  config.emplace("first_k_dense_replace", 0);
  copy("expert_shared_count", "n_shared_experts");
  const double scale = Decimal(file, arch + ".expert_weights_scale").value_or(0.0);
  config["routed_scaling_factor"] = scale == 0.0 ? 1.0 : scale;
  // Files older than these keys choose among all experts, as those who wrote them did.
  const int64_t groups = std::max<int64_t>(count("expert_group_count").value_or(1), 1);
  const int64_t used = count("expert_group_used_count").value_or(0);
  config["n_group"] = groups;
  config["topk_group"] = used > 0 ? used : groups;
  config["topk_method"] = sigmoid ? "noaux_tc" : groups > 1 ? "group_limited_greedy" : "greedy";
}

}  // namespace

std::optional<GgufName> FindGgufName(std::string_view hf_name) {
  // The one name without an ending of its own.
  constexpr std::string_view kBias = ".e_score_correction_bias";
  const size_t dot = hf_name.ends_with(kBias) ? hf_name.size() : hf_name.rfind('.');
  if (dot == hf_name.npos) return std::nullopt;
  const std::string_view module = hf_name.substr(0, dot), kind = hf_name.substr(dot);
  if (!kind.empty() && kind != ".weight" && kind != ".bias") return std::nullopt;
  for (const Name& name : kTopNames) {
    if (module == name.hf) return GgufName{fmt::format("{}{}", name.gguf, kind)};
  }
  constexpr std::string_view kPrefix = "model.layers.", kExperts = "mlp.experts.";
  if (!module.starts_with(kPrefix)) return std::nullopt;
  std::string_view rest = module.substr(kPrefix.size());
  const auto layer = TakeNumber(rest);
  if (!layer) return std::nullopt;
  if (rest.starts_with(kExperts)) {
    rest.remove_prefix(kExperts.size());
    const auto expert = TakeNumber(rest);
    if (!expert) return std::nullopt;
    for (const Name& name : kExpertNames) {
      if (rest == name.hf) return GgufName{fmt::format("blk.{}.{}{}", *layer, name.gguf, kind), *expert};
    }
    return std::nullopt;
  }
  for (const Name& name : kLayerNames) {
    if (rest == name.hf) return GgufName{fmt::format("blk.{}.{}{}", *layer, name.gguf, kind)};
  }
  return std::nullopt;
}

nlohmann::json GgufToHfConfig(const GgufFile& file) {
  const std::string arch(file.RequireString("general.architecture"));
  const auto known = std::find_if(kArchitectures.begin(), kArchitectures.end(),
                                  [&](const Architecture& entry) { return entry.gguf == arch; });
  if (known == kArchitectures.end()) {
    std::string names;
    for (const Architecture& entry : kArchitectures) names += (names.empty() ? "" : ", ") + std::string(entry.gguf);
    Throw("{}: key \"general.architecture\" = \"{}\": not supported; these are: {}", file.path(), arch, names);
  }
  const bool latent = arch == "deepseek2";
  Json config;
  config["architectures"] = {known->hf};
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
  RefuseWhatChangesTheModel(file, arch, known->experts, context_length);

  if (latent) {
    AddLatentAttention(file, arch, config);
  } else {
    AddHeads(file, arch, heads, config);
  }
  if (known->experts) AddExperts(file, arch, config);
  const std::string epsilon = arch + ".attention.layer_norm_rms_epsilon";
  const auto eps = Decimal(file, epsilon);
  if (!eps) Throw("{}: key \"{}\" is missing", file.path(), epsilon);
  config["rms_norm_eps"] = *eps;

  config["rope_theta"] = Decimal(file, arch + ".rope.freq_base").value_or(10000.0);
  config["rope_scaling"] = RopeScaling(file, arch, latent);
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
