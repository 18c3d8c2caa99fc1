#pragma once
// The kinds of checkpoint behind OpenCheckpoint.

#include <memory>
#include <string>

#include "weft/model/checkpoint.h"

namespace weft::internal {

std::unique_ptr<Checkpoint> OpenHfCheckpoint(const std::string& folder, const nlohmann::json& hf_overrides);
std::unique_ptr<Checkpoint> OpenGgufCheckpoint(const std::string& path, const nlohmann::json& hf_overrides);

// Throws weft::Error naming the tensor unless the slice lies inside [all_rows, all_cols].
void CheckSlice(std::string_view name, int64_t all_rows, int64_t all_cols, int64_t row0, int64_t rows, int64_t col0,
                int64_t cols);

}  // namespace weft::internal
