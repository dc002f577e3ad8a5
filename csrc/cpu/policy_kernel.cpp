// The policy pass for one instruction set: compiled as often as row_pass_kernel.cpp (CMakeLists.txt).
#include <algorithm>
#include <limits>

#include "../common/affine_scan.h"
#include "policy.h"
#include "row_pass_vec.h"

namespace rlhf {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kMaxLogRatio = 20.0f;
// Lanes add up kInner numbers, then kOuter such sums, then go into doubles: rounding as in a pairwise sum.
constexpr int kInner = 16, kOuter = 16;

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

// exp(x) - 1 - x given e = exp(x); by its series for |x| < 0.5, where the difference cancels (truncated below 2e-9).
inline Vec minus_1_minus_x(Vec x, Vec e) {
  Vec p = fma(x, all(1.0f / 362880), all(1.0f / 40320));
  p = fma(p, x, all(1.0f / 5040));
  p = fma(p, x, all(1.0f / 720));
  p = fma(p, x, all(1.0f / 120));
  p = fma(p, x, all(1.0f / 24));
  p = fma(p, x, all(1.0f / 6));
  p = fma(p, x, all(0.5f));
  return pick(abs_of(x) < all(0.5f), p * x * x, (e - all(1.0f)) - x);
}

struct Kl {
  Vec value, slope;  // slope: by logprob
};

// d = logprob - ref_logprob.
inline Kl kl_of(Vec d, int estimator, int gradient) {
  Vec k3 = d, k3_slope = d;
  if (estimator == kK3 || gradient == kK3) {
    const Vec x = at_most(all(-1.0f) * d, all(kMaxLogRatio));
    k3 = minus_1_minus_x(x, exp_of(at_least(x, all(kLowest))));
    k3_slope = pick(d < all(-kMaxLogRatio), all(0.0f), all(-1.0f) * (k3 + x));
  }
  const Vec value = estimator == kK1 ? d : estimator == kAbs ? abs_of(d) : estimator == kK2 ? all(0.5f) * d * d : k3;
  const Vec sign = pick(d > all(0.0f), all(1.0f), pick(d < all(0.0f), all(-1.0f), d * all(0.0f)));
  const Vec slope = gradient == kK1 ? all(1.0f) : gradient == kAbs ? sign : gradient == kK2 ? d : k3_slope;
  return {value, slope};
}

// Sums by lane: six of floats, four counts, two extremes.
enum { kLoss, kPolicy, kRatio, kDrift, kKl, kEntropy, kFloats };
enum { kLow, kHigh, kFar, kCount, kCounts };

struct Tally {
  Vec floats[kFloats];
  Mask counts[kCounts];
  Vec max, min;

  void clear() {
    for (Vec& x : floats) x = all(0.0f);
    for (Mask& x : counts) x = Mask{};
    max = all(-kInf);
    min = all(kInf);
  }

  void add(const Tally& t) {
    for (int k = 0; k < kFloats; ++k) floats[k] = floats[k] + t.floats[k];
    for (int k = 0; k < kCounts; ++k) counts[k] += t.counts[k];
    max = pick((t.max > max) | (t.max != t.max), t.max, max);
    min = pick((t.min < min) | (t.min != t.min), t.min, min);
  }

  void flush(double* sums) {
    static constexpr int kFloatSlot[kFloats] = {0, 1, 5, 6, 7, 8}, kCountSlot[kCounts] = {2, 3, 4, 9};
    float lanes[kLanes];
    for (int k = 0; k < kFloats; ++k) {
      store(lanes, floats[k]);
      for (float x : lanes) sums[kFloatSlot[k]] += double{x};
    }
    for (int k = 0; k < kCounts; ++k) {
      int64_t count = 0;
      for (int lane = 0; lane < kLanes; ++lane) count -= counts[k][lane];
      sums[kCountSlot[k]] += double(count);
    }
    store(lanes, max);
    for (float x : lanes) sums[10] = x > sums[10] || x != x ? double{x} : sums[10];
    store(lanes, min);
    for (float x : lanes) sums[11] = x < sums[11] || x != x ? double{x} : sums[11];
    clear();
  }
};

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

// What is the same for all tokens of a sequence. Held by value: a store of a gradient cannot change it.
struct Constants {
  Vec advantage, weight, entropy_weight;

  Constants(const PolicyClip& a, int64_t segment) {
    const auto of = [&](const Spread& s) {
      return s.data && s.count != a.n ? all(s.data[s.count == 1 ? 0 : segment]) : all(0.0f);
    };
    advantage = of(a.advantages);
    weight = of(a.weight);
    entropy_weight = of(a.entropy_weight);
  }
};

// Up to kInner vectors of tokens from `i` on, all of one sequence where something is per sequence. kOld: there is an
// old_logprob; kRef: a ref_logprob; kMore: per-token policy weights or an entropy.
template <bool kOld, bool kRef, bool kMore, class Get>
inline Tally run(const PolicyClip& a, const Constants& same, int64_t i, int steps, Mask present, Get get) {
  const float* const logprob = a.logprob;
  const float* const old_logprob = a.old_logprob;
  const float* const ref_logprob = a.ref_logprob;
  const float* const advantages = a.advantages.count == a.n ? a.advantages.data : nullptr;
  const float* const weights = a.weight.count == a.n ? a.weight.data : nullptr;
  const float* const entropy_weights = a.entropy_weight.count == a.n ? a.entropy_weight.data : nullptr;
  const uint8_t* const mask = a.mask;
  float* const dlogprob = a.dlogprob;
  const Vec one_advantage = same.advantage, one_weight = same.weight;
  const Vec zero = all(0.0f), minus = all(-1.0f), low = all(a.low), high = all(a.high), delta = all(a.delta);
  const Vec dual_clip = all(-a.dual_clip), beta = all(a.beta);
  Tally t;
  t.clear();
  for (const int64_t end = i + int64_t{steps} * kLanes; i < end; i += kLanes) {
    const Vec any_weight = weights ? get(weights + i) : one_weight;
    Mask valid = (any_weight != zero) & present;
    if (mask) valid &= get.mask(mask + i);
    const auto clean = [&](const float* p) { return pick(valid, get(p + i), zero); };
    const Vec w = pick(valid, any_weight, zero);
    const Vec logp = clean(logprob);
    const Vec adv = pick(valid, advantages ? get(advantages + i) : one_advantage, zero);

    Vec bounded = zero, ratio = all(1.0f), dratio = ratio;
    if (kOld) {
      const Vec log_ratio = logp - clean(old_logprob);
      bounded = at_most(at_least(log_ratio, all(-kMaxLogRatio)), all(kMaxLogRatio));
      ratio = exp_of(bounded);
      dratio = pick(bounded == log_ratio, ratio, zero);
    }
    const Vec open = at_most(ratio, delta);
    const Vec minus_adv = minus * adv;
    const Vec open_loss = open * minus_adv;
    const Vec clip_loss = at_most(at_least(ratio, low), high) * minus_adv;
    const Mask open_wins = open_loss >= clip_loss, negative = adv < zero;
    const Vec cap = dual_clip * adv;
    Vec loss = pick(open_wins, open_loss, clip_loss);
    const Mask capped = negative & (loss > cap);
    loss = pick(capped, cap, loss);
    // The clipped branch wins strictly only where the ratio left the range, save for a delta inside of it.
    const Mask inside = (ratio >= low) & (ratio <= high), free = ratio == open;
    const Mask moves = ((open_wins & free) | (~open_wins & inside)) & ~capped;
    Vec slope = pick(moves, minus_adv * dratio, zero);
    if (kMore && a.policy_weight) {
      const Vec v = clean(a.policy_weight);
      loss = loss * v;
      slope = slope * v;
    }
    const Vec policy = w * loss;
    Vec total = policy;
    if (kRef) {
      const Kl kl = kl_of(logp - clean(ref_logprob), a.kl_estimator, a.kl_gradient);
      const Vec value = pick(valid, kl.value, zero);
      const Vec term = a.kl_correction ? value * ratio : value;
      const Vec dkl = a.kl_correction ? fma(kl.slope, ratio, value * dratio) : kl.slope;
      total = fma(w * term, beta, total);
      slope = fma(dkl, beta, slope);
      t.floats[kKl] = t.floats[kKl] + value;
    }
    get.put(dlogprob + i, w * slope);
    if (kMore && a.entropy) {
      const Vec entropy = clean(a.entropy);
      t.floats[kEntropy] = t.floats[kEntropy] + entropy;
      if (a.dentropy) {
        const Vec u = pick(valid, entropy_weights ? get(entropy_weights + i) : same.entropy_weight, zero);
        const Vec dentropy = all(-a.entropy_coef) * u;
        total = fma(dentropy, entropy, total);
        get.put(a.dentropy + i, dentropy);
      }
    }
    t.floats[kLoss] = t.floats[kLoss] + total;
    t.floats[kPolicy] = t.floats[kPolicy] + policy;
    t.floats[kRatio] = t.floats[kRatio] + pick(valid, ratio, zero);
    if (kOld) t.floats[kDrift] = t.floats[kDrift] + minus_1_minus_x(bounded, ratio);
    t.counts[kLow] += negative & (ratio < low);
    t.counts[kHigh] += (adv > zero) & (ratio > high);
    t.counts[kFar] += (negative & ~free) | capped;
    t.counts[kCount] += valid;
    // A NaN goes in and stays.
    const Mask odd = ratio != ratio;
    t.max = pick(valid & ((ratio > t.max) | odd), ratio, t.max);
    t.min = pick(valid & ((ratio < t.min) | odd), ratio, t.min);
  }
  return t;
}

template <bool kOld, bool kRef, bool kMore>
void clip_tokens(const PolicyClip& a, int64_t begin, int64_t end, double* sums) {
  for (int k = 0; k < kPolicySums; ++k) sums[k] = 0.0;
  sums[10] = -kInf;
  sums[11] = kInf;
  const auto per_segment = [&](const Spread& s) { return s.data && s.count != a.n && s.count != 1; };
  const bool segmented = per_segment(a.advantages) || per_segment(a.weight) || per_segment(a.entropy_weight);
  int64_t segment = 0, stop = end;
  if (segmented) segment = a.offsets ? find_sequence(a.offsets, 0, a.segments - 1, begin) : begin / a.length;
  Tally outer;
  outer.clear();
  int groups = 0;
  const auto add = [&](const Tally& t) {
    outer.add(t);
    if (++groups % kOuter == 0) outer.flush(sums);
  };
  for (int64_t i = begin; i < end; ++segment) {
    if (segmented) {
      stop = std::min(a.offsets ? a.offsets[segment + 1] : (segment + 1) * a.length, end);
      if (stop <= i) continue;
    }
    const Constants same(a, segment);
    while (i + kLanes <= stop) {
      const int steps = static_cast<int>(std::min<int64_t>((stop - i) / kLanes, kInner));
      add(run<kOld, kRef, kMore>(a, same, i, steps, ~Mask{}, Whole{}));
      i += int64_t{steps} * kLanes;
    }
    if (i < stop) {
      const Part part{static_cast<int>(stop - i)};
      add(run<kOld, kRef, kMore>(a, same, i, 1, part.present(), part));
      i = stop;
    }
  }
  outer.flush(sums);
}

void clip(const PolicyClip& a, int64_t begin, int64_t end, double* sums) {
  using Function = void (*)(const PolicyClip&, int64_t, int64_t, double*);
  static constexpr Function kFunctions[2][2][2] = {
      {{clip_tokens<false, false, false>, clip_tokens<false, false, true>},
       {clip_tokens<false, true, false>, clip_tokens<false, true, true>}},
      {{clip_tokens<true, false, false>, clip_tokens<true, false, true>},
       {clip_tokens<true, true, false>, clip_tokens<true, true, true>}}};
  kFunctions[a.old_logprob != nullptr][a.ref_logprob != nullptr][a.policy_weight || a.entropy](a, begin, end, sums);
}

}  // namespace

#if defined(__AVX512F__)
constexpr const char* kName = "avx512";
#elif defined(__AVX2__)
constexpr const char* kName = "avx2";
#else
constexpr const char* kName = "portable";
#endif

const PolicyKernels RLHF_POLICY_KERNELS = {kName, &clip};

}  // namespace rlhf
