// A vector of floats `Vec` of kLanes lanes for whichever instruction set this file is compiled for, the
// loads and stores of f32, bf16 and f16, and exp and tanh.
//
// - Everything lives in an anonymous namespace: no function compiled for AVX-512 can be picked by the
//   linker for a machine that lacks it.
// - + - * / come from the compiler's vector extensions; compiled without contraction, so `fma` is explicit
//   and s_j rounds the same way in both passes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// ---- scalar conversions: tails of rows, and the portable build ----

inline uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float float_of(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

inline float bf16_to_float(uint16_t h) { return float_of(uint32_t{h} << 16); }

inline uint16_t float_to_bf16(float x) {  // to nearest even; NaN stays NaN
  const uint32_t u = bits_of(x);
  if (x != x) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000u | (magnitude << 13));  // inf, NaN
  // Shifted in place, the exponent is off by 112; multiplying by 2^112 mends that, subnormals included.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_f16(float x) {  // to nearest even; NaN stays NaN
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or beyond
  if (magnitude < 0x38800000)  // subnormal: adding 1/2 lines the last bit up with 2^-24, and rounds
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

// ---- the vector: lowest(x, low) keeps a NaN of x, highest(x, m) keeps m when x is NaN ----

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kLanes = 16;
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec at_least(Vec x, Vec low) { return _mm512_max_ps(low, x); }
inline Vec highest(Vec x, Vec m) { return _mm512_max_ps(x, m); }
inline Vec abs_of(Vec x) { return _mm512_abs_ps(x); }
inline Vec with_sign_of(Vec x, Vec sign) {  // x >= 0
  return _mm512_or_ps(x, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}
inline Vec shift_to_exponent(Vec x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23));
}
inline Vec load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_bf16(uint16_t* p, Vec x) {
  const __m512i u = _mm512_castps_si512(x), high = _mm512_srli_epi32(u, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(kept));
}
inline void store_f16(uint16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int kLanes = 8;
inline Vec all(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec at_least(Vec x, Vec low) { return _mm256_max_ps(low, x); }
inline Vec highest(Vec x, Vec m) { return _mm256_max_ps(x, m); }
inline Vec abs_of(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Vec with_sign_of(Vec x, Vec sign) {  // x >= 0
  return _mm256_or_ps(x, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
inline Vec shift_to_exponent(Vec x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
}
inline Vec load_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_bf16(uint16_t* p, Vec x) {
  const __m256i u = _mm256_castps_si256(x), high = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store_f16(uint16_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#else  // SSE2, NEON or whatever the compiler makes of four floats

typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
constexpr int kLanes = 4;
inline Vec all(float x) { return Vec{x, x, x, x}; }
inline Vec load(const float* p) { Vec x; std::memcpy(&x, p, sizeof x); return x; }
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec choose(Bits which, Vec yes, Vec no) {
  return reinterpret_cast<Vec>((which & reinterpret_cast<Bits>(yes)) | (~which & reinterpret_cast<Bits>(no)));
}
inline Vec at_least(Vec x, Vec low) { return choose(reinterpret_cast<Bits>(x < low), low, x); }
inline Vec highest(Vec x, Vec m) { return choose(reinterpret_cast<Bits>(x > m), x, m); }
inline Bits sign_bits(Vec x) { return reinterpret_cast<Bits>(x) & 0x80000000u; }
inline Vec abs_of(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<Bits>(x) & 0x7fffffffu); }
inline Vec with_sign_of(Vec x, Vec sign) {  // x >= 0
  return reinterpret_cast<Vec>(reinterpret_cast<Bits>(x) | sign_bits(sign));
}
inline Vec shift_to_exponent(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<Bits>(x) << 23); }
inline Vec load_bf16(const uint16_t* p) {
  return Vec{bf16_to_float(p[0]), bf16_to_float(p[1]), bf16_to_float(p[2]), bf16_to_float(p[3])};
}
inline Vec load_f16(const uint16_t* p) {
  return Vec{f16_to_float(p[0]), f16_to_float(p[1]), f16_to_float(p[2]), f16_to_float(p[3])};
}
inline void store_bf16(uint16_t* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(x[i]);
}
inline void store_f16(uint16_t* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_f16(x[i]);
}

#endif

// ---- element types ----

struct F32 {
  using Storage = float;
  static Vec load_vec(const float* p) { return load(p); }
  static void store_vec(float* p, Vec x) { store(p, x); }
  static float load_one(const float* p) { return *p; }
  static void store_one(float* p, float x) { *p = x; }
};
struct BF16 {
  using Storage = uint16_t;
  static Vec load_vec(const uint16_t* p) { return load_bf16(p); }
  static void store_vec(uint16_t* p, Vec x) { store_bf16(p, x); }
  static float load_one(const uint16_t* p) { return bf16_to_float(*p); }
  static void store_one(uint16_t* p, float x) { *p = float_to_bf16(x); }
};
struct F16 {
  using Storage = uint16_t;
  static Vec load_vec(const uint16_t* p) { return load_f16(p); }
  static void store_vec(uint16_t* p, Vec x) { store_f16(p, x); }
  static float load_one(const uint16_t* p) { return f16_to_float(*p); }
  static void store_one(uint16_t* p, float x) { *p = float_to_f16(x); }
};

// ---- exp and tanh ----

// exp(d) = 2^n exp(r) with n = round(d log2 e), |r| <= log(2)/2, and exp(r) - 1 = r + r^2 q(r), where q is
// the degree-4 minimax polynomial (relative error of the whole 3e-9, so rounding is all that counts).
// 2^n comes from the low bits of n + kMagic, moved into the exponent field: n = -127 makes it 0, which
// kLowest reaches, so exp(-inf) is exactly 0.
constexpr float kLowest = -88.0f;
constexpr float kMagic = 12582912.0f + 127.0f;

struct Exp {
  Vec power;  // 2^n
  Vec minus_one;  // exp(r) - 1
  Vec beyond;  // exp(r) - 1 - r
};

inline Exp exp_parts(Vec d) {  // kLowest <= d <= 88, or NaN
  const Vec shifted = fma(d, all(0x1.715476p+0f), all(kMagic));
  const Vec n = shifted - all(kMagic);
  const Vec r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), d));
  Vec q = fma(r, all(0x1.6a23d0p-10f), all(0x1.123a20p-7f));
  q = fma(q, r, all(0x1.5558f2p-5f));
  q = fma(q, r, all(0x1.555492p-3f));
  q = fma(q, r, all(0x1.fffffcp-2f));
  return {shift_to_exponent(shifted), fma(q * r, r, r), q * r * r};
}

inline Vec exp_of(Vec d) {
  const Exp e = exp_parts(d);
  return fma(e.power, e.minus_one, e.power);
}

// tanh(u) = -w / (2 + w) with w = expm1(-2|u|): accurate near 0, no overflow.  1 - tanh^2 = 4 (1 + w) / (2 + w)^2
// with 1 + w = exp(-2|u|): accurate where tanh is saturated.
inline Vec tanh_of(Vec u, Vec* slope) {
  const Exp e = exp_parts(at_least(all(-2.0f) * abs_of(u), all(kLowest)));
  const Vec w = fma(e.power, e.minus_one, e.power - all(1.0f));
  const Vec inverse = all(1.0f) / (all(2.0f) + w);
  if (slope) *slope = all(4.0f) * fma(e.power, e.minus_one, e.power) * inverse * inverse;
  return with_sign_of(abs_of(w) * inverse, u);
}

}  // namespace
