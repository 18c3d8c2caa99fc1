#include "weft/model/checkpoint.h"

#include <filesystem>
#include <fstream>

#include "weft/core/error.h"
#include "weft/model/checkpoint_files.h"

namespace weft {

std::unique_ptr<Checkpoint> OpenCheckpoint(const std::string& path, const nlohmann::json& hf_overrides) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (std::filesystem::is_directory(status)) {
    try {
      return internal::OpenHfCheckpoint(path, hf_overrides);
    } catch (const std::filesystem::filesystem_error& failure) {
      Throw("{}: {}", path, failure.what());
    }
  }
  if (!std::filesystem::exists(status)) {
    throw Error(fmt::format("{}: there is no such file or folder", path), ErrorKind::kNotFound);
  }
  char magic[4] = {};
  std::ifstream(path, std::ios::binary).read(magic, sizeof(magic));
  if (std::string_view(magic, sizeof(magic)) != "GGUF") {
    Throw("{}: neither a folder with a config.json nor a GGUF file", path);
  }
  return internal::OpenGgufCheckpoint(path, hf_overrides);
}

namespace internal {

void CheckSlice(std::string_view name, int64_t all_rows, int64_t all_cols, int64_t row0, int64_t rows, int64_t col0,
                int64_t cols) {
  const auto inside = [](int64_t begin, int64_t n, int64_t all) {
    return begin >= 0 && n >= 0 && begin <= all && n <= all - begin;
  };
  if (inside(row0, rows, all_rows) && inside(col0, cols, all_cols)) return;
  Throw("tensor {}: {} rows from {} and {} columns from {} are asked for, it has {} x {}", name, rows, row0, cols, col0,
        all_rows, all_cols);
}

}  // namespace internal
}  // namespace weft
