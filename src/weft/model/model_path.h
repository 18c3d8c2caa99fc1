#pragma once
// From what the user calls a model to where its files are.

#include <string>

namespace weft {

// `model` is a folder, a .gguf file, or a Hub id ("org/name", optionally "org/name@revision") whose snapshot lies in
// the local Hugging Face cache (HF_HUB_CACHE, else HF_HOME/hub, else XDG_CACHE_HOME or ~/.cache with huggingface/hub
// below). A path that exists goes before an id of the same spelling. Returns the path of the folder or file; throws
// weft::Error (kNotFound) that says where was looked. Nothing is downloaded.
std::string ResolveModelPath(const std::string& model);

// The same with the cache's folder given.
std::string ResolveModelPath(const std::string& model, const std::string& hub_cache);

// The cache's folder by the environment; empty where not even HOME is known.
std::string HubCacheFolder();

}  // namespace weft
