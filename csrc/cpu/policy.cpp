// Spreads the policy pass over the threads and adds its blocks up in order.
#include "policy.h"

#include <cstring>
#include <limits>
#include <vector>

#include "parallel.h"
#include "row_pass.h"

namespace rlhf {
namespace {

constexpr int64_t kTokensPerBlock = 1 << 14;

// The instruction set is the one chosen for the row passes.
const PolicyKernels& kernels() {
#ifdef RLHF_X86_KERNELS
  if (!std::strcmp(isa_name(), "avx512")) return kPolicyKernelsAvx512;
  if (!std::strcmp(isa_name(), "avx2")) return kPolicyKernelsAvx2;
#endif
  return kPolicyKernelsPortable;
}

bool by_sequence(const PolicyClip& a) { return a.level != kToken || a.form == kGeoMean; }

// Where the blocks begin that a thread takes: tokens, or sequences where those have a ratio of their own.
std::vector<int64_t> block_bounds(const PolicyClip& a) {
  std::vector<int64_t> bounds{0};
  if (!by_sequence(a)) {
    for (int64_t i = kTokensPerBlock; i < a.n; i += kTokensPerBlock) bounds.push_back(i);
    if (a.n) bounds.push_back(a.n);
    return bounds;
  }
  const auto start = [&](int64_t s) { return a.offsets ? a.offsets[s] : s * a.length; };
  for (int64_t s = 1; s <= a.segments; ++s) {
    if (s == a.segments || start(s) - start(bounds.back()) >= kTokensPerBlock) bounds.push_back(s);
  }
  return bounds;
}

}  // namespace

void policy_clip(const PolicyClip& a, int threads) {
  const std::vector<int64_t> bounds = block_bounds(a);
  const int64_t blocks = static_cast<int64_t>(bounds.size()) - 1;
  std::vector<double> partial(blocks * kPolicySums);
  const auto pass = by_sequence(a) ? kernels().sequences : kernels().tokens;
  parallel_for(blocks, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) pass(a, bounds[b], bounds[b + 1], &partial[b * kPolicySums]);
  });
  double sums[kPolicySums] = {};
  double& max = sums[kPolicySums - 2] = -std::numeric_limits<double>::infinity();
  double& min = sums[kPolicySums - 1] = std::numeric_limits<double>::infinity();
  for (int64_t b = 0; b < blocks; ++b) {
    const double* block = &partial[b * kPolicySums];
    for (int k = 0; k < kPolicySums - 2; ++k) sums[k] += block[k];
    const double high = block[kPolicySums - 2], low = block[kPolicySums - 1];
    if (high > max || high != high) max = high;
    if (low < min || low != low) min = low;
  }
  if (sums[kPolicySums - 3] == 0.0) max = min = 1.0;  // no token: no extremes
  for (int k = 0; k < kPolicySums; ++k) a.sums[k] = static_cast<float>(sums[k]);
}

void kl_terms(const KlTerms& a, int threads) {
  parallel_for(a.n, kTokensPerBlock, threads, [&](int64_t begin, int64_t end) { kernels().kl(a, begin, end); });
}

void segment_counts(const uint8_t* mask, const int64_t* offsets, int64_t segments, int64_t length, int64_t* out,
                    int threads) {
  const int64_t n = offsets ? offsets[segments] : segments * length;
  parallel_for(segments, segments / 16 + 1, n < kTokensPerBlock ? 1 : threads, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const int64_t begin = offsets ? offsets[s] : s * length, end = offsets ? offsets[s + 1] : begin + length;
      int64_t count = 0, i = begin;
      for (; i + 8 <= end; i += 8) {  // eight bytes of 0 or 1, added up by the product in its highest byte
        uint64_t word;
        std::memcpy(&word, mask + i, 8);
        count += static_cast<int64_t>((word * 0x0101010101010101u) >> 56);
      }
      for (; i < end; ++i) count += mask[i];
      out[s] = count;
    }
  });
}

}  // namespace rlhf
