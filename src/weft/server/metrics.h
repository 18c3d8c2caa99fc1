#pragma once
#include <string>

#include "weft/engine/engine.h"

namespace weft {

// The statistics in Prometheus' text format 0.0.4, under vLLM's names, with labels model_name and engine.
std::string MetricsText(const EngineStats& stats, const std::string& model_name);

}  // namespace weft
