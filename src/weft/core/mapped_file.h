#pragma once
// A file mapped into memory for reading.

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace weft {

// Private, read-only. The file must not shrink while it is mapped (reading past its end raises SIGBUS): model files are
// replaced by renaming, not rewritten in place.
class MappedFile {
 public:
  MappedFile() = default;
  // Throws weft::Error naming the file and the reason.
  explicit MappedFile(const std::string& path);
  MappedFile(MappedFile&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace weft
