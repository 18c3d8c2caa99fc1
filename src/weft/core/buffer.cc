#include "weft/core/buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include "weft/core/error.h"

namespace weft {
namespace {
constexpr size_t kHugePageBytes = size_t{2} << 20;
}

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  const bool huge = bytes >= kHugePageBytes;
  map_bytes_ = huge ? bytes + kHugePageBytes : bytes;
  void* map = mmap(nullptr, map_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) {
    map_bytes_ = 0;
    bytes_ = 0;
    throw Error(fmt::format("cannot allocate {} bytes of memory", bytes), ErrorKind::kInternal);
  }
  map_ = map;
  data_ = map;
  if (huge) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(map);
    const uintptr_t aligned = (start + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    data_ = reinterpret_cast<void*>(aligned);
    // A hint: where transparent huge pages are off the memory works all the same.
    (void)madvise(data_, bytes, MADV_HUGEPAGE);
  }
}

Buffer::~Buffer() {
  if (map_ != nullptr) munmap(map_, map_bytes_);
}

void Buffer::Reserve(size_t bytes) {
  if (bytes > bytes_) *this = Buffer(bytes);
}

}  // namespace weft
