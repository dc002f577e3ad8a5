// Advantages of groups of answers to one prompt, on the CPU: A = (r - b) / (s + eps).
//
// - Two-pass statistics, measured from a member of the group: equal rewards deviate by exactly 0.
// - A reward that is not finite leaves its group.
//
// Formula: rlhf_fast/reference/advantages.py, group_advantages.
#pragma once

#include <cstdint>

#include "../common/moments.h"

namespace rlhf {

enum Baseline : int { kNoBaseline, kGiven, kMean, kLeaveOneOut, kWeighted, kBatch };  // as in _backend_scans.py
enum Scale : int { kNoScale, kGroup, kWholeBatch, kCentered, kGroupMean };

template <class Real>
struct Groups {
  int64_t rows;
  const double* rewards;
  const int64_t* order;  // (rows) rows listed by group; null: they lie so
  const int64_t* ids;    // (rows) the group of each listed row; null: groups of `size`
  int64_t size;
  const double* given;  // (rows): kGiven's baseline, kWeighted's weights
  int baseline, scale, ddof;
  double eps;
  bool drop_equal;  // rows of groups without a spread are not valid
  Real *advantages, *mean, *std;
  int64_t* count;
  bool *equal, *valid;
  int64_t* invalid;  // (1)
};

template <class Real>
void group_advantages(const Groups<Real>& args, int threads);

// Moments of the finite values of rows [begin, end) of that list.
Moments group_moments(const double* values, const int64_t* order, int64_t begin, int64_t end);

}  // namespace rlhf
