// Row passes over two chunks of raw logits (n, V), the policy's ("own") and the reference's, on the CPU.
//
//   p, q = softmaxes of the shaped logits (row_pass.h),   M = a q + (1 - a) p,   a = ref_share
//   KL(a || b) = sum_j a_j h(log b_j - log a_j),   h(d) = exp(d) - 1 - d >= 0
//
// - row_divergence reads both rows once and gives KL(p || q or M) and KL(q || p or M).
// - divergence_dlogits reads both rows once more and writes grad times the gradient of the divergence, in place
//   if wanted. It needs those sums: no single pass gives value and gradient, but for the forward KL's.
// - Rows are independent and each is one thread's work: results do not depend on the thread count.
#pragma once

#include <cstdint>

namespace rlhf {

enum DivergenceKind : int { kForward = 0, kReverse = 1, kJsd = 2 };

struct DivergenceSide {
  const void* logits;
  int dtype;           // Dtype of row_pass.h
  int64_t stride;      // in elements
  const float* bias;   // (v,) or null
  double scale, softcap, inv_temperature;
  const float* row_max;  // (n,), from row_stats
  const float* log_sum;
  float* kl;  // (n,): KL from this side; written by row_divergence, read by divergence_dlogits. Null if unused
  void* out;  // (n, v) or null; may share the rows of `logits` if its elements are no wider than theirs
  int out_dtype;
  int64_t out_stride;
};

struct Divergence {
  DivergenceSide own, ref;
  int64_t n, v;
  int kind;
  double ref_share;
  const float* grad;  // (n,); read by divergence_dlogits
};

void row_divergence(const Divergence& args, int threads);
void divergence_dlogits(const Divergence& args, int threads);

// One compilation of divergence_kernel.cpp; each covers rows [begin, end).
struct DivergenceKernels {
  void (*values)(const Divergence&, int64_t begin, int64_t end);
  void (*dlogits)(const Divergence&, int64_t begin, int64_t end);
};
extern const DivergenceKernels kDivergencePortable, kDivergenceAvx2, kDivergenceAvx512;

}  // namespace rlhf
