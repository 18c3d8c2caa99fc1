#pragma once
// What the processes of one instance send each other: a step's plan from the first to all, and what came of it back.
// Binary, in this machine's byte order, without versions: all processes are the same program.

#include <cstddef>
#include <span>
#include <vector>

#include "weft/runner/step_plan.h"

namespace weft {

std::vector<std::byte> EncodePlan(const StepPlan& plan);
// Throws weft::Error (kInternal) for bytes that are no plan.
StepPlan DecodePlan(std::span<const std::byte> bytes);

// What each rank of a process found out, in the order of its ranks.
std::vector<std::byte> EncodeOutputs(const std::vector<std::vector<RowOutput>>& ranks);
std::vector<std::vector<RowOutput>> DecodeOutputs(std::span<const std::byte> bytes);

}  // namespace weft
