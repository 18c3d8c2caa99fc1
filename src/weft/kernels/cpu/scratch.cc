#include "weft/kernels/cpu/scratch.h"

#include <array>

#include "weft/core/buffer.h"

namespace weft::cpu {

void* Scratch(ScratchSlot slot, size_t bytes) {
  thread_local std::array<Buffer, static_cast<size_t>(ScratchSlot::kCount)> buffers;
  Buffer& buffer = buffers[static_cast<size_t>(slot)];
  // Grows by half at least: contexts grow token by token, and each growth costs fresh pages.
  if (buffer.bytes() < bytes) buffer = Buffer(bytes + bytes / 2);
  return buffer.data();
}

}  // namespace weft::cpu
