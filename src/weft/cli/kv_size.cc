#include "weft/cli/kv_size.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

#include "weft/core/error.h"

namespace weft::cli {
namespace {

constexpr int64_t kDefaultBytes = int64_t{4} << 30;
constexpr double kDefaultShare = 0.7;

std::optional<int64_t> ReadNumber(const char* path) {
  std::ifstream file(path);
  int64_t value = 0;
  if (file >> value) return value;
  return std::nullopt;  // no such file, or "max"
}

double GiB(int64_t bytes) { return static_cast<double>(bytes) / static_cast<double>(int64_t{1} << 30); }

}  // namespace

int64_t AvailableMemoryBytes() {
  int64_t available = std::numeric_limits<int64_t>::max();
  std::ifstream meminfo("/proc/meminfo");
  for (std::string key; meminfo >> key;) {
    int64_t value = 0;
    std::string rest;
    meminfo >> value;
    std::getline(meminfo, rest);
    if (key == "MemAvailable:") available = value * 1024;
  }
  // Inside a container its own group is the root of the mount: v2, else v1.
  const auto limit = [&](const char* maximum, const char* used) {
    const auto most = ReadNumber(maximum);
    const auto now = ReadNumber(used);
    if (most && now) available = std::min(available, std::max<int64_t>(0, *most - *now));
  };
  limit("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current");
  limit("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes");
  return available;
}

KvSize SizeKvCache(const KvSizeInput& in) {
  WEFT_CHECK(in.block_bytes > 0 && in.block_tokens > 0 && in.model_max_len > 0 && in.replicas > 0);
  // So much memory goes for each further block, since every replica gets it.
  const int64_t all_bytes = in.block_bytes * in.replicas;
  const auto blocks_for = [&](int64_t tokens) { return (tokens + in.block_tokens - 1) / in.block_tokens; };
  const bool as_fits = in.max_model_len == -1;
  const int64_t wanted_len = as_fits ? in.model_max_len : in.max_model_len;
  const int64_t one_request = blocks_for(wanted_len);
  const int64_t left = std::max<int64_t>(0, in.available_bytes - in.weight_bytes);

  int64_t blocks = 0;
  std::string source;
  if (in.num_blocks) {
    blocks = *in.num_blocks;
    source = fmt::format("--num-gpu-blocks-override = {}", blocks);
  } else if (in.kv_bytes) {
    blocks = *in.kv_bytes / all_bytes;
    source = fmt::format("--kv-cache-memory = {}", *in.kv_bytes);
  } else if (in.utilization) {
    const auto bytes =
        static_cast<int64_t>(*in.utilization * static_cast<double>(in.available_bytes)) - in.weight_bytes;
    blocks = std::max<int64_t>(0, bytes) / all_bytes;
    source = fmt::format("--gpu-memory-utilization = {} of {:.2f} GiB available, less {:.2f} GiB of weights",
                         *in.utilization, GiB(in.available_bytes), GiB(in.weight_bytes));
  } else {
    const auto most = static_cast<int64_t>(kDefaultShare * static_cast<double>(left)) / all_bytes;
    const int64_t usual = std::max(kDefaultBytes / all_bytes, one_request);
    blocks = std::min({usual, most, one_request * in.max_num_seqs});
    source = fmt::format("70 % of the {:.2f} GiB that the weights leave", GiB(left));
  }
  if (in.replicas > 1 && !in.num_blocks) source += fmt::format(", for --data-parallel-size = {} replicas", in.replicas);
  blocks = std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max());
  const int64_t tokens = blocks * in.block_tokens;
  if (as_fits && tokens >= 2) return {blocks, std::min(in.model_max_len, tokens)};
  if (blocks < one_request) {
    throw Error(
        fmt::format("--max-model-len = {}: the KV cache of one such request takes {:.2f} GiB, but there is room "
                    "for {:.2f} GiB ({}), which is {} tokens; lower --max-model-len or give the KV cache more "
                    "memory",
                    wanted_len, GiB(one_request * in.block_bytes), GiB(blocks * in.block_bytes), source, tokens),
        ErrorKind::kInvalidArgument, "--max-model-len");
  }
  return {blocks, wanted_len};
}

}  // namespace weft::cli
