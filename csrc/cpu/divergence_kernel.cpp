// The divergence passes for one instruction set; compiled like row_pass_kernel.cpp, with RLHF_DIVERGENCE_KERNELS
// as its name.
#include <limits>

#include "divergence.h"
#include "row_pass_score.h"

namespace rlhf {
namespace {

// Log-probabilities, gradients and slopes of a block, for both sides, stay in L1.
constexpr int kBlock = 512;
constexpr float kInf = std::numeric_limits<float>::infinity();

typedef int32_t Int __attribute__((vector_size(sizeof(Vec))));

inline Int ints_of(Vec x) { Int i; std::memcpy(&i, &x, sizeof i); return i; }
inline Vec vec_of(Int i) { Vec x; std::memcpy(&x, &i, sizeof x); return x; }

// log(w) for 0 < w <= 1; NaN stays NaN. w = 2^k m with sqrt(1/2) <= m < sqrt(2), and log m = t - t^2/2 + t^3 P(t),
// t = m - 1, with the coefficients of Cephes' logf.
inline Vec log_of(Vec w) {
  const Int bits = ints_of(w);
  const Int shifted = bits - 0x3f3504f3;  // below sqrt(1/2): one power less
  const Int k = shifted >> 23;
  const Vec t = vec_of(bits - (k << 23)) - all(1.0f);
  const Vec exponent = __builtin_convertvector(k, Vec);
  Vec p = fma(t, all(7.0376836292e-2f), all(-1.1514610310e-1f));
  p = fma(p, t, all(1.1676998740e-1f));
  p = fma(p, t, all(-1.2420140846e-1f));
  p = fma(p, t, all(1.4249322787e-1f));
  p = fma(p, t, all(-1.6668057665e-1f));
  p = fma(p, t, all(2.0000714765e-1f));
  p = fma(p, t, all(-2.4999993993e-1f));
  p = fma(p, t, all(3.3333331174e-1f));
  const Vec square = t * t;
  Vec tail = fma(p * square, t, exponent * all(-2.12194440e-4f));
  tail = fma(square, all(-0.5f), tail);
  return fma(exponent, all(0.693359375f), t + tail) + (w - w);
}

inline Vec prob(Vec log_p) { return exp_of(at_least(log_p, all(kLowest))); }

// a h(d) with d = log b - log a. Below 1/2 by its series, where exp(d) - 1 - d would cancel; a = 0 leaves b.
inline Vec kl_term(Vec a, Vec b, Vec d) {
  Vec series = fma(d, all(1.0f / 40320), all(1.0f / 5040));
  series = fma(series, d, all(1.0f / 720));
  series = fma(series, d, all(1.0f / 120));
  series = fma(series, d, all(1.0f / 24));
  series = fma(series, d, all(1.0f / 6));
  series = fma(series, d, all(0.5f));
  const Vec near = a * (d * d * series), far = (b - a) - a * d;
  const Vec term = (abs_of(d) < all(0.5f)) ? near : far;
  return (a == all(0.0f)) ? b : term;
}

// log M - log p and log M - log q; exactly 0 where p = q.
struct Mixture {
  Vec from_p, from_q;
};

inline Mixture mixture(Vec log_p, Vec log_q, float ref_share) {
  const Vec u = log_p - log_q, gap = abs_of(u), nothing = all(0.0f);
  const Vec smaller = (u > nothing) ? all(ref_share) : all(1.0f - ref_share);
  const Vec near = log_of(fma(smaller, prob(nothing - gap) - all(1.0f), all(1.0f))), far = near + gap;
  return {(u > nothing) ? near : far, (u > nothing) ? far : near};
}

// a (log a - log b - KL(a || b)); a = 0 gives 0 whatever log b is.
inline Vec centred(Vec a, Vec from_a, Vec kl) {
  const Vec g = a * ((all(0.0f) - from_a) - kl);
  return (a == all(0.0f)) ? a : g;
}

// ---- a block of one side: log-probabilities in, gradients out ----

struct Block {
  alignas(64) float log_p[kBlock];
  alignas(64) float slope[kBlock];
};

// Loads elements [j, j + count) and pads them to whole vectors with log-probability -inf and slope 0.
using Loader = void (*)(const void* row, const float* bias, int64_t j, int count, const Factors& f, float max,
                        float log_sum, Block* block);
using Storer = void (*)(void* row, int64_t j, int count, const float* values);

template <class In, bool kSoftcap, bool kBias>
void load_block(const void* row, const float* bias, int64_t j, int count, const Factors& f, float max, float log_sum,
                Block* block) {
  const auto* z = static_cast<const typename In::Storage*>(row);
  int i = 0;
  Vec slope;
  const auto put = [&](Vec x) {
    store(block->log_p + i, (score_and_slope<kSoftcap>(x, f, &slope) - all(max)) - all(log_sum));
    store(block->slope + i, slope);
  };
  for (; i + kLanes <= count; i += kLanes) put(load_logits<In, kBias>(z, bias, j + i));
  if (i == count) return;
  put(load_some_logits<In, kBias>(z, bias, j + i, count - i));
  for (int lane = count; lane < i + kLanes; ++lane) {
    block->log_p[lane] = -kInf;
    block->slope[lane] = 0;
  }
}

template <class Out>
void store_block(void* row, int64_t j, int count, const float* values) {
  auto* out = static_cast<typename Out::Storage*>(row) + j;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) Out::store_vec(out + i, load(values + i));
  if (i < count) store_some<Out>(out + i, load(values + i), count - i);
}

// A side with its run-time options turned into functions.
struct Reader {
  const DivergenceSide& side;
  const Factors f;
  Loader load;
  Storer store;
  int64_t bytes;

  explicit Reader(const DivergenceSide& s) : side(s), f(s.scale, s.softcap, s.inv_temperature) {
    with_dtype(s.dtype, [&](auto in) {
      bytes = sizeof(typename decltype(in)::Storage);
      with_flag(s.softcap != 0, [&](auto softcap) {
        with_flag(s.bias != nullptr, [&](auto bias) { load = &load_block<decltype(in), softcap.value, bias.value>; });
      });
    });
    with_dtype(s.out_dtype, [&](auto out) { store = &store_block<decltype(out)>; });
  }

  void read(int64_t r, int64_t j, int count, Block* block) const {
    const char* row = static_cast<const char*>(side.logits) + r * side.stride * bytes;
    load(row, side.bias, j, count, f, side.row_max[r], side.log_sum[r], block);
  }
  void write(int64_t r, int64_t j, int count, const float* values) const {
    const int64_t width = side.out_dtype == kF32 ? 4 : 2;
    store(static_cast<char*>(side.out) + r * side.out_stride * width, j, count, values);
  }
};

inline int padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

// ---- the passes ----

template <int kKind>
void value_rows(const Divergence& args, int64_t begin, int64_t end) {
  const Reader own(args.own), ref(args.ref);
  const float share = static_cast<float>(args.ref_share);
  Block a, b;
  for (int64_t r = begin; r < end; ++r) {
    double own_kl = 0, ref_kl = 0;
    for (int64_t j = 0; j < args.v; j += kBlock) {
      const int count = static_cast<int>(args.v - j < kBlock ? args.v - j : kBlock);
      own.read(r, j, count, &a);
      ref.read(r, j, count, &b);
      Vec own_sum = all(0.0f), ref_sum = own_sum;
      for (int i = 0; i < padded(count); i += kLanes) {
        const Vec log_p = load(a.log_p + i), log_q = load(b.log_p + i), p = prob(log_p), q = prob(log_q);
        if (kKind == kForward) ref_sum = ref_sum + kl_term(q, p, log_p - log_q);
        if (kKind == kReverse) own_sum = own_sum + kl_term(p, q, log_q - log_p);
        if (kKind == kJsd) {
          const Mixture m = mixture(log_p, log_q, share);
          const Vec mixed = fma(all(share), q, all(1.0f - share) * p);
          own_sum = own_sum + kl_term(p, mixed, m.from_p);
          ref_sum = ref_sum + kl_term(q, mixed, m.from_q);
        }
      }
      if (kKind != kForward) own_kl += sum_lanes(own_sum);
      if (kKind != kReverse) ref_kl += sum_lanes(ref_sum);
    }
    if (args.own.kl && kKind != kForward) args.own.kl[r] = static_cast<float>(own_kl);
    if (args.ref.kl && kKind != kReverse) args.ref.kl[r] = static_cast<float>(ref_kl);
  }
}

template <int kKind>
void grad_rows(const Divergence& args, int64_t begin, int64_t end) {
  const Reader own(args.own), ref(args.ref);
  const float share = static_cast<float>(args.ref_share);
  const bool to_own = args.own.out, to_ref = args.ref.out;
  Block a, b;
  for (int64_t r = begin; r < end; ++r) {
    const Vec grad = all(args.grad[r]);
    const Vec own_kl = all(args.own.kl ? args.own.kl[r] : 0.0f), ref_kl = all(args.ref.kl ? args.ref.kl[r] : 0.0f);
    // Left to right, each block read before it is written: `out` may be `logits`, or a narrower view of it.
    for (int64_t j = 0; j < args.v; j += kBlock) {
      const int count = static_cast<int>(args.v - j < kBlock ? args.v - j : kBlock);
      own.read(r, j, count, &a);
      ref.read(r, j, count, &b);
      for (int i = 0; i < padded(count); i += kLanes) {
        const Vec log_p = load(a.log_p + i), log_q = load(b.log_p + i), p = prob(log_p), q = prob(log_q);
        Vec g = p - q, ref_g = q - p;
        if (kKind == kForward) ref_g = centred(q, log_p - log_q, ref_kl);
        if (kKind == kReverse) g = centred(p, log_q - log_p, own_kl);
        if (kKind == kJsd) {
          const Mixture m = mixture(log_p, log_q, share);
          g = all(1.0f - share) * centred(p, m.from_p, own_kl);
          ref_g = all(share) * centred(q, m.from_q, ref_kl);
        }
        store(a.slope + i, load(a.slope + i) * (grad * g));
        store(b.slope + i, load(b.slope + i) * (grad * ref_g));
      }
      if (to_own) own.write(r, j, count, a.slope);
      if (to_ref) ref.write(r, j, count, b.slope);
    }
  }
}

void values(const Divergence& args, int64_t begin, int64_t end) {
  if (args.kind == kForward) value_rows<kForward>(args, begin, end);
  else if (args.kind == kReverse) value_rows<kReverse>(args, begin, end);
  else value_rows<kJsd>(args, begin, end);
}

void dlogits(const Divergence& args, int64_t begin, int64_t end) {
  if (args.kind == kForward) grad_rows<kForward>(args, begin, end);
  else if (args.kind == kReverse) grad_rows<kReverse>(args, begin, end);
  else grad_rows<kJsd>(args, begin, end);
}

}  // namespace

const DivergenceKernels RLHF_DIVERGENCE_KERNELS = {&values, &dlogits};

}  // namespace rlhf
