#pragma once
// The SIMD kernels behind the cpu table; each chooses the best Highway target of the machine when it is called.

#include <cstdint>
#include <span>

#include "weft/kernels/table.h"

namespace weft::cpu {

void Linear(const LinearArgs& args, ThreadPool& pool);
void LinearMany(std::span<const LinearArgs> args, ThreadPool& pool);
void Attention(const AttentionArgs& args, ThreadPool& pool);

void RmsNorm(const float* x, int64_t x_stride, const float* weight, float eps, float* y, int64_t y_stride, int64_t rows,
             int64_t cols, ThreadPool& pool);
void Add(float* x, int64_t x_stride, const float* delta, int64_t delta_stride, int64_t rows, int64_t cols,
         ThreadPool& pool);
void Swiglu(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, float* out, int64_t out_stride,
            int64_t rows, int64_t cols, ThreadPool& pool);
void Rope(const RopeArgs& args, ThreadPool& pool);
void SumParts(std::span<const float* const> parts, int64_t count, float* out, ThreadPool& pool);
void KvWrite(const KvWriteArgs& args, ThreadPool& pool);
void Merge(const MergeArgs& args, ThreadPool& pool);
int64_t Argmax(const float* x, int64_t n);
float LogSumExp(const float* x, int64_t n);
void Softmax(float* x, int64_t n);

}  // namespace weft::cpu
