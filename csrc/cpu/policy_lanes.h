// What the passes over tokens are written with: comparisons, loads of whole and broken vectors, exp with its neighbours,
// KL estimates, and sums by lane. Compiled once per instruction set, as row_pass_vec.h.
#pragma once

#include <algorithm>
#include <limits>

#include "policy.h"
#include "row_pass_vec.h"

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kMaxLogRatio = 20.0f;

// Where something holds, lane by lane; comparisons with a NaN do not hold, but `differs`. Tokens are counted in a Count.
#if defined(__AVX512F__)

struct Mask {
  __mmask16 bits;
};
using Count = int64_t;
inline Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits & b.bits)}; }
inline Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits | b.bits)}; }
inline Mask operator~(Mask a) { return {static_cast<__mmask16>(~a.bits)}; }
inline Mask less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)}; }
inline Mask equal(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ)}; }
inline Mask differs(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ)}; }
inline Vec pick(Mask which, Vec yes, Vec no) { return _mm512_mask_blend_ps(which.bits, no, yes); }
inline Vec at_most(Vec x, Vec high) { return _mm512_min_ps(high, x); }  // keeps a NaN of x
inline Vec lowest(Vec x, Vec m) { return _mm512_min_ps(x, m); }         // keeps m when x is NaN
inline Mask first_lanes(int some) { return {static_cast<__mmask16>((1u << some) - 1u)}; }
inline Mask load_mask(const uint8_t* p) {  // set where a byte is not 0
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm_test_epi8_mask(bytes, bytes)};
}
inline void count(Count* c, Mask which) { *c += __builtin_popcount(which.bits); }
inline int64_t total(Count c) { return c; }

#else

typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));
using Count = Mask;
inline Mask less(Vec a, Vec b) { return reinterpret_cast<Mask>(a < b); }
inline Mask equal(Vec a, Vec b) { return reinterpret_cast<Mask>(a == b); }
inline Mask differs(Vec a, Vec b) { return reinterpret_cast<Mask>(a != b); }
inline Vec pick(Mask which, Vec yes, Vec no) { return which ? yes : no; }
#if defined(__AVX2__)
inline Vec at_most(Vec x, Vec high) { return _mm256_min_ps(high, x); }
inline Vec lowest(Vec x, Vec m) { return _mm256_min_ps(x, m); }
inline Mask load_mask(const uint8_t* p) {
  return reinterpret_cast<Mask>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))) != 0;
}
#else
inline Vec at_most(Vec x, Vec high) { return pick(less(high, x), high, x); }
inline Vec lowest(Vec x, Vec m) { return pick(less(x, m), x, m); }
inline Mask load_mask(const uint8_t* p) { return Mask{p[0], p[1], p[2], p[3]} != 0; }
#endif
inline Mask first_lanes(int some) {
  Mask m{};
  for (int i = 0; i < some; ++i) m[i] = -1;
  return m;
}
inline void count(Count* c, Mask which) { *c -= which; }
inline int64_t total(Count c) {
  int64_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += c[i];
  return sum;
}

#endif

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
    uint8_t bytes[kLanes] = {};
    for (int i = 0; i < some; ++i) bytes[i] = p[i];
    return load_mask(bytes);
  }
  void put(float* p, Vec x) const {
    float lanes[kLanes];
    store(lanes, x);
    for (int i = 0; i < some; ++i) p[i] = lanes[i];
  }
  Mask present() const { return first_lanes(some); }
};

constexpr int kInner = 16;  // vectors in a float sum

// body(first token, vectors, lanes that are there, how to load them) for tokens [begin, end).
template <class Body>
inline void in_vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  while (i + kLanes <= end) {
    const int steps = static_cast<int>(std::min<int64_t>((end - i) / kLanes, kInner));
    body(i, steps, first_lanes(kLanes), Whole{});
    i += int64_t{steps} * kLanes;
  }
  const Part part{static_cast<int>(end - i)};
  if (i < end) body(i, 1, part.present(), part);
}

// exp(x), exp(x) - 1 and exp(x) - 1 - x for kLowest <= x <= 88, or NaN. Where the power of two is 1, the remainder r
// of exp_parts is x itself, and what it has beyond 1 + r is there without a difference.
struct Exponential {
  Vec value, less_one, rest;
};

inline Exponential exponential(Vec x) {
  const Exp e = exp_parts(x);
  const Vec less_one = fma(e.power, e.minus_one, e.power - all(1.0f));
  return {fma(e.power, e.minus_one, e.power), less_one, pick(equal(e.power, all(1.0f)), e.beyond, less_one - x)};
}

// 1, -1 or 0; NaN of a NaN.
inline Vec sign_of(Vec x) {
  const Vec zero = all(0.0f);
  return pick(less(zero, x), all(1.0f), pick(less(x, zero), all(-1.0f), x * zero));
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
    k3 = pick(less(x, all(kLowest)), all(-1.0f) - x, k3);
    k3_slope = pick(less(d, all(-kMaxLogRatio)), all(0.0f), all(-1.0f) * (k3 + x));
  }
  const Vec value = estimator == kK1 ? d : estimator == kAbs ? abs_of(d) : estimator == kK2 ? all(0.5f) * d * d : k3;
  const Vec slope = gradient == kK1 ? all(1.0f) : gradient == kAbs ? sign_of(d) : gradient == kK2 ? d : k3_slope;
  return {value, slope};
}

// Sums by lane: seven of floats, four counts, two extremes. A float sum of many lanes is formed of sums of few, which
// are then added as doubles: rounding as in a pairwise sum.
enum { kLossSum, kPolicySum, kRatioSum, kDriftSum, kKlSum, kEntropySum, kSharedSum, kFloatSums };
enum { kLowCount, kHighCount, kFarCount, kTokenCount, kCounts };

struct Tally {
  Vec floats[kFloatSums];
  Count counts[kCounts];
  Vec max, min;  // of numbers: a NaN is seen in the sum of ratios

  void clear() {
    for (Vec& x : floats) x = all(0.0f);
    for (Count& x : counts) x = Count{};
    max = all(-kInf);
    min = all(kInf);
  }

  void add(const Tally& t) {
    for (int k = 0; k < kFloatSums; ++k) floats[k] = floats[k] + t.floats[k];
    for (int k = 0; k < kCounts; ++k) counts[k] += t.counts[k];
    max = highest(t.max, max);
    min = lowest(t.min, min);
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
    for (int k = 0; k < kCounts; ++k) sums[kCountSlot[k]] += double(total(counts[k]));
    store(lanes, max);
    for (float x : lanes) sums[10] = x > sums[10] ? double{x} : sums[10];
    store(lanes, min);
    for (float x : lanes) sums[11] = x < sums[11] ? double{x} : sums[11];
    if (sums[5] != sums[5]) sums[10] = sums[11] = sums[5];
    clear();
  }
};

}  // namespace
