#include "weft/model/file_io.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "weft/core/error.h"

namespace weft {

void ReadAhead(const void* data, int64_t bytes) {
  if (bytes <= 0) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
  // Only advice: what it returns does not matter.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
}

std::string ReadTextFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) Throw("{}: cannot be opened: {}", path, std::strerror(errno));
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) Throw("{}: cannot be read", path);
  return text;
}

nlohmann::json ReadJsonFile(const std::string& path) {
  const std::string text = ReadTextFile(path);
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception& error) {
    Throw("{}: not JSON: {}", path, error.what());
  }
}

}  // namespace weft
