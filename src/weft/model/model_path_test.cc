#include "weft/model/model_path.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <optional>

#include "weft/model/test_files.h"

namespace weft {
namespace {

using testing::ErrorOf;
using testing::Mentions;

constexpr auto kRepository = "models--Qwen--Qwen3-0.6B";

std::string NotFound(const std::string& model, const std::string& cache) {
  try {
    ResolveModelPath(model, cache);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kNotFound);
    return error.what();
  }
  return "found";
}

TEST(ResolveModelPath, PathsAreTakenAsTheyAre) {
  const testing::TempFolder folder;
  const std::string file = folder.Write("a.gguf", "GGUF");
  EXPECT_EQ(ResolveModelPath(folder.path(), ""), folder.path());
  EXPECT_EQ(ResolveModelPath(file, ""), file);
  EXPECT_TRUE(Mentions(NotFound(folder.path("none"), folder.path()), folder.path("none") + ": there is no such"));
  EXPECT_TRUE(Mentions(NotFound("none.gguf", folder.path()), "no such folder or file"));
  EXPECT_TRUE(Mentions(NotFound("", folder.path()), "no model given"));
}

TEST(ResolveModelPath, FindsSnapshotsOfTheCache) {
  const testing::TempFolder cache;
  const std::string repository = kRepository;
  cache.Write(repository + "/refs/main", "abc123\n");
  cache.Write(repository + "/snapshots/abc123/config.json", "{}");
  cache.Write(repository + "/refs/v2/beta", "def456");
  cache.Write(repository + "/snapshots/def456/config.json", "{}");
  const std::string found = cache.path(repository + "/snapshots/abc123");
  EXPECT_EQ(ResolveModelPath("Qwen/Qwen3-0.6B", cache.path()), found);
  EXPECT_EQ(ResolveModelPath("Qwen/Qwen3-0.6B@main", cache.path()), found);
  EXPECT_EQ(ResolveModelPath("Qwen/Qwen3-0.6B@abc123", cache.path()), found);
  EXPECT_EQ(ResolveModelPath("Qwen/Qwen3-0.6B@v2/beta", cache.path()), cache.path(repository + "/snapshots/def456"));
  cache.Write("models--gpt2/refs/main", "1");
  cache.Write("models--gpt2/snapshots/1/config.json", "{}");
  EXPECT_EQ(ResolveModelPath("gpt2", cache.path()), cache.path("models--gpt2/snapshots/1"));
}

TEST(ResolveModelPath, SaysWhereWasLooked) {
  const testing::TempFolder cache;
  const std::string repository = kRepository, id = "Qwen/Qwen3-0.6B";
  EXPECT_TRUE(Mentions(NotFound(id, cache.path()), cache.path(repository)));
  EXPECT_TRUE(Mentions(NotFound(id, cache.path()), "HF_HOME"));
  EXPECT_TRUE(Mentions(NotFound(id, ""), "HF_HOME"));
  cache.Write(repository + "/blobs/x", "");
  EXPECT_TRUE(Mentions(NotFound(id, cache.path()), cache.path(repository + "/refs/main")));
  cache.Write(repository + "/refs/main", "abc");
  EXPECT_TRUE(Mentions(NotFound(id, cache.path()), cache.path(repository + "/snapshots/abc")));
  cache.Write(repository + "/refs/main", "../../etc");
  EXPECT_TRUE(Mentions(NotFound(id, cache.path()), "does not hold the name of a snapshot"));
  // Names that no file where this runs has.
  for (const char* bad : {"no-org/b/c", "../no-org", "no-org/..", "/no-org/y", "no-org/", "no--org/c", ".no-org/y",
                          "no-org/-b", "no org/c", "Qwen/Qwen3@../x", "Qwen/Qwen3@"}) {
    EXPECT_TRUE(Mentions(NotFound(bad, cache.path()), "there is no such folder or file")) << bad;
  }
}

TEST(ResolveModelPath, RepositoriesOfGgufFiles) {
  const testing::TempFolder cache;
  const std::string snapshot = "models--o--m/snapshots/s";
  cache.Write("models--o--m/refs/main", "s");
  cache.Write(snapshot + "/README.md", "");
  EXPECT_TRUE(Mentions(NotFound("o/m", cache.path()), "neither a config.json nor a .gguf"));
  const std::string first = cache.Write(snapshot + "/m-00001-of-00002.gguf", "GGUF");
  cache.Write(snapshot + "/m-00002-of-00002.gguf", "GGUF");
  EXPECT_EQ(ResolveModelPath("o/m", cache.path()), first);
  const std::string other = cache.Write(snapshot + "/m-q4.gguf", "GGUF");
  EXPECT_TRUE(Mentions(NotFound("o/m", cache.path()), other));
}

class Environment : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const char* name : kNames) {
      const char* value = std::getenv(name);
      saved_.emplace_back(name, value == nullptr ? std::optional<std::string>() : value);
      unsetenv(name);
    }
  }
  void TearDown() override {
    for (const auto& [name, value] : saved_) {
      if (value) {
        setenv(name, value->c_str(), 1);
      } else {
        unsetenv(name);
      }
    }
  }
  static constexpr const char* kNames[] = {"HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE",
                                           "HUGGINGFACE_HUB_CACHE"};
  std::vector<std::pair<const char*, std::optional<std::string>>> saved_;
};

TEST_F(Environment, DecidesWhereTheCacheIs) {
  EXPECT_EQ(HubCacheFolder(), "");
  setenv("HOME", "/h", 1);
  EXPECT_EQ(HubCacheFolder(), "/h/.cache/huggingface/hub");
  setenv("XDG_CACHE_HOME", "/x", 1);
  EXPECT_EQ(HubCacheFolder(), "/x/huggingface/hub");
  setenv("HF_HOME", "/hf", 1);
  EXPECT_EQ(HubCacheFolder(), "/hf/hub");
  setenv("HF_HUB_CACHE", "/hub", 1);
  EXPECT_EQ(HubCacheFolder(), "/hub");
}

}  // namespace
}  // namespace weft
