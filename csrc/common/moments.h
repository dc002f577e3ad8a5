// Count, mean and sum of squared deviations of a set, and how two sets merge.
//
// * Deviations are taken from the set's own mean (two passes inside a block, Chan's merge between blocks): never
//   E[x^2] - E[x]^2, which loses everything when the spread is small beside the mean.
// * Equal values give m2 = 0 exactly: fp32 inputs sum without error in a double up to 2^29 terms, and a merge of
//   equal means moves nothing.
//
// Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".
#pragma once

#include "affine_scan.h"

namespace rlhf {

struct Moments {
  double count;
  double mean;
  double m2;
};

RLHF_HD Moments merge(const Moments& a, const Moments& b) {
  if (b.count == 0.0) return a;
  if (a.count == 0.0) return b;
  const double count = a.count + b.count;
  const double delta = b.mean - a.mean;
  return {count, a.mean + delta * (b.count / count), a.m2 + b.m2 + delta * delta * (a.count * (b.count / count))};
}

// m2 / (count - ddof), and 0 when there are too few elements for it.
RLHF_HD double variance(const Moments& m, double ddof) {
  const double freedom = m.count - ddof;
  return freedom > 0.0 ? m.m2 / freedom : 0.0;
}

}  // namespace rlhf
