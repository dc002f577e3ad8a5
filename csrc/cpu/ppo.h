// Shaped rewards, GAE and whitening of a packed batch in one call. Formulas: rlhf_fast/reference/value.py.
#pragma once

#include "../common/moments.h"
#include "scans.h"

namespace rlhf {

struct PpoArgs {
  GaeArgs gae;          // gae.rewards = rewards where `scores` is given; gae.advantages is never null
  const float* scores;  // (batch) or null: gae.rewards are the rewards
  const float* logprob;  // (n) or null, with ref_logprob: no KL term
  const float* ref_logprob;
  float kl_coef, kl_clip, score_clip;  // clips: infinity for none
  int kl_estimator;                    // 0 k1, 1 abs, 2 k2, 3 k3
  float* rewards;                      // (n), written where `scores` is given
  float* kl;                           // (n), written where `logprob` is given
  bool whiten;
  double eps;
};

void ppo_advantages(const PpoArgs& args, int threads);

// Parts of scans.cpp: sequences [first, last) of `gae`; moments of elements [begin, end).
void gae_sequences(const GaeArgs& args, int64_t first, int64_t last);
Moments moments_of(const float* x, const uint8_t* mask, int64_t begin, int64_t end);

}  // namespace rlhf
