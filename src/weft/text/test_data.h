#pragma once
// The vectors of tests/data/text and the tokenizers they are about.

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>

#include "weft/text/tokenizer.h"

namespace weft::test {

inline constexpr const char* kTokenizers[] = {"qwen3", "deepseek_v3", "llama3_1", "smollm2"};

// What scripts/fetch_text_data has fetched.
inline std::string DataDir() {
  const char* dir = std::getenv("WEFT_DATA_DIR");
  return dir != nullptr && *dir != '\0' ? dir : WEFT_DEFAULT_DATA_DIR;
}

inline std::string TokenizerPath(const std::string& name) {
  const std::filesystem::path folder = std::filesystem::path(DataDir()) / name;
  const auto path = name == "smollm2" ? folder / "SmolLM2-135M-Instruct.Q4_1.gguf" : folder;
  if (!std::filesystem::exists(path)) {
    throw std::runtime_error(path.string() + " is missing: run scripts/fetch_text_data");
  }
  return path.string();
}

// Loaded once for all tests of a program.
inline std::shared_ptr<const Tokenizer> Shared(const std::string& name) {
  static std::map<std::string, std::shared_ptr<const Tokenizer>> loaded;
  auto& tokenizer = loaded[name];
  if (tokenizer == nullptr) tokenizer = LoadTokenizer(TokenizerPath(name));
  return tokenizer;
}

inline nlohmann::json ReadJson(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error(path + " cannot be read");
  return nlohmann::json::parse(in);
}

inline nlohmann::json Vectors(const std::string& name) {
  return ReadJson(std::string(WEFT_TEST_DATA) + "/text/" + name + ".json");
}

// A folder that goes away with its owner.
class TempFolder {
 public:
  TempFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "weft_text_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = name;
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  ~TempFolder() { std::filesystem::remove_all(path_); }

  std::string path() const { return path_.string(); }
  void Write(const std::string& name, const std::string& text) const {
    std::filesystem::create_directories((path_ / name).parent_path());
    std::ofstream(path_ / name, std::ios::binary) << text;
  }

 private:
  std::filesystem::path path_;
};

}  // namespace weft::test
