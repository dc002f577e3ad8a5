// Row passes over a chunk of raw logits z (n, V), as an LM head's product left it, on the CPU.
//
//   x = (z + bias) scale,   y = softcap tanh(x / softcap)  (softcap 0: y = x),   s = y inv_temperature
//   m = max_j s_j,   L = log sum_j exp(s_j - m)
//
// - row_stats reads each row once and gives m, L, the target's log-probability and the entropy.
// - row_dlogits reads each row once, writes its gradient once, and may do so in place.
// - Rows are independent and each is one thread's work: results do not depend on the thread count.
#pragma once

#include <cstdint>

namespace rlhf {

enum Dtype : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

struct RowStats {
  const void* logits;
  int dtype;
  int64_t n, v, stride;   // stride in elements
  const int64_t* target;  // (n,) or null; < 0: the row is not read and its results are 0
  const float* bias;      // (v,) or null
  double scale, softcap, inv_temperature;
  float* logprob;  // (n,) or null
  float* row_max;  // (n,)
  float* log_sum;  // (n,)
  float* entropy;  // (n,) or null
};

// out[k, j] = jac_j (d_target[r] [j == target[r]] + p_j (a[r] + b[r] log p_j)),  r = order[k],
// p_j = exp((s_j - m) - L),  jac_j = ds_j / dz_j.  Rows with d_target = a = b = 0 become zeros unread.
struct RowGrad {
  const void* logits;
  int dtype;
  int64_t stride;
  void* out;  // may share the rows of `logits` if its elements are no wider than theirs
  int out_dtype;
  int64_t out_stride;
  int64_t k, v;
  const int64_t* order;   // (k,) or null: r = k
  const int64_t* target;  // (n,) or null
  const float* bias;      // (v,) or null
  double scale, softcap, inv_temperature;
  const float* row_max;
  const float* log_sum;
  const float* d_target;
  const float* a;
  const float* b;  // null: 0
};

void row_stats(const RowStats& args, int threads);
void row_dlogits(const RowGrad& args, int threads);

// The instruction set in use: "avx512", "avx2" or "portable". use_isa returns false for one that this
// machine or build does not have.
const char* isa_name();
bool use_isa(const char* name);

// One compilation of row_pass_kernel.cpp; each covers rows [begin, end).
struct RowKernels {
  const char* name;
  void (*stats)(const RowStats&, int64_t begin, int64_t end);
  void (*dlogits)(const RowGrad&, int64_t begin, int64_t end);
};
extern const RowKernels kRowKernelsPortable, kRowKernelsAvx2, kRowKernelsAvx512;

}  // namespace rlhf
