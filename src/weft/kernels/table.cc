#include "weft/kernels/table.h"

#include "weft/core/error.h"

namespace weft {

const KernelTable& KernelsByName(std::string_view name) {
  if (name == "auto" || name == "cpu") return CpuKernels();
  if (name == "ref") return RefKernels();
  Throw("unknown kernels '{}': use auto, cpu or ref", name);
}

}  // namespace weft
