// The clipped loss of a value function with its gradient, on the CPU: one pass over the tokens.
//
//   l = max(h(v - r), h(clip(v, old - clip, old + clip) - r)),   h(e) = e^2 / 2, or linear beyond delta
//   loss = sum_t w_t l_t
//
// Formula: rlhf_fast/reference/value.py, value_loss.
#pragma once

#include <cstdint>

namespace rlhf {

constexpr int kValueSums = 6;  // loss, clipped, value, return, |value - return|, count

struct ValueClip {
  int64_t n;
  const float *values, *old_values, *returns;  // (n,); old_values null: no clipping
  const uint8_t* mask;                         // (n,) or null
  const float* weight;                         // (segments,), or (1,) for all
  const int64_t* offsets;                      // (segments + 1) or null: sequences of `length`
  int64_t segments, length;                    // segments 0: one weight for all
  float clip, delta;                           // delta infinite: e^2 / 2 everywhere
  float* dvalues;                              // (n,)
  float* sums;                                 // (kValueSums,)
};

void value_clip(const ValueClip& args, int threads);

// One compilation of value_kernel.cpp: tokens [begin, end) of weight w, their sums into `sums`.
struct ValueKernels {
  void (*clip)(const ValueClip&, float weight, int64_t begin, int64_t end, double* sums);
};
extern const ValueKernels kValueKernelsPortable, kValueKernelsAvx2, kValueKernelsAvx512;

}  // namespace rlhf
