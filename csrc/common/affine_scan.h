// The recurrence of generalised advantage estimation, as a scan over affine maps.
//
// * Scanned from the last token to the first. The state that a token hands to the one before it is
//       s_t = gamma V_t + gamma lam A_t,     so that     A_t = r_t + s_{t+1} - V_t,   R_t = r_t + s_{t+1}.
//   Substituting A_t gives one scalar affine map per token:
//       s_t = (gamma lam) s_{t+1} + (gamma lam r_t + gamma (1 - lam) V_t).
//   Maps compose associatively, which is all that a parallel scan needs. With lam = 1 and V = 0 it is the
//   discounted return.
// * The last token of a sequence starts from s = gamma * bootstrap: its map is a constant (slope 0), which is how
//   a packed batch is cut into sequences.
// * A masked token is the identity (carry: the scan runs over the compressed subsequence) or the map of a token
//   whose reward and value are zero (zero). Its reward and value are never used.
//
// Formula: rlhf_fast/reference/value.py, gae.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RLHF_HD __host__ __device__ __forceinline__
#else
#define RLHF_HD inline
#endif

namespace rlhf {

template <typename Real>
struct Affine {
  Real slope;
  Real offset;
};

template <typename Real>
RLHF_HD Affine<Real> identity_map() {
  return {Real(1), Real(0)};
}

// A constant map must not look at its argument: it may be the NaN of the next sequence, and 0 * NaN is NaN.
template <typename Real>
RLHF_HD Real apply(const Affine<Real>& f, Real s) {
#if defined(__CUDA_ARCH__)
  return f.slope == Real(0) ? f.offset : fma(f.slope, s, f.offset);  // one rounding wherever it is inlined
#else
  return f.slope == Real(0) ? f.offset : f.slope * s + f.offset;
#endif
}

// x -> outer(inner(x)). `inner` belongs to the later token, which the scan meets first.
template <typename Real>
RLHF_HD Affine<Real> compose(const Affine<Real>& outer, const Affine<Real>& inner) {
  return {outer.slope * inner.slope, apply(outer, inner.offset)};
}

template <typename Real>
struct GaeCoefficients {
  Real gamma;
  Real decay;         // gamma * lam
  Real value_weight;  // gamma * (1 - lam): exactly 0 for lam = 1
  Real masked_slope;  // 1 for carry, gamma * lam for zero

  RLHF_HD GaeCoefficients(double gamma_, double lam, bool carry)
      : gamma(Real(gamma_)),
        decay(Real(gamma_ * lam)),
        value_weight(Real(gamma_ * (1.0 - lam))),
        masked_slope(carry ? Real(1) : Real(gamma_ * lam)) {}
};

// The map of one token. A masked token's reward and value may be NaN.
template <typename Real>
RLHF_HD Affine<Real> gae_map(const GaeCoefficients<Real>& k, Real reward, Real value, bool counts) {
  return {counts ? k.decay : k.masked_slope, counts ? k.decay * reward + k.value_weight * value : Real(0)};
}

// The same for the last token of a sequence: a constant, whatever comes after it in the packed batch.
template <typename Real>
RLHF_HD Affine<Real> constant_map(const Affine<Real>& f, Real start) {
  return {Real(0), apply(f, start)};
}

// Sequence that holds token i: the largest b in [low, high] with offsets[b] <= i (empty sequences are skipped).
RLHF_HD int64_t find_sequence(const int64_t* offsets, int64_t low, int64_t high, int64_t i) {
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (offsets[middle] <= i) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace rlhf
