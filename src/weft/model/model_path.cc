#include "weft/model/model_path.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <vector>

#include "weft/core/error.h"

namespace weft {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void NotFound(std::string text) { throw Error(std::move(text), ErrorKind::kNotFound, "model"); }

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

bool Exists(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

// "name" or "org/name" of the characters that the Hub allows; so it cannot lead out of the cache's folder.
bool IsHubId(const std::string& id) {
  if (id.empty() || id.size() > 96 || std::count(id.begin(), id.end(), '/') > 1) return false;
  if (id.front() == '/' || id.back() == '/' || id.find("..") != id.npos || id.find("--") != id.npos) return false;
  for (const size_t begin : {size_t{0}, id.find('/') + 1}) {
    if (id[begin] == '.' || id[begin] == '-') return false;
  }
  return std::all_of(id.begin(), id.end(), [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '/' || c == '-' || c == '_' || c == '.';
  });
}

bool IsRevision(const std::string& revision) {
  return !revision.empty() && revision.front() != '/' && revision.find("..") == revision.npos &&
         revision.find('\0') == revision.npos;
}

}  // namespace

std::string HubCacheFolder() {
  for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}) {
    if (const std::string folder = Environment(name); !folder.empty()) return folder;
  }
  if (const std::string home = Environment("HF_HOME"); !home.empty()) return (fs::path(home) / "hub").string();
  std::string cache = Environment("XDG_CACHE_HOME");
  if (cache.empty()) {
    const std::string home = Environment("HOME");
    if (home.empty()) return "";
    cache = (fs::path(home) / ".cache").string();
  }
  return (fs::path(cache) / "huggingface" / "hub").string();
}

std::string ResolveModelPath(const std::string& model) { return ResolveModelPath(model, HubCacheFolder()); }

std::string ResolveModelPath(const std::string& model, const std::string& hub_cache) {
  if (model.empty()) NotFound("no model given: it must be a folder, a .gguf file or the id of a Hub model");
  if (Exists(model)) return model;
  const size_t at = model.find('@');
  const std::string id = model.substr(0, at);
  const std::string revision = at == model.npos ? "main" : model.substr(at + 1);
  if (!IsHubId(id) || !IsRevision(revision) || model.ends_with(".gguf")) {
    NotFound(fmt::format("model {}: there is no such folder or file", model));
  }
  if (hub_cache.empty()) {
    NotFound(
        fmt::format("model {}: there is no such folder or file, and neither HF_HOME nor HOME says where the "
                    "Hugging Face cache is",
                    model));
  }
  std::string folder_name = "models--" + id;
  if (const size_t slash = folder_name.find('/'); slash != folder_name.npos) folder_name.replace(slash, 1, "--");
  const fs::path repository = fs::path(hub_cache) / folder_name;
  if (!Exists(repository)) {
    NotFound(
        fmt::format("model {}: there is no such folder or file, and the Hugging Face cache has no {} (set HF_HOME "
                    "or HF_HUB_CACHE if yours lies elsewhere, or download the model first)",
                    model, repository.string()));
  }
  // refs/<branch or tag> holds the hash of the snapshot; a revision may also be the hash itself.
  std::string hash;
  const fs::path ref = repository / "refs" / revision;
  std::error_code ignored;
  if (fs::is_regular_file(ref, ignored)) {
    std::ifstream(ref) >> hash;
    if (hash.empty() || hash.find('/') != hash.npos || hash.find("..") != hash.npos) {
      NotFound(fmt::format("model {}: {} does not hold the name of a snapshot", model, ref.string()));
    }
  } else if (Exists(repository / "snapshots" / revision)) {
    hash = revision;
  } else {
    NotFound(fmt::format("model {}: the Hugging Face cache has neither {} nor {}", model, ref.string(),
                         (repository / "snapshots" / revision).string()));
  }
  const fs::path snapshot = repository / "snapshots" / hash;
  if (!Exists(snapshot)) {
    NotFound(
        fmt::format("model {}: {} names a snapshot that is not there: {}", model, ref.string(), snapshot.string()));
  }
  if (Exists(snapshot / "config.json")) return snapshot.string();
  // A repository of GGUF files: clear only where there is one (the first part of a split one counts).
  std::vector<std::string> ggufs;
  for (const fs::directory_entry& entry : fs::directory_iterator(snapshot, ignored)) {
    const std::string name = entry.path().filename().string();
    const size_t of = name.rfind("-of-");
    const bool later_part = of != name.npos && of >= 6 && name[of - 6] == '-' && name.substr(of - 5, 5) != "00001";
    if (name.ends_with(".gguf") && !later_part) ggufs.push_back(entry.path().string());
  }
  std::sort(ggufs.begin(), ggufs.end());
  if (ggufs.size() == 1) return ggufs[0];
  if (ggufs.empty()) {
    NotFound(fmt::format("model {}: {} has neither a config.json nor a .gguf file", model, snapshot.string()));
  }
  NotFound(fmt::format("model {}: {} has several .gguf files; give the path of one:\n  {}", model, snapshot.string(),
                       fmt::join(ggufs, "\n  ")));
}

}  // namespace weft
