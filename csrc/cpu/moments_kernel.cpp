// Moments and whitening for one instruction set: compiled as often as row_pass_kernel.cpp (CMakeLists.txt).
#include <cmath>

#include "row_pass_vec.h"
#include "scans.h"

namespace rlhf {
namespace {

// Half a vector of floats is a vector of doubles.
constexpr int kHalf = kLanes / 2, kSums = 4;
typedef double Wide __attribute__((vector_size(8 * kHalf)));
typedef int64_t Flags __attribute__((vector_size(8 * kHalf)));
typedef float Half __attribute__((vector_size(4 * kHalf)));
typedef uint8_t Bytes __attribute__((vector_size(kHalf)));

inline Wide load_wide(const float* p) {
  Half x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Wide);
}

inline Flags load_flags(const uint8_t* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Flags) != 0;
}

template <bool kMasked>
inline Wide counted(const float* x, const uint8_t* mask, int64_t i, double instead) {
  const Wide value = load_wide(x + i);
  return kMasked ? (load_flags(mask + i) ? value : Wide{} + instead) : value;
}

inline double total(const Wide* sums) {
  const Wide all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0.0;
  for (int k = 0; k < kHalf; ++k) sum += all[k];
  return sum;
}

// Sum of f(x) over the counted elements [begin, end): several sums side by side, since one waits for the last addition.
// An element that does not count is `instead`, at which f is 0.
template <bool kMasked, class Term, class OneTerm>
inline double sum_of(const float* x, const uint8_t* mask, int64_t begin, int64_t end, double instead, Term term,
                     OneTerm one) {
  Wide sums[kSums] = {};
  int64_t i = begin;
  for (; i + kSums * kHalf <= end; i += kSums * kHalf) {
    for (int k = 0; k < kSums; ++k) sums[k] += term(counted<kMasked>(x, mask, i + k * kHalf, instead));
  }
  double rest = 0.0;
  for (; i < end; ++i) rest += !kMasked || mask[i] ? one(double{x[i]}) : 0.0;
  return total(sums) + rest;
}

template <bool kMasked>
Moments block(const float* x, const uint8_t* mask, int64_t begin, int64_t end) {
  int64_t count = end - begin;
  if (kMasked) {
    count = 0;
    for (int64_t i = begin; i < end; ++i) count += mask[i] != 0;
  }
  if (count == 0) return {0.0, 0.0, 0.0};
  const auto same = [](auto v) { return v; };
  const double mean = sum_of<kMasked>(x, mask, begin, end, 0.0, same, same) / double(count);
  const auto square = [mean](auto v) { return (v - mean) * (v - mean); };
  return {double(count), mean, sum_of<kMasked>(x, mask, begin, end, mean, square, square)};
}

Moments block_moments(const float* x, const uint8_t* mask, int64_t begin, int64_t end) {
  return mask ? block<true>(x, mask, begin, end) : block<false>(x, mask, begin, end);
}

void whiten_block(const float* x, const uint8_t* mask, int64_t begin, int64_t end, double mean, double scale,
                  double shift, float* out) {
  int64_t i = begin;
  for (; i + kHalf <= end; i += kHalf) {
    Wide white = (load_wide(x + i) - mean) * scale + shift;
    if (mask) white = load_flags(mask + i) ? white : Wide{};
    const Half narrow = __builtin_convertvector(white, Half);
    std::memcpy(out + i, &narrow, sizeof narrow);
  }
  for (; i < end; ++i) out[i] = !mask || mask[i] ? float((double{x[i]} - mean) * scale + shift) : 0.0f;
}

}  // namespace

const MomentKernels RLHF_MOMENT_KERNELS = {&block_moments, &whiten_block};

}  // namespace rlhf
