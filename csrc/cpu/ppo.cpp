// From scores, values and log-probabilities to whitened advantages and returns, in one call.
//
// * A sequence is shaped, scanned and its moments taken while it sits in the cache; one more pass whitens. The same
//   steps apart read and write the whole batch five times.
// * Sequences are one thread's work and their moments are merged in order: the same bits on any number of threads.
#include "ppo.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/moments.h"
#include "parallel.h"

namespace rlhf {
namespace {

constexpr int64_t kParallelFrom = 1 << 14;  // tokens; below this, starting threads costs more than it saves

template <class Estimate>
void kl_rewards(const PpoArgs& a, int64_t begin, int64_t end, const Estimate& estimate) {
  const uint8_t* mask = a.gae.mask;
  for (int64_t i = begin; i < end; ++i) {
    const bool counts = !mask || mask[i];
    const float kl = counts ? estimate(a.logprob[i] - a.ref_logprob[i]) : 0.0f;
    const float low = kl < -a.kl_clip ? -a.kl_clip : kl, clipped = low > a.kl_clip ? a.kl_clip : low;
    a.kl[i] = kl;
    a.rewards[i] = counts ? -a.kl_coef * clipped : 0.0f;
  }
}

float k3(float d) {
  const double x = std::min(-double(d), 20.0);
  return float(std::expm1(x) - x);
}

void shape(const PpoArgs& a, int64_t b, int64_t begin, int64_t end) {
  if (!a.logprob) {
    std::fill(a.rewards + begin, a.rewards + end, 0.0f);
  } else if (a.kl_estimator == 0) {
    kl_rewards(a, begin, end, [](float d) { return d; });
  } else if (a.kl_estimator == 1) {
    kl_rewards(a, begin, end, [](float d) { return std::fabs(d); });
  } else if (a.kl_estimator == 2) {
    kl_rewards(a, begin, end, [](float d) { return 0.5f * d * d; });
  } else {
    kl_rewards(a, begin, end, k3);
  }
  int64_t last = end - 1;
  while (last >= begin && a.gae.mask && !a.gae.mask[last]) --last;
  if (last < begin) return;  // nowhere to put the score
  const float score = a.scores[b];
  a.rewards[last] += score < -a.score_clip ? -a.score_clip : score > a.score_clip ? a.score_clip : score;
}

}  // namespace

void ppo_advantages(const PpoArgs& a, int threads) {
  const GaeArgs& g = a.gae;
  const auto begin_of = [&](int64_t b) { return g.offsets ? g.offsets[b] : b * g.length; };
  const int64_t n = begin_of(g.batch);
  if (n < kParallelFrom) threads = 1;
  std::vector<Moments> partial(a.whiten ? g.batch : 0);
  parallel_for(g.batch, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = begin_of(b), end = begin_of(b + 1);
      if (a.scores) shape(a, b, begin, end);
      gae_sequences(g, b, b + 1);
      if (a.whiten) partial[b] = moments_of(g.advantages, g.mask, begin, end);
    }
  });
  if (!a.whiten) return;
  Moments total{0.0, 0.0, 0.0};
  for (const Moments& p : partial) total = merge(total, p);
  const double statistics[3] = {total.count, total.mean, total.m2};
  whiten(g.advantages, g.mask, n, statistics, true, 1, a.eps, g.advantages, threads);
}

}  // namespace rlhf
