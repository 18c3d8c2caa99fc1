#pragma once
// Logging goes to stderr through spdlog, so that stdout stays the program's output.
#include <spdlog/spdlog.h>

namespace weft {
// Level by name ("trace" ... "off"); throws weft::Error on an unknown one.
void InitLogging(const std::string& level = "info");
}  // namespace weft
