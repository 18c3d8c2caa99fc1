// The rope part of a config, and the frequencies that it amounts to.
#include <algorithm>
#include <cmath>

#include "weft/core/error.h"
#include "weft/model/config_fields.h"

namespace weft {
namespace internal {

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

}  // namespace internal

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
