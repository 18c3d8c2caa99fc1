// The cpu table, and the only place that asks Highway which target it has chosen.

#include <string_view>

#include "weft/kernels/cpu/kernels.h"
#include "weft/kernels/cpu/pack.h"
#include "weft/kernels/cpu/targets.h"
//
#include "hwy/highway.h"

namespace weft {

const KernelTable& CpuKernels() {
  static const KernelTable table = {
      .name = "cpu",
      .target = hwy::TargetName(hwy::SupportedTargets() & HWY_TARGETS & -(hwy::SupportedTargets() & HWY_TARGETS)),
      .pack_weights = cpu::PackWeights,
      .unpack_row = cpu::UnpackRow,
      .linear = cpu::Linear,
      .linear_many = cpu::LinearMany,
      .rms_norm = cpu::RmsNorm,
      .add = cpu::Add,
      .swiglu = cpu::Swiglu,
      .rope = cpu::Rope,
      .sum_parts = cpu::SumParts,
      .kv_write = cpu::KvWrite,
      .attention = cpu::Attention,
      .merge = cpu::Merge,
      .argmax = cpu::Argmax,
      .log_sum_exp = cpu::LogSumExp,
      .softmax = cpu::Softmax,
  };
  return table;
}

}  // namespace weft
