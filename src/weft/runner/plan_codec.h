#pragma once
// What the processes of one instance send each other: a step's plan from the first to all, and what came of it back.
// Binary, in this machine's byte order, without versions: all processes are the same program.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "weft/runner/step_plan.h"

namespace weft {

// By replica; null for one that has nothing to do.
std::vector<std::byte> EncodePlans(std::span<const StepPlan* const> plans);
// Throws weft::Error (kInternal) for bytes that are no plans.
std::vector<std::optional<StepPlan>> DecodePlans(std::span<const std::byte> bytes);

// What the ranks of one process found out.
struct ProcessOutputs {
  std::vector<std::vector<std::vector<RowOutput>>> ranks;  // by replica, then the process' ranks of it in order
  std::vector<std::vector<int64_t>> expert_loads;          // by replica: StepExecutor::ExpertLoad of those ranks
};
std::vector<std::byte> EncodeOutputs(const ProcessOutputs& outputs);
ProcessOutputs DecodeOutputs(std::span<const std::byte> bytes);

}  // namespace weft
