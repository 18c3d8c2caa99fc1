#pragma once
// Scratch memory of the kernels: one buffer per thread and slot, which grows to the largest size ever asked for and is
// then reused, so that no kernel allocates after the first step of a given size.

#include <cstddef>
#include <cstdint>

namespace weft::cpu {

enum class ScratchSlot { kWork, kShared, kPlan, kCount };

// At least `bytes` of memory, 64-byte aligned. The content does not survive the next call for the same slot on the same
// thread. kShared and kPlan are for the calling thread of a kernel, whose workers may use that memory too; kWork is for
// the piece that a thread works on.
void* Scratch(ScratchSlot slot, size_t bytes);

template <typename T>
T* ScratchOf(ScratchSlot slot, int64_t count) {
  return static_cast<T*>(Scratch(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace weft::cpu
