#pragma once
// Large aligned memory for weights, KV cache and scratch.

#include <cstddef>
#include <cstdint>
#include <utility>

namespace weft {

// Zero-filled anonymous memory, 64-byte aligned at least. From 2 MiB on it is aligned to 2 MiB and the kernel is asked
// for huge pages: walking a KV cache or a weight matrix through 4 KiB pages halves the speed of deep decode.
// Pages are touched by nobody here: the first thread to write a page places it (NUMA).
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)),
        map_(std::exchange(other.map_, nullptr)),
        map_bytes_(std::exchange(other.map_bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(map_, other.map_);
    std::swap(map_bytes_, other.map_bytes_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

  // Makes room for at least `bytes`; the content is lost where it has to grow.
  void Reserve(size_t bytes);

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  void* map_ = nullptr;  // what munmap is to be given
  size_t map_bytes_ = 0;
};

}  // namespace weft
