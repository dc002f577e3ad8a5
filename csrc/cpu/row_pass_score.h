// From raw logits to the logits of the softmax, for the row passes of one instruction set: loads of whole and
// partial vectors, bias, scale, softcap, temperature.
//
// Everything lives in an anonymous namespace, as in row_pass_vec.h and for the same reason.
#pragma once

#include <type_traits>

#include "row_pass.h"
#include "row_pass_vec.h"

namespace rlhf {
namespace {

// s_j = softcap tanh((z + bias) pre) inv_temperature, or (z + bias) post without a softcap.
struct Factors {
  float pre, post, slope;  // slope = ds/dx where tanh' = 1

  Factors(double scale, double softcap, double inv_temperature)
      : pre(static_cast<float>(softcap != 0 ? scale / softcap : 1.0)),
        post(static_cast<float>((softcap != 0 ? softcap : scale) * inv_temperature)),
        slope(static_cast<float>(scale * inv_temperature)) {}
};

template <bool kSoftcap>
inline Vec score(Vec x, const Factors& f) {
  if (kSoftcap) x = tanh_of(x * all(f.pre), nullptr);
  return x * all(f.post);
}

template <bool kSoftcap>
inline Vec score_and_slope(Vec x, const Factors& f, Vec* slope) {
  *slope = all(f.slope);
  if (kSoftcap) {
    Vec flattening;
    x = tanh_of(x * all(f.pre), &flattening);
    *slope = *slope * flattening;
  }
  return x * all(f.post);
}

// Up to kLanes elements, the missing ones 0.
template <class In>
inline Vec load_some(const typename In::Storage* p, int count) {
  float lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = In::load_one(p + i);
  return load(lanes);
}

template <class Out>
inline void store_some(typename Out::Storage* p, Vec x, int count) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < count; ++i) Out::store_one(p + i, lanes[i]);
}

template <class In, bool kBias>
inline Vec load_logits(const typename In::Storage* z, const float* bias, int64_t j) {
  const Vec x = In::load_vec(z + j);
  return kBias ? x + load(bias + j) : x;
}

template <class In, bool kBias>
inline Vec load_some_logits(const typename In::Storage* z, const float* bias, int64_t j, int count) {
  const Vec x = load_some<In>(z + j, count);
  return kBias ? x + load_some<F32>(bias + j, count) : x;
}

inline double sum_lanes(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

inline float first_lane(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  return lanes[0];
}

// ---- from run-time arguments to template arguments ----

template <class Body>
inline void with_flag(bool flag, const Body& body) {
  if (flag) body(std::true_type{});
  else body(std::false_type{});
}

template <class Body>
inline void with_dtype(int dtype, const Body& body) {
  if (dtype == kF32) body(F32{});
  else if (dtype == kBF16) body(BF16{});
  else body(F16{});
}

}  // namespace
}  // namespace rlhf
