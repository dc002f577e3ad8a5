// The policy pass for one instruction set: compiled as often as row_pass_kernel.cpp (CMakeLists.txt).
#include <algorithm>
#include <cmath>

#include "../common/affine_scan.h"
#include "policy_forms.h"

namespace rlhf {
namespace {

constexpr int kOuter = 16;  // float sums in a float sum of sums

bool per_segment(const PolicyClip& a, const Spread& s) { return s.data && s.count != a.n && s.count != 1; }

Constants constants_of(const PolicyClip& a, int64_t segment) {
  const auto of = [&](const Spread& s) {
    return s.data && s.count != a.n ? all(s.data[s.count == 1 ? 0 : segment]) : all(0.0f);
  };
  Constants c{};
  c.advantage = of(a.advantages);
  c.weight = of(a.weight);
  c.entropy_weight = of(a.entropy_weight);
  c.low = all(a.low);
  c.high = all(a.high);
  c.delta = all(a.delta);
  c.dual_clip = all(a.dual_clip);
  c.first = all(a.first);
  c.second = all(a.second);
  return c;
}

// The tokens of a vector that count, their weights and advantages, whatever is per token or not.
template <class Get>
struct Counted {
  const float* advantages;
  const float* weights;
  const uint8_t* mask;
  const Constants& same;
  Get get;
  Mask present;

  Counted(const PolicyClip& a, const Constants& c, Get g, Mask there)
      : advantages(a.advantages.count == a.n ? a.advantages.data : nullptr),
        weights(a.weight.count == a.n ? a.weight.data : nullptr), mask(a.mask), same(c), get(g), present(there) {}

  Vec any_weight(int64_t i) const { return weights ? get(weights + i) : same.weight; }
  Mask valid(int64_t i) const {
    const Mask valid = differs(any_weight(i), all(0.0f)) & present;
    return mask ? valid & get.mask(mask + i) : valid;
  }
  Vec advantage(int64_t i, Mask valid) const {
    return pick(valid, advantages ? get(advantages + i) : same.advantage, all(0.0f));
  }
};

// Up to kInner vectors of tokens from `i` on, all of one sequence where something is per sequence. kRef, kMore: there may
// be a ref_logprob; policy weights or an entropy. kLevel: whose ratio it is.
template <int kForm, int kLevel, bool kRef, bool kMore, class Get>
inline Tally run(const PolicyClip& a, const Constants& given, int64_t i, int steps, Mask present, Get get) {
  constexpr bool kShares = kLevel == kSequence || kForm == kGeoMean;  // gradient that all tokens of a sequence share
  constexpr bool kClips = kForm == kClip || kForm == kOnlyClip;
  constexpr bool kByRatio = kClips || kForm == kSapo || kForm == kKlCov || kForm == kGeoMean;
  const Constants same = given;
  const Counted<Get> counted(a, same, get, present);
  const float* const logprob = a.logprob;
  const float* const old_logprob = a.old_logprob;
  const float* const ref_logprob = a.ref_logprob;
  const float* const entropy_weights = a.entropy_weight.count == a.n ? a.entropy_weight.data : nullptr;
  float* const dlogprob = a.dlogprob;
  const Vec zero = all(0.0f), beta = all(a.beta);
  Tally t;
  t.clear();
  for (const int64_t end = i + int64_t{steps} * kLanes; i < end; i += kLanes) {
    const Mask valid = counted.valid(i);
    const auto clean = [&](const float* p) { return pick(valid, get(p), zero); };
    const Vec w = pick(valid, counted.any_weight(i), zero);
    Token x{clean(logprob + i), counted.advantage(i, valid), {}, zero, all(1.0f), zero};
    x.old_logprob = x.logprob;
    Vec dratio = all(1.0f);
    if (old_logprob) {
      x.old_logprob = clean(old_logprob + i);
      x.moved = x.logprob - x.old_logprob;
      const Vec bounded = at_most(at_least(x.moved, all(-kMaxLogRatio)), all(kMaxLogRatio));
      const Exponential e = exponential(bounded);
      x.ratio = e.value;
      x.less_one = e.less_one;
      dratio = pick(equal(bounded, x.moved), e.value, zero);
      t.floats[kDriftSum] = t.floats[kDriftSum] + e.rest;
    }
    if (kLevel != kToken) {
      x.ratio = same.ratio;
      dratio = same.dratio;
    }
    Loss policy = loss_of<kForm>(x, same, kForm == kKlCov ? clean(a.held + i) : zero);
    if (kMore && a.policy_weight) {
      const Vec v = clean(a.policy_weight + i);
      policy.loss = policy.loss * v;
      policy.direct = policy.direct * v;
      policy.by_ratio = policy.by_ratio * v;
    }
    const Vec weighted = w * policy.loss;
    Vec total = weighted, slope = policy.direct, shared = zero;
    if (kShares) {
      shared = policy.by_ratio * same.dratio;
    } else if (kByRatio) {
      slope = kClips ? policy.by_ratio * dratio : fma(policy.by_ratio, dratio, slope);
    }
    if (kRef && ref_logprob) {
      const Kl kl = kl_of(x.logprob - clean(ref_logprob + i), a.kl_estimator, a.kl_gradient);
      const Vec value = pick(valid, kl.value, zero);
      const Vec by_ratio = a.kl_correction ? value * dratio : zero;
      const Vec direct = a.kl_correction ? kl.slope * x.ratio : kl.slope;
      total = fma(w * (a.kl_correction ? value * x.ratio : value), beta, total);
      slope = fma(kLevel == kSequence ? direct : direct + by_ratio, beta, slope);
      if (kLevel == kSequence) shared = fma(by_ratio, beta, shared);
      t.floats[kKlSum] = t.floats[kKlSum] + value;
    }
    const Vec own = w * slope;  // a sequence may have a NaN where one of its tokens does not count
    get.put(dlogprob + i, kLevel == kToken ? own : pick(valid, own, zero));
    if (kShares) t.floats[kSharedSum] = t.floats[kSharedSum] + w * shared;
    if (kMore && a.entropy) {
      const Vec entropy = clean(a.entropy + i);
      t.floats[kEntropySum] = t.floats[kEntropySum] + entropy;
      if (a.dentropy) {
        const Vec u = pick(valid, entropy_weights ? get(entropy_weights + i) : same.entropy_weight, zero);
        const Vec dentropy = all(-a.entropy_coef) * u;
        total = fma(dentropy, entropy, total);
        get.put(a.dentropy + i, dentropy);
      }
    }
    if (kRef || kMore) t.floats[kLossSum] = t.floats[kLossSum] + total;
    t.floats[kPolicySum] = t.floats[kPolicySum] + weighted;
    t.floats[kRatioSum] = t.floats[kRatioSum] + pick(valid, x.ratio, zero);
    count(&t.counts[kLowCount], policy.low & valid);
    count(&t.counts[kHighCount], policy.high & valid);
    count(&t.counts[kFarCount], policy.far & valid);
    count(&t.counts[kTokenCount], valid);
    t.max = highest(pick(valid, x.ratio, all(-kInf)), t.max);
    t.min = lowest(pick(valid, x.ratio, all(kInf)), t.min);
  }
  if (!(kRef || kMore)) t.floats[kLossSum] = t.floats[kPolicySum];
  return t;
}

void clear(double* sums) {
  for (int k = 0; k < kPolicySums; ++k) sums[k] = 0.0;
  sums[10] = -kInf;
  sums[11] = kInf;
}

// Adds tallies up, and flushes them into doubles now and then.
struct Total {
  double* sums;
  double shared = 0.0;
  Tally outer;
  int groups = 0;

  explicit Total(double* s) : sums(s) { outer.clear(); }
  void add(const Tally& t) {
    outer.add(t);
    if (++groups % kOuter == 0) flush();
  }
  void flush() { outer.flush(sums, &shared); }
};

template <int kForm, bool kRef, bool kMore>
void tokens(const PolicyClip& a, int64_t begin, int64_t end, double* sums) {
  clear(sums);
  const bool segmented = per_segment(a, a.advantages) || per_segment(a, a.weight) || per_segment(a, a.entropy_weight);
  int64_t segment = 0, stop = end;
  if (segmented) segment = a.offsets ? find_sequence(a.offsets, 0, a.segments - 1, begin) : begin / a.length;
  Total total(sums);
  for (int64_t i = begin; i < end; i = std::max(i, stop), ++segment) {
    if (segmented) stop = std::min(a.offsets ? a.offsets[segment + 1] : (segment + 1) * a.length, end);
    const Constants same = constants_of(a, segment);
    in_vectors(i, stop, [&](int64_t at, int steps, Mask present, auto get) {
      total.add(run<kForm, kToken, kRef, kMore>(a, same, at, steps, present, get));
    });
  }
  total.flush();
}

// ---- losses with a ratio of the sequence ----

// Over the tokens of a sequence that count: the log-ratio of each (kGeoMean: what counts of it), its advantage, 1.
struct SequenceSums {
  double log_ratio = 0.0, advantage = 0.0, count = 0.0;
};

template <int kForm, class Get>
inline void add_sequence(const PolicyClip& a, const Constants& same, int64_t i, int steps, Mask present, Get get,
                         SequenceSums* sums) {
  const Counted<Get> counted(a, same, get, present);
  Vec log_ratio = all(0.0f), advantage = log_ratio, count = log_ratio;
  for (const int64_t end = i + int64_t{steps} * kLanes; i < end; i += kLanes) {
    const Mask valid = counted.valid(i);
    const Vec adv = counted.advantage(i, valid);
    Vec moved = all(0.0f);
    if (a.old_logprob) moved = pick(valid, get(a.logprob + i) - get(a.old_logprob + i), moved);
    log_ratio = log_ratio + (kForm == kGeoMean ? kept_log_ratio(moved, adv, same.low, same.high) : moved);
    advantage = advantage + adv;
    count = count + pick(valid, all(1.0f), all(0.0f));
  }
  float lanes[3][kLanes];
  store(lanes[0], log_ratio);
  store(lanes[1], advantage);
  store(lanes[2], count);
  for (int k = 0; k < kLanes; ++k) {
    sums->log_ratio += double{lanes[0][k]};
    sums->advantage += double{lanes[1][k]};
    sums->count += double{lanes[2][k]};
  }
}

// dlogprob += share for the tokens of the sequence whose log-ratio counts.
template <int kForm, class Get>
inline void share_out(const PolicyClip& a, const Constants& same, Vec share, int64_t i, int steps, Mask present,
                      Get get) {
  const Counted<Get> counted(a, same, get, present);
  for (const int64_t end = i + int64_t{steps} * kLanes; i < end; i += kLanes) {
    Mask moves = counted.valid(i);
    if (kForm == kGeoMean) {
      const Vec adv = counted.advantage(i, moves);
      Vec moved = all(0.0f);
      if (a.old_logprob) moved = pick(moves, get(a.logprob + i) - get(a.old_logprob + i), moved);
      const Vec kept = kept_log_ratio(moved, adv, same.low, same.high);
      moves = moves & differs(adv, all(0.0f)) & equal(kept, moved);
    }
    get.put(a.dlogprob + i, get(a.dlogprob + i) + pick(moves, share, all(0.0f)));
  }
}

template <int kForm, int kLevel>
void sequences(const PolicyClip& a, int64_t first, int64_t last, double* sums) {
  clear(sums);
  Total total(sums);
  for (int64_t s = first; s < last; ++s) {
    const int64_t begin = a.offsets ? a.offsets[s] : s * a.length, end = a.offsets ? a.offsets[s + 1] : begin + a.length;
    if (end <= begin) continue;
    Constants same = constants_of(a, s);
    SequenceSums of;
    in_vectors(begin, end, [&](int64_t i, int steps, Mask present, auto get) {
      add_sequence<kForm>(a, same, i, steps, present, get, &of);
    });
    const double count = std::max(of.count, 1.0), mean = of.log_ratio / count;
    const double limit = double{kMaxLogRatio}, bounded = mean > limit ? limit : mean < -limit ? -limit : mean;
    const double ratio = std::exp(bounded), dratio = bounded == mean ? ratio : 0.0;
    same.ratio = all(float(ratio));
    same.dratio = all(float(dratio));
    same.slope = all(float(-of.advantage / count));
    same.loss = all(float(-of.advantage / count * ratio));
    total.shared = 0.0;
    in_vectors(begin, end, [&](int64_t i, int steps, Mask present, auto get) {
      total.add(run<kForm, kLevel, true, true>(a, same, i, steps, present, get));
    });
    if (kLevel == kSequence || kForm == kGeoMean) {
      total.flush();
      const Vec share = all(float(total.shared / count));
      in_vectors(begin, end, [&](int64_t i, int steps, Mask present, auto get) {
        share_out<kForm>(a, same, share, i, steps, present, get);
      });
    }
  }
  total.flush();
}

// ---- which ----

using Pass = void (*)(const PolicyClip&, int64_t, int64_t, double*);

template <int kForm>
constexpr Pass kTokens[2][2] = {{tokens<kForm, false, false>, tokens<kForm, false, true>},
                                {tokens<kForm, true, false>, tokens<kForm, true, true>}};

void token_pass(const PolicyClip& a, int64_t begin, int64_t end, double* sums) {
  static constexpr Pass kOthers[kGeoMean] = {
      nullptr,
      tokens<kVanilla, true, true>,
      tokens<kCispo, true, true>,
      tokens<kSapo, true, true>,
      tokens<kKlCov, true, true>,
      tokens<kDro, true, true>,
      tokens<kDppoTv, true, true>,
  };
  const bool ref = a.ref_logprob, more = a.policy_weight || a.entropy, only = a.delta == kInf && a.dual_clip == kInf;
  const Pass clips = only ? kTokens<kOnlyClip>[ref][more] : kTokens<kClip>[ref][more];
  (a.form == kClip ? clips : kOthers[a.form])(a, begin, end, sums);
}

void sequence_pass(const PolicyClip& a, int64_t first, int64_t last, double* sums) {
  const Pass clips = a.level == kSequence ? sequences<kClip, kSequence> : sequences<kClip, kSequenceToken>;
  (a.form == kGeoMean ? sequences<kGeoMean, kToken> : clips)(a, first, last, sums);
}

void kl_pass(const KlTerms& a, int64_t begin, int64_t end) {
  in_vectors(begin, end, [&](int64_t i, int steps, Mask, auto get) {
    for (const int64_t last = i + int64_t{steps} * kLanes; i < last; i += kLanes) {
      const Vec delta = get(a.logprob + i) - get(a.ref_logprob + i);
      const Kl kl = kl_of(a.mask ? pick(get.mask(a.mask + i), delta, all(0.0f)) : delta, a.estimator, a.gradient);
      get.put(a.value + i, kl.value);
      if (!a.slope) continue;
      get.put(a.slope + i, a.mask ? pick(get.mask(a.mask + i), kl.slope, all(0.0f)) : kl.slope);
    }
  });
}

}  // namespace

#if defined(__AVX512F__)
constexpr const char* kName = "avx512";
#elif defined(__AVX2__)
constexpr const char* kName = "avx2";
#else
constexpr const char* kName = "portable";
#endif

const PolicyKernels RLHF_POLICY_KERNELS = {kName, &token_pass, &sequence_pass, &kl_pass};

}  // namespace rlhf
