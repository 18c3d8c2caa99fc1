#pragma once
#include <cstdint>
#include <optional>

namespace weft::cli {

// Bytes that this process may still take: what the kernel calls available, or what is left of the control group's
// limit if that is less.
int64_t AvailableMemoryBytes();

struct KvSizeInput {
  int64_t block_bytes = 0;   // of a virtual block, over all ranks of a replica
  int64_t block_tokens = 0;  // of a virtual block
  int64_t weight_bytes = 0;  // not loaded yet
  int64_t available_bytes = 0;
  int64_t max_model_len = 0;  // -1: as long as fits, at most model_max_len
  int64_t model_max_len = 0;
  int64_t max_num_seqs = 1;
  // In the order of precedence; the default's rule (--kv-cache-memory's help) where there is none.
  std::optional<int64_t> num_blocks;  // --num-gpu-blocks-override
  std::optional<int64_t> kv_bytes;    // --kv-cache-memory
  std::optional<double> utilization;  // --gpu-memory-utilization
  // Share the memory equally; each has a KV cache for itself.
  int32_t replicas = 1;
};

struct KvSize {
  int64_t num_blocks = 0;  // of each replica
  int64_t max_model_len = 0;
};

// Throws weft::Error with the numbers when not a single request of max_model_len tokens would fit into a replica's KV
// cache.
KvSize SizeKvCache(const KvSizeInput& input);

}  // namespace weft::cli
