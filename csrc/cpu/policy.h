// Policy losses with their gradients, on the CPU: one pass over the tokens, or over each sequence while it is in the
// cache, where the ratio is the sequence's.
//
//   r = exp(clamp(logprob - old_logprob, -20, 20)),   A = advantages
//   loss = sum_t w_t (v_t l_t + beta kl_t) - entropy_coef u_t H_t
//   clip: l = max(-min(r, delta) A, -clip(r, low, high) A),   at most -dual_clip A where A < 0;   others: policy_forms.h
//
// - Advantages and weights may stand for a whole sequence: nothing of the size of the batch is formed for them.
// - A token that is masked, or whose weight is 0, is not there, whatever it holds.
// - Sums are formed in blocks of fixed size: the same bits on any number of threads.
//
// Formula: rlhf_fast/reference/policy.py.
#pragma once

#include <cstdint>

namespace rlhf {

enum KlKind : int { kK1 = 0, kAbs = 1, kK2 = 2, kK3 = 3 };
enum PolicyForm : int { kClip, kVanilla, kCispo, kSapo, kKlCov, kDro, kDppoTv, kGeoMean };  // as FORMS in _backend_policy
enum PolicyLevel : int { kToken, kSequence, kSequenceToken };  // whose ratio; the latter two for kClip alone
constexpr int kPolicySums = 12;  // in the order of SUMS in rlhf_fast/ops/_policy_terms.py

// One number per token, per sequence, or one for all.
struct Spread {
  const float* data;
  int64_t count;  // n, segments or 1
};

struct PolicyClip {
  int64_t n;
  int form, level;
  const float* logprob;      // (n,)
  const float* old_logprob;  // (n,) or null: logprob itself
  Spread advantages, weight;
  const uint8_t* mask;         // (n,) or null: every token counts
  const float* policy_weight;  // (n,) or null
  const float* ref_logprob;    // (n,) or null: no KL term
  const float* entropy;        // (n,) or null
  Spread entropy_weight;       // data null: no entropy term
  const int64_t* offsets;      // (segments + 1) or null: sequences of `length`
  int64_t segments, length;
  float low, high;         // what is clipped to: the ratio, kGeoMean: its logarithm; kDppoTv: how far down and up
  float delta, dual_clip;  // infinity: none
  float first, second;     // the form's own numbers
  const float* held;       // (n,), kKlCov: 1 where a token is held
  float beta;
  int kl_estimator, kl_gradient;  // KlKind
  bool kl_correction;
  float entropy_coef;
  float* dlogprob;  // (n,)
  float* dentropy;  // (n,) or null
  float* sums;      // (kPolicySums,)
};

void policy_clip(const PolicyClip& args, int threads);

// Estimates of KL(policy || reference) and their slopes by logprob, token by token; 0 where masked.
struct KlTerms {
  int64_t n;
  const float *logprob, *ref_logprob;  // (n,)
  const uint8_t* mask;                 // (n,) or null
  int estimator, gradient;             // KlKind
  float* value;                        // (n,)
  float* slope;                        // (n,) or null
};

void kl_terms(const KlTerms& args, int threads);

// out (segments,): the counted tokens of each sequence.
void segment_counts(const uint8_t* mask, const int64_t* offsets, int64_t segments, int64_t length, int64_t* out,
                    int threads);

// One compilation of policy_kernel.cpp: tokens [begin, end), or sequences [first, last), their sums into `sums`.
struct PolicyKernels {
  const char* name;
  void (*tokens)(const PolicyClip&, int64_t begin, int64_t end, double* sums);
  void (*sequences)(const PolicyClip&, int64_t first, int64_t last, double* sums);
  void (*kl)(const KlTerms&, int64_t begin, int64_t end);
};
extern const PolicyKernels kPolicyKernelsPortable, kPolicyKernelsAvx2, kPolicyKernelsAvx512;

}  // namespace rlhf
