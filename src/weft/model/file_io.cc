#include "weft/model/file_io.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "weft/core/error.h"

namespace weft {

namespace {
constexpr int64_t kReadAheadBytes = 256 << 10;
constexpr int64_t kReadDoneBytes = 64 << 10;
}  // namespace

void ReadAhead(const void* data, int64_t bytes) {
  if (bytes < kReadAheadBytes) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
  // Only advice: what it returns does not matter.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
}

void ReadDone(const void* data, int64_t bytes) {
  if (bytes < kReadDoneBytes) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
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
