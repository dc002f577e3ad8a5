// The row passes for one instruction set: compiled once with RLHF_ROW_KERNELS=kRowKernelsPortable, and on
// x86-64 again for AVX2 and AVX-512 (CMakeLists.txt).
#include <cmath>
#include <limits>
#include <type_traits>

#include "row_pass.h"
#include "row_pass_score.h"

namespace rlhf {
namespace {

// Scores of a block stay in L1 between the search of its maximum and the sums.
constexpr int kBlock = 1024;
constexpr float kInf = std::numeric_limits<float>::infinity();

// ---- row_stats ----

// Running maximum m, sum of exp(s - m) and sum of exp(s - m) (s - m) of a row.
struct Online {
  float max = -kInf;
  double sum = 0, weighted = 0;

  void raise_max(float block_max) {
    if (!(block_max > max)) return;
    if (max != -kInf) {
      const double shift = double{max} - block_max, decay = std::exp(shift);
      weighted = decay * (weighted + shift * sum);
      sum *= decay;
      if (decay == 0) weighted = sum;  // shift may be -inf; sum keeps a NaN
    }
    max = block_max;
  }
};

// The scores of elements [j, j + count), padded with -inf to whole vectors, into s; returns their maximum.
template <class In, bool kSoftcap, bool kBias>
inline float score_block(const typename In::Storage* z, const float* bias, int64_t j, int count,
                         const Factors& f, float* s) {
  Vec max0 = all(-kInf), max1 = max0;
  int i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Vec s0 = score<kSoftcap>(load_logits<In, kBias>(z, bias, j + i), f);
    const Vec s1 = score<kSoftcap>(load_logits<In, kBias>(z, bias, j + i + kLanes), f);
    store(s + i, s0);
    store(s + i + kLanes, s1);
    max0 = highest(s0, max0);
    max1 = highest(s1, max1);
  }
  for (; i < count; i += kLanes) {
    const int some = count - i < kLanes ? count - i : kLanes;
    store(s + i, score<kSoftcap>(load_some_logits<In, kBias>(z, bias, j + i, some), f));
    for (int lane = some; lane < kLanes; ++lane) s[i + lane] = -kInf;
    max0 = highest(load(s + i), max0);
  }
  float lanes[kLanes], max = -kInf;
  store(lanes, highest(max0, max1));
  for (float lane : lanes) max = lane > max ? lane : max;
  return max;
}

template <bool kEntropy>
inline void sum_block(const float* s, int padded, Online* row) {
  // An all -inf prefix leaves the maximum at -inf: any finite reference then gives the zeros it should.
  const Vec reference = all(row->max == -kInf ? 0.0f : row->max);
  Vec sum0 = all(0.0f), sum1 = sum0, weighted0 = sum0, weighted1 = sum0;
  const auto add = [&](const float* p, Vec* sum, Vec* weighted) {
    const Vec d = at_least(load(p) - reference, all(kLowest)), e = exp_of(d);
    *sum = *sum + e;
    if (kEntropy) *weighted = fma(e, d, *weighted);
  };
  int i = 0;
  for (; i + 2 * kLanes <= padded; i += 2 * kLanes) {
    add(s + i, &sum0, &weighted0);
    add(s + i + kLanes, &sum1, &weighted1);
  }
  if (i < padded) add(s + i, &sum0, &weighted0);
  row->sum += sum_lanes(sum0 + sum1);
  if (kEntropy) row->weighted += sum_lanes(weighted0 + weighted1);
}

template <class In, bool kSoftcap, bool kBias, bool kEntropy>
void stats_rows(const RowStats& args, int64_t begin, int64_t end) {
  const Factors f(args.scale, args.softcap, args.inv_temperature);
  alignas(64) float s[kBlock];
  for (int64_t r = begin; r < end; ++r) {
    const int64_t target = args.target ? args.target[r] : 0;
    if (target < 0) {
      if (args.logprob) args.logprob[r] = 0;
      if (kEntropy) args.entropy[r] = 0;
      args.row_max[r] = args.log_sum[r] = 0;
      continue;
    }
    const auto* z = static_cast<const typename In::Storage*>(args.logits) + r * args.stride;
    Online row;
    float target_score = std::numeric_limits<float>::quiet_NaN();
    for (int64_t j = 0; j < args.v; j += kBlock) {
      const int count = static_cast<int>(args.v - j < kBlock ? args.v - j : kBlock);
      row.raise_max(score_block<In, kSoftcap, kBias>(z, args.bias, j, count, f, s));
      sum_block<kEntropy>(s, (count + kLanes - 1) / kLanes * kLanes, &row);
      if (target >= j && target < j + count) target_score = s[target - j];
    }
    const double log_sum = std::log(row.sum);
    args.row_max[r] = row.max;
    args.log_sum[r] = static_cast<float>(log_sum);
    if (args.logprob) args.logprob[r] = static_cast<float>((double{target_score} - row.max) - log_sum);
    if (kEntropy) args.entropy[r] = static_cast<float>(log_sum - row.weighted / row.sum);
  }
}

// ---- row_dlogits ----

struct RowWeights {
  float max, log_sum, d_target, a, b;
};

template <bool kSoftcap>
inline Vec gradient(Vec x, const Factors& f, const RowWeights& w, Vec* slope) {
  const Vec s = score_and_slope<kSoftcap>(x, f, slope);
  const Vec log_p = at_least((s - all(w.max)) - all(w.log_sum), all(kLowest));
  return *slope * (exp_of(log_p) * fma(all(w.b), log_p, all(w.a)));
}

template <class In, class Out, bool kSoftcap, bool kBias>
void grad_row(const typename In::Storage* z, typename Out::Storage* out, int64_t v, int64_t target,
              const float* bias, const Factors& f, const RowWeights& w) {
  // The target's logit is read before anything is written over it, and its gradient is written last.
  const bool has_target = target >= 0 && target < v;
  Vec slope, at_target = all(0.0f);
  if (has_target) {
    const Vec rest = gradient<kSoftcap>(load_some_logits<In, kBias>(z, bias, target, 1), f, w, &slope);
    at_target = fma(slope, all(w.d_target), rest);
  }
  // Left to right, each vector read before it is written: `out` may be `z`, or a narrower view of it.
  int64_t j = 0;
  for (; j + kLanes <= v; j += kLanes)
    Out::store_vec(out + j, gradient<kSoftcap>(load_logits<In, kBias>(z, bias, j), f, w, &slope));
  if (j < v) {
    const int some = static_cast<int>(v - j);
    store_some<Out>(out + j, gradient<kSoftcap>(load_some_logits<In, kBias>(z, bias, j, some), f, w, &slope),
                    some);
  }
  if (has_target) Out::store_one(out + target, first_lane(at_target));
}

template <class In, class Out, bool kSoftcap, bool kBias>
void grad_rows(const RowGrad& args, int64_t begin, int64_t end) {
  const Factors f(args.scale, args.softcap, args.inv_temperature);
  for (int64_t k = begin; k < end; ++k) {
    const int64_t r = args.order ? args.order[k] : k;
    const RowWeights w{args.row_max[r], args.log_sum[r], args.d_target[r], args.a[r], args.b ? args.b[r] : 0.0f};
    auto* out = static_cast<typename Out::Storage*>(args.out) + k * args.out_stride;
    if (w.d_target == 0 && w.a == 0 && w.b == 0) {
      std::memset(out, 0, static_cast<size_t>(args.v) * sizeof *out);
      continue;
    }
    const auto* z = static_cast<const typename In::Storage*>(args.logits) + r * args.stride;
    grad_row<In, Out, kSoftcap, kBias>(z, out, args.v, args.target ? args.target[r] : -1, args.bias, f, w);
  }
}

void stats(const RowStats& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto in) {
    with_flag(args.softcap != 0, [&](auto softcap) {
      with_flag(args.bias != nullptr, [&](auto bias) {
        with_flag(args.entropy != nullptr, [&](auto entropy) {
          stats_rows<decltype(in), softcap.value, bias.value, entropy.value>(args, begin, end);
        });
      });
    });
  });
}

void dlogits(const RowGrad& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto in) {
    with_dtype(args.out_dtype, [&](auto out) {
      with_flag(args.softcap != 0, [&](auto softcap) {
        with_flag(args.bias != nullptr, [&](auto bias) {
          grad_rows<decltype(in), decltype(out), softcap.value, bias.value>(args, begin, end);
        });
      });
    });
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

const RowKernels RLHF_ROW_KERNELS = {kName, &stats, &dlogits};

}  // namespace rlhf
