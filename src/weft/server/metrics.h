#pragma once
#include <span>
#include <string>

#include "weft/engine/engine.h"

namespace weft {

// The statistics of each replica in Prometheus' text format 0.0.4, under vLLM's names, with labels model_name and
// engine (the replica's number).
std::string MetricsText(std::span<const EngineStats> replicas, const std::string& model_name);

}  // namespace weft
