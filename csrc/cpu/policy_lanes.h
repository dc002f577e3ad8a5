// What the policy pass is written with: comparisons, loads of whole and broken vectors, exp with its neighbours,
// KL estimates, and sums by lane. Compiled once per instruction set, as row_pass_vec.h.
#pragma once

#include <limits>

#include "policy.h"
#include "row_pass_vec.h"

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kMaxLogRatio = 20.0f;

// What a comparison of two Vec gives: all bits set where it holds.
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));

// Set where a byte is not 0.
inline Mask load_mask(const uint8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Mask>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) != 0;
#elif defined(__AVX2__)
  return reinterpret_cast<Mask>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))) != 0;
#else
  return Mask{p[0], p[1], p[2], p[3]} != 0;
#endif
}

inline Vec pick(Mask which, Vec yes, Vec no) { return which ? yes : no; }
inline Vec at_most(Vec x, Vec high) { return pick(x > high, high, x); }  // keeps a NaN of x

// Loads of whole vectors; or of the last `some` < kLanes tokens, the missing ones 0.
struct Whole {
  Vec operator()(const float* p) const { return load(p); }
  Mask mask(const uint8_t* p) const { return load_mask(p); }
  void put(float* p, Vec x) const { store(p, x); }
};

struct Part {
  int some;
  Vec operator()(const float* p) const {
    float lanes[kLanes] = {};
    for (int i = 0; i < some; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  Mask mask(const uint8_t* p) const {
    Mask m{};
    for (int i = 0; i < some; ++i) m[i] = p[i] ? -1 : 0;
    return m;
  }
  void put(float* p, Vec x) const {
    float lanes[kLanes];
    store(lanes, x);
    for (int i = 0; i < some; ++i) p[i] = lanes[i];
  }
  Mask present() const {
    Mask m{};
    for (int i = 0; i < some; ++i) m[i] = -1;
    return m;
  }
};

// exp(x), exp(x) - 1 and exp(x) - 1 - x for kLowest <= x <= 88, or NaN. Where the power of two is 1, the remainder r
// of exp_parts is x itself, and what it has beyond 1 + r is there without a difference.
struct Exponential {
  Vec value, less_one, rest;
};

inline Exponential exponential(Vec x) {
  const Exp e = exp_parts(x);
  const Vec less_one = fma(e.power, e.minus_one, e.power - all(1.0f));
  return {fma(e.power, e.minus_one, e.power), less_one, pick(e.power == all(1.0f), e.beyond, less_one - x)};
}

struct Kl {
  Vec value, slope;  // slope: by logprob
};

// d = logprob - ref_logprob.
inline Kl kl_of(Vec d, int estimator, int gradient) {
  using namespace rlhf;
  Vec k3 = d, k3_slope = d;
  if (estimator == kK3 || gradient == kK3) {
    const Vec x = at_most(all(-1.0f) * d, all(kMaxLogRatio));
    k3 = exponential(at_least(x, all(kLowest))).rest;
    k3 = pick(x < all(kLowest), all(-1.0f) - x, k3);
    k3_slope = pick(d < all(-kMaxLogRatio), all(0.0f), all(-1.0f) * (k3 + x));
  }
  const Vec value = estimator == kK1 ? d : estimator == kAbs ? abs_of(d) : estimator == kK2 ? all(0.5f) * d * d : k3;
  const Vec sign = pick(d > all(0.0f), all(1.0f), pick(d < all(0.0f), all(-1.0f), d * all(0.0f)));
  const Vec slope = gradient == kK1 ? all(1.0f) : gradient == kAbs ? sign : gradient == kK2 ? d : k3_slope;
  return {value, slope};
}

// Sums by lane: seven of floats, four counts, two extremes. A float sum of many lanes is formed of sums of few, which
// are then added as doubles: rounding as in a pairwise sum.
enum { kLossSum, kPolicySum, kRatioSum, kDriftSum, kKlSum, kEntropySum, kSharedSum, kFloatSums };
enum { kLowCount, kHighCount, kFarCount, kTokenCount, kCounts };

struct Tally {
  Vec floats[kFloatSums];
  Mask counts[kCounts];
  Vec max, min;  // of numbers: a NaN is seen in the sum of ratios

  void clear() {
    for (Vec& x : floats) x = all(0.0f);
    for (Mask& x : counts) x = Mask{};
    max = all(-kInf);
    min = all(kInf);
  }

  void add(const Tally& t) {
    for (int k = 0; k < kFloatSums; ++k) floats[k] = floats[k] + t.floats[k];
    for (int k = 0; k < kCounts; ++k) counts[k] += t.counts[k];
    max = pick(t.max > max, t.max, max);
    min = pick(t.min < min, t.min, min);
  }

  // Into sums (kPolicySums,); what sequences share into *shared.
  void flush(double* sums, double* shared) {
    static constexpr int kFloatSlot[kSharedSum] = {0, 1, 5, 6, 7, 8}, kCountSlot[kCounts] = {2, 3, 4, 9};
    float lanes[kLanes];
    for (int k = 0; k < kFloatSums; ++k) {
      store(lanes, floats[k]);
      double& sum = k == kSharedSum ? *shared : sums[kFloatSlot[k]];
      for (float x : lanes) sum += double{x};
    }
    for (int k = 0; k < kCounts; ++k) {
      int64_t count = 0;
      for (int lane = 0; lane < kLanes; ++lane) count -= counts[k][lane];
      sums[kCountSlot[k]] += double(count);
    }
    store(lanes, max);
    for (float x : lanes) sums[10] = x > sums[10] ? double{x} : sums[10];
    store(lanes, min);
    for (float x : lanes) sums[11] = x < sums[11] ? double{x} : sums[11];
    if (sums[5] != sums[5]) sums[10] = sums[11] = sums[5];
    clear();
  }
};

}  // namespace
