#pragma once
// Small helpers for reading model files.

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

namespace weft {

// Asks the kernel to read these bytes of a mapping ahead: one page fault at a time, a cold disk reads far slower.
// Nothing is done for few bytes.
void ReadAhead(const void* data, int64_t bytes);

// Takes the whole pages among these bytes of a mapping of a file out of the process's memory, so that loading does not
// keep the files there beside the weights. They stay in the kernel's cache as long as it likes; who reads them again
// gets them from there. Nothing is done for few bytes.
void ReadDone(const void* data, int64_t bytes);

// The whole of a (small) text file. Throws weft::Error naming the file.
std::string ReadTextFile(const std::string& path);

// A JSON file. Throws weft::Error naming the file and where it is not JSON.
nlohmann::json ReadJsonFile(const std::string& path);

}  // namespace weft
