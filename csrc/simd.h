// The vector of the CPU kernels: fp32 lanes as wide as the instruction set, loads and stores of every element
// type, and exp, tanh, sigmoid, log. All of it has internal linkage in the namespace of the set: a shared
// inline function would let the linker hand a wider set's code to a machine without it.
#pragma once
#include <cstdint>
#include <cstring>

#include "dtype.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define FASTLM_INLINE static inline __attribute__((always_inline))

// Sanitizers do not see what a masked or a streaming instruction reads and writes: their builds do without.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FASTLM_PLAIN_MEMORY
#endif

namespace fastlm::FASTLM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;
#elif defined(__AVX2__)
constexpr int64_t kWidth = 8;
#else
constexpr int64_t kWidth = 4;
#endif

typedef float vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t ivec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t uvec __attribute__((vector_size(kWidth * 4)));
typedef uint16_t hvec __attribute__((vector_size(kWidth * 2)));

FASTLM_INLINE vec splat(float x) { return x - vec{}; }  // x - 0 keeps the sign of -0, 0 + x does not
FASTLM_INLINE ivec isplat(int32_t x) { return x - ivec{}; }

// The 32 bits at p in every lane, whatever they mean: splat would make another NaN of a NaN's bits.
FASTLM_INLINE vec broadcast(const float* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return (vec)isplat(bits);
}

FASTLM_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLM_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

FASTLM_INLINE ivec lane_index() {
  ivec index;
  for (int i = 0; i < kWidth; ++i) index[i] = i;
  return index;
}

FASTLM_INLINE vec select(ivec mask, vec yes, vec no) { return mask ? yes : no; }

// Whether any lane of a mask is set.
FASTLM_INLINE bool any(ivec mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < kWidth; ++i) all |= mask[i];
  return all != 0;
#endif
}

// b where either is NaN. The compiler makes two instructions of the comparison, hence the intrinsics.
#if defined(__AVX512F__)
FASTLM_INLINE vec max(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
FASTLM_INLINE vec min(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
FASTLM_INLINE vec max(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
FASTLM_INLINE vec min(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
FASTLM_INLINE vec max(vec a, vec b) { return select(a > b, a, b); }
FASTLM_INLINE vec min(vec a, vec b) { return select(a < b, a, b); }
#endif

// ---- float16 of one element, for sets without conversion instructions
FASTLM_INLINE float to_float(float x) { return x; }

FASTLM_INLINE float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

FASTLM_INLINE float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
  uint32_t bits;
  if (rest >= 0x7C00) {
    bits = 0x7F800000 | (rest & 0x3FF) << 13;
  } else if (rest >= 0x400) {
    bits = (rest << 13) + 0x38000000;
  } else {  // subnormal: its value is rest * 2^-24 exactly
    const float y = float(rest) * 0x1p-24f;
    std::memcpy(&bits, &y, 4);
  }
  bits |= sign;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

template <typename T>
FASTLM_INLINE T from_float(float x);

template <>
float from_float<float>(float x) {
  return x;
}

template <>
bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}

template <>
f16 from_float<f16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  const uint32_t rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000) return {uint16_t(sign | 0x7E00)};
  if (rest >= 0x477FF000) return {uint16_t(sign | 0x7C00)};  // rounds to 65536 or more
  if (rest < 0x38800000) {                                   // subnormal: the addition rounds to a multiple of 2^-24
    float y;
    std::memcpy(&y, &rest, 4);
    y += 0.5f;
    uint32_t half;
    std::memcpy(&half, &y, 4);
    return {uint16_t(sign | (half - 0x3F000000))};
  }
  return {uint16_t(sign | (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13)};
}

// ---- vectors: load(p), load(p, n) with zeros beyond n, store(p, v), store(p, v, n)
FASTLM_INLINE vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FASTLM_INLINE void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

FASTLM_INLINE vec load(const bf16* p) {
  hvec h;
  std::memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, uvec) << 16);
}

FASTLM_INLINE void store(bf16* p, vec v) {
  const uvec bits = (uvec)v;
  const uvec rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const uvec nan = bits >> 16 | 0x40;
  const hvec h = __builtin_convertvector((uvec)(v != v ? (ivec)nan : (ivec)rounded), hvec);
  std::memcpy(p, &h, sizeof h);
}

FASTLM_INLINE vec load(const f16* p) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

FASTLM_INLINE void store(f16* p, vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<f16>(v[i]);
#endif
}

// The first n elements, fewer than a vector.
#if defined(__AVX512F__) && !defined(FASTLM_PLAIN_MEMORY)
FASTLM_INLINE uint32_t first_lanes(int64_t n) { return (1u << n) - 1; }

FASTLM_INLINE vec load_part(const float* p, int64_t n) { return (vec)_mm512_maskz_loadu_ps(first_lanes(n), p); }

FASTLM_INLINE vec load_part(const bf16* p, int64_t n) {
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16);
}

FASTLM_INLINE vec load_part(const f16* p, int64_t n) {
  return (vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}

FASTLM_INLINE void store_part(float* p, vec v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v); }

template <typename T>
FASTLM_INLINE void store_part(T* p, vec v, int64_t n) {
  T tile[kWidth];
  store(tile, v);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm256_loadu_si256((const __m256i*)tile));
}
#else
template <typename T>
FASTLM_INLINE vec load_part(const T* p, int64_t n) {
  T tile[kWidth] = {};
  std::memcpy(tile, p, n * sizeof(T));
  return load(tile);
}

template <typename T>
FASTLM_INLINE void store_part(T* p, vec v, int64_t n) {
  T tile[kWidth];
  store(tile, v);
  std::memcpy(p, tile, n * sizeof(T));
}
#endif

template <typename T>
FASTLM_INLINE vec load(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : load_part(p, n);
}

template <typename T>
FASTLM_INLINE void store(T* p, vec v, int64_t n) {
  if (n >= kWidth) return store(p, v);
  store_part(p, v, n);
}

// ---- past the caches: a line asked for early into the second-level cache, and stores that do not read what they
// overwrite. A stream store wants the alignment of a whole vector; stream_fence() before another thread reads.
template <typename T>
FASTLM_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

#if defined(FASTLM_PLAIN_MEMORY)
FASTLM_INLINE void stream(float* p, vec v) { store(p, v); }
#elif defined(__AVX512F__)
FASTLM_INLINE void stream(float* p, vec v) { _mm512_stream_ps(p, (__m512)v); }
#elif defined(__AVX2__)
FASTLM_INLINE void stream(float* p, vec v) { _mm256_stream_ps(p, (__m256)v); }
#elif defined(__SSE2__)
FASTLM_INLINE void stream(float* p, vec v) { _mm_stream_ps(p, (__m128)v); }
#else
FASTLM_INLINE void stream(float* p, vec v) { store(p, v); }
#endif

template <typename T>
FASTLM_INLINE void stream(T* p, vec v) {
#if defined(__AVX512F__) && !defined(FASTLM_PLAIN_MEMORY)
  T tile[kWidth];
  store(tile, v);
  _mm256_stream_si256((__m256i*)p, _mm256_loadu_si256((const __m256i*)tile));
#else
  store(p, v);
#endif
}

FASTLM_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Calls body(j, n) for j = 0, kWidth, ... below `count`, with n the elements from j on, kWidth at most: a constant but
// in the last call, so that load(p, n) and store(p, v, n) cost nothing before.
template <typename Body>
FASTLM_INLINE void for_each_vector(int64_t count, Body body) {
  int64_t j = 0;
  for (; j + kWidth <= count; j += kWidth) body(j, kWidth);
  if (j < count) body(j, count - j);
}

FASTLM_INLINE float sum(vec v) {
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  return v[0];
}

FASTLM_INLINE float max(vec v) {
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) v[i] = v[i] > v[i + step] ? v[i] : v[i + step];
  return v[0];
}

// ---- elementary functions
// 2^k for an integral float k in [-126, 127], built in the exponent field.
FASTLM_INLINE vec power_of_two(vec k) { return (vec)((__builtin_convertvector(k, ivec) + 127) << 23); }

FASTLM_INLINE vec round_to_integer(vec x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

// p 2^k for an integral k in [-150, 129].
FASTLM_INLINE vec scale_by_power_of_two(vec p, vec k) {
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)k);
#else
  const vec half = round_to_integer(k * 0.5f);  // two factors: 2^k itself may be subnormal or infinite
  return p * power_of_two(half) * power_of_two(k - half);
#endif
}

// e^x: x = k ln 2 + r with |r| <= ln 2 / 2, a degree-6 polynomial in r, error below 2 ulp; 0 and infinity at
// the ends, NaN stays.
FASTLM_INLINE vec exp(vec x) {
  const vec clamped = min(splat(89.0f), max(splat(-104.0f), x));  // in this order NaN stays
  const vec k = round_to_integer(clamped * 0x1.715476p0f);
  const vec r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  vec p = splat(0x1.6a2352p-10f);  // minimax relative error 3e-9 on that interval
  p = p * r + 0x1.123a6cp-7f;
  p = p * r + 0x1.5558f4p-5f;
  p = p * r + 0x1.555490p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return scale_by_power_of_two(p, k);
}

FASTLM_INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

// tanh x = (e^2x - 1) / (e^2x + 1), error below 2.5 ulp. The numerator has no cancellation at any x: with 2x = k ln 2 +
// r it is 2^k (e^r - 1) + (2^k - 1), and the polynomial gives e^r - 1 with relative error 1.4e-8 for |r| <= ln 2 / 2.
FASTLM_INLINE vec tanh(vec x) {
  const vec clamped = min(splat(20.0f), max(splat(-20.0f), x + x));  // tanh 10 rounds to 1; in this order NaN stays
  const vec shifted = clamped * 0x1.715476p0f + 0x1.8p23f;           // k in its last bits
  const vec r = clamped - (shifted - 0x1.8p23f) * 0x1.62e430p-1f;
  vec p = splat(0x1.6bebcep-10f);
  p = p * r + 0x1.1228e6p-7f;
  p = p * r + 0x1.555676p-5f;
  p = p * r + 0x1.5554aep-3f;
  p = p * r + 0x1.fffffep-2f;
  p = p * (r * r) + r;
  const vec power = (vec)(((ivec)shifted << 23) + 0x3F800000);  // 2^k
  const vec numerator = p * power + (power - 1.0f);
  return numerator / (numerator + 2.0f);
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA
