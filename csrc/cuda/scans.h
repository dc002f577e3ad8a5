// Launchers of the CUDA scans: raw device pointers and a stream (a cudaStream_t). Every function returns a cudaError_t
// as an int. No CUDA header here: the bindings are compiled by the host compiler alone.
#pragma once

#include <cstdint>

namespace rlhf {

struct GaeCudaArgs {
  const float* rewards;
  const float* values;      // null: zeros
  const uint8_t* mask;      // null: every token counts
  const int64_t* offsets;   // (batch + 1), or null: sequences of `length` tokens
  int64_t n;
  int64_t batch;
  int64_t length;
  double gamma;
  double lam;
  bool carry;
  const float* bootstrap;   // (batch), or null: zeros
  const int64_t* ends;      // (batch) one past the last token that counts, or null: the sequence's end
  float* advantages;        // null: not wanted
  float* returns;
  // Rewards shaped from scores and log-probabilities, where `scores` is given: `rewards` is then not read.
  const float* scores;       // (batch)
  const float* logprob;      // (n), with ref_logprob; null: no KL term
  const float* ref_logprob;
  float kl_coef, kl_clip, score_clip;  // clips: infinity for none
  int kl_estimator;                    // 0 k1, 1 abs, 2 k2, 3 k3
  float* shaped;                       // (n), the rewards, written
  float* kl;                           // (n), written where `logprob` is given
  double* statistics;  // (3) count, mean, m2 of the counted advantages, written; null: not wanted
};

const char* error_text(int code);

int64_t gae_workspace_bytes(int64_t n);
int gae(const GaeCudaArgs& args, void* workspace, void* stream);

int64_t moments_workspace_bytes(int64_t n);
int moments(const float* x, const uint8_t* mask, int64_t n, void* workspace, double* out, void* stream);
int whiten(const float* x, const uint8_t* mask, int64_t n, const double* statistics, bool shift_mean, int ddof,
           double eps, float* out, void* stream);
int group_stats(const double* values, const int64_t* order, const int64_t* offsets, int64_t groups, double* out,
                void* stream);

}  // namespace rlhf
