// Spreads the pass of the value loss over the threads and adds its blocks up in order.
#include "value.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "row_pass.h"

namespace rlhf {
namespace {

constexpr int64_t kTokensPerBlock = 1 << 14;

const ValueKernels& kernels() {
#ifdef RLHF_X86_KERNELS
  if (!std::strcmp(isa_name(), "avx512")) return kValueKernelsAvx512;
  if (!std::strcmp(isa_name(), "avx2")) return kValueKernelsAvx2;
#endif
  return kValueKernelsPortable;
}

}  // namespace

void value_clip(const ValueClip& a, int threads) {
  const int64_t blocks = a.segments ? a.segments : (a.n + kTokensPerBlock - 1) / kTokensPerBlock;
  const auto bound = [&](int64_t b) {
    if (!a.segments) return std::min(a.n, b * kTokensPerBlock);
    return a.offsets ? a.offsets[b] : b * a.length;
  };
  std::vector<double> partial(blocks * kValueSums);
  const ValueKernels& chosen = kernels();
  parallel_for(blocks, a.segments ? blocks / 64 + 1 : 1, a.n < kTokensPerBlock ? 1 : threads,
               [&](int64_t first, int64_t last) {
                 for (int64_t b = first; b < last; ++b) {
                   chosen.clip(a, a.weight[a.segments ? b : 0], bound(b), bound(b + 1), &partial[b * kValueSums]);
                 }
               });
  double sums[kValueSums] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    for (int k = 0; k < kValueSums; ++k) sums[k] += partial[b * kValueSums + k];
  }
  for (int k = 0; k < kValueSums; ++k) a.sums[k] = static_cast<float>(sums[k]);
}

}  // namespace rlhf
