#include "scans.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../common/affine_scan.h"
#include "../common/moments.h"
#include "groups.h"
#include "parallel.h"
#include "ppo.h"
#include "row_pass.h"

namespace rlhf {
namespace {

constexpr int64_t kBlock = 4096;           // elements whose moments are formed together
constexpr int64_t kParallelFrom = 1 << 14;  // below this, starting threads costs more than it saves

int useful_threads(int64_t elements, int threads) { return elements < kParallelFrom ? 1 : threads; }

int64_t sequence_begin(const GaeArgs& a, int64_t b) { return a.offsets ? a.offsets[b] : b * a.length; }

void write_token(const GaeArgs& a, int64_t i, bool counts, double state) {
  const double reward_to_go = double(a.rewards[i]) + state;
  if (a.returns) a.returns[i] = counts ? float(reward_to_go) : 0.0f;
  if (a.advantages) {
    const double value = a.values ? double(a.values[i]) : 0.0;
    a.advantages[i] = counts ? float(reward_to_go - value) : 0.0f;
  }
}

Affine<double> token_map(const GaeArgs& a, const GaeCoefficients<double>& k, int64_t i, bool counts) {
  return gae_map(k, double(a.rewards[i]), a.values ? double(a.values[i]) : 0.0, counts);
}

// kMasked is a template parameter so that the common unmasked loop carries no loads or selects for it.
template <bool kMasked>
void gae_sequence(const GaeArgs& a, const GaeCoefficients<double>& k, int64_t b) {
  const int64_t begin = sequence_begin(a, b);
  int64_t i = sequence_begin(a, b + 1) - 1;
  double state = a.bootstrap ? k.gamma * double(a.bootstrap[b]) : 0.0;
  if (kMasked) {  // tokens after the last that counts are outside the sequence in either mode
    for (; i >= begin && !a.mask[i]; --i) write_token(a, i, false, 0.0);
  }
  for (; i >= begin; --i) {
    const bool counts = !kMasked || a.mask[i];
    write_token(a, i, counts, state);
    const Affine<double> f = token_map(a, k, i, counts);
    state = f.slope * state + f.offset;
  }
}

}  // namespace

void gae_sequences(const GaeArgs& a, int64_t first, int64_t last) {
  const GaeCoefficients<double> k(a.gamma, a.lam, a.carry);
  for (int64_t b = first; b < last; ++b) a.mask ? gae_sequence<true>(a, k, b) : gae_sequence<false>(a, k, b);
}

void gae(const GaeArgs& a, int threads) {
  const int64_t n = sequence_begin(a, a.batch);
  parallel_for(a.batch, 1, useful_threads(n, threads),
               [&](int64_t first, int64_t last) { gae_sequences(a, first, last); });
}

namespace {

// Token i's sequence, and whether it is the last that counts there (zero mode) or the last of all (carry).
struct Place {
  int64_t sequence;
  bool last;
};

Place place_of(const GaeArgs& a, const std::vector<int64_t>& ends, int64_t i) {
  const int64_t b = a.offsets ? find_sequence(a.offsets, 0, a.batch - 1, i) : i / a.length;
  return {b, i == ends[b] - 1};
}

double start_state(const GaeArgs& a, const GaeCoefficients<double>& k, int64_t b) {
  return a.bootstrap ? k.gamma * double(a.bootstrap[b]) : 0.0;
}

Affine<double> tiled_map(const GaeArgs& a, const GaeCoefficients<double>& k, const std::vector<int64_t>& ends,
                        int64_t i) {
  const bool counts = !a.mask || a.mask[i];
  const Affine<double> f = token_map(a, k, i, counts);
  const Place at = place_of(a, ends, i);
  return at.last ? constant_map(f, start_state(a, k, at.sequence)) : f;
}

}  // namespace

void gae_tiled(const GaeArgs& a, int64_t n, int64_t tile, int64_t lane, const uint8_t* published) {
  const GaeCoefficients<double> k(a.gamma, a.lam, a.carry);
  std::vector<int64_t> ends(a.batch);
  for (int64_t b = 0; b < a.batch; ++b) {
    ends[b] = sequence_begin(a, b + 1);
    if (a.mask && !a.carry) {
      while (ends[b] > sequence_begin(a, b) && !a.mask[ends[b] - 1]) --ends[b];
    }
  }
  const int64_t tiles = (n + tile - 1) / tile;
  std::vector<Affine<double>> aggregate(tiles);
  std::vector<double> prefix(tiles);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t high = n - t * tile, low = std::max<int64_t>(0, high - tile);
    std::vector<Affine<double>> before;  // composition of the tile's runs up to each run
    Affine<double> total = identity_map<double>();
    for (int64_t end = high; end > low; end -= lane) {
      before.push_back(total);
      Affine<double> run = identity_map<double>();
      for (int64_t i = end - 1; i >= std::max(low, end - lane); --i) run = compose(tiled_map(a, k, ends, i), run);
      total = compose(run, total);
    }
    aggregate[t] = total;
    int64_t seen = t - 1;  // nearest earlier tile whose prefix this one may read
    while (seen > 0 && !published[seen]) --seen;
    double state = t == 0 ? 0.0 : prefix[seen];
    for (int64_t u = seen + 1; u < t; ++u) state = apply(aggregate[u], state);
    prefix[t] = apply(total, state);
    for (size_t r = 0; r < before.size(); ++r) {
      double s = apply(before[r], state);
      const int64_t end = high - int64_t(r) * lane;
      for (int64_t i = end - 1; i >= std::max(low, end - lane); --i) {
        const Place at = place_of(a, ends, i);
        const bool counts = !a.mask || a.mask[i];
        write_token(a, i, counts, at.last ? start_state(a, k, at.sequence) : s);
        s = apply(tiled_map(a, k, ends, i), s);
      }
    }
  }
}

namespace {

// The instruction set is the one chosen for the row passes.
const MomentKernels& kernels() {
#ifdef RLHF_X86_KERNELS
  if (!std::strcmp(isa_name(), "avx512")) return kMomentKernelsAvx512;
  if (!std::strcmp(isa_name(), "avx2")) return kMomentKernelsAvx2;
#endif
  return kMomentKernelsPortable;
}

}  // namespace

Moments moments_of(const float* x, const uint8_t* mask, int64_t begin, int64_t end) {
  Moments total{0.0, 0.0, 0.0};
  for (int64_t i = begin; i < end; i += kBlock) total = merge(total, kernels().moments(x, mask, i, std::min(end, i + kBlock)));
  return total;
}

void moments(const float* x, const uint8_t* mask, int64_t n, double* out, int threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<Moments> partial(blocks);
  parallel_for(blocks, 1, useful_threads(n, threads), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      partial[b] = kernels().moments(x, mask, b * kBlock, std::min(n, (b + 1) * kBlock));
    }
  });
  Moments total{0.0, 0.0, 0.0};
  for (const Moments& p : partial) total = merge(total, p);
  out[0] = total.count;
  out[1] = total.mean;
  out[2] = total.m2;
}

void whiten(const float* x, const uint8_t* mask, int64_t n, const double* statistics, bool shift_mean, int ddof,
            double eps, float* out, int threads) {
  const Moments m{statistics[0], statistics[1], statistics[2]};
  const double mean = m.mean, scale = 1.0 / std::sqrt(variance(m, ddof) + eps), shift = shift_mean ? 0.0 : mean;
  parallel_for(n, kBlock, useful_threads(n, threads), [&](int64_t begin, int64_t end) {
    kernels().whiten(x, mask, begin, end, mean, scale, shift, out);
  });
}

void group_stats(const double* values, const int64_t* order, const int64_t* offsets, int64_t groups, double* out,
                 int threads) {
  threads = useful_threads(groups ? offsets[groups] : 0, threads);
  parallel_for(groups, 64, threads, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      const Moments m = group_moments(values, order, offsets[g], offsets[g + 1]);
      out[g] = m.count;
      out[groups + g] = m.mean;
      out[2 * groups + g] = m.m2;
    }
  });
}

}  // namespace rlhf
