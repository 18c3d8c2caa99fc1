#pragma once
// Small helpers for reading model files.

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

namespace weft {

// Asks the kernel to read these bytes of a mapping ahead: one page fault at a time, a cold disk reads far slower.
void ReadAhead(const void* data, int64_t bytes);

// The whole of a (small) text file. Throws weft::Error naming the file.
std::string ReadTextFile(const std::string& path);

// A JSON file. Throws weft::Error naming the file and where it is not JSON.
nlohmann::json ReadJsonFile(const std::string& path);

}  // namespace weft
