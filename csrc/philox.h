// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011), indexed by element, for host and device alike.
// fastlm/ops/philox.py states the contract: element e reads lane e & 3 of block e >> 2 and stays when it is
// >= threshold.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FASTLM_HD __host__ __device__ __forceinline__
#else
#define FASTLM_HD static inline __attribute__((always_inline))
#endif

namespace fastlm {

constexpr uint32_t kWeightStream = 0, kZoneoutStream = 1, kLockedStream = 2, kEmbeddingStream = 3;

struct Philox {
  uint32_t lane[4];
};

FASTLM_HD Philox philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// The four lanes of elements 4 * block .. 4 * block + 3.
FASTLM_HD Philox philox_block(uint64_t seed, uint64_t block, uint32_t stream) {
  return philox4x32(uint32_t(block), uint32_t(block >> 32), stream, 0, uint32_t(seed), uint32_t(seed >> 32));
}

// 64-bit, because p = 1 must drop the lane 2^32 - 1 too.
FASTLM_HD uint64_t philox_threshold(double p) { return uint64_t(p * 4294967296.0); }

FASTLM_HD float philox_scale(double p) { return p < 1.0 ? float(1.0 / (1.0 - p)) : 0.0f; }

}  // namespace fastlm

#if defined(FASTLM_ISA)
#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kDraw = 64;  // elements drawn at a time

typedef uint64_t wide_uvec __attribute__((vector_size(kWidth * 4)));  // a 32-bit word in each, the upper half ignored

FASTLM_INLINE wide_uvec multiply_low_halves(wide_uvec a, wide_uvec b) {
#if defined(__AVX512F__)
  return (wide_uvec)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (wide_uvec)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (wide_uvec)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

// The lanes of elements first .. first + 63; `first` is a multiple of 4. As philox4x32, several blocks abreast.
FASTLM_INLINE void draw_lanes(uint64_t seed, uint64_t first, uint32_t stream, uint32_t* lanes) {
  constexpr int64_t kAbreast = sizeof(wide_uvec) / sizeof(uint64_t);
  for (int64_t i = 0; i < kDraw / 4; i += kAbreast) {
    wide_uvec c0 = wide_uvec{} + (first / 4 + i);
    for (int64_t j = 0; j < kAbreast; ++j) c0[j] += j;
    wide_uvec c1 = c0 >> 32, c2 = wide_uvec{} + stream, c3{};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const wide_uvec p0 = multiply_low_halves(c0, wide_uvec{} + 0xD2511F53);
      const wide_uvec p1 = multiply_low_halves(c2, wide_uvec{} + 0xCD9E8D57);
      c0 = (p1 >> 32) ^ c1 ^ k0;
      c2 = (p0 >> 32) ^ c3 ^ k1;
      c1 = p1;
      c3 = p0;
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    const wide_uvec low = (c0 & 0xFFFFFFFF) | c1 << 32, high = (c2 & 0xFFFFFFFF) | c3 << 32;
#if defined(__AVX512F__)
    const __m512i front{0, 8, 1, 9, 2, 10, 3, 11}, back{4, 12, 5, 13, 6, 14, 7, 15};  // from 8 on: of `high`
    const __m512i blocks[2] = {_mm512_permutex2var_epi64((__m512i)low, front, (__m512i)high),
                               _mm512_permutex2var_epi64((__m512i)low, back, (__m512i)high)};
    std::memcpy(lanes + 4 * i, blocks, sizeof blocks);
#else
    for (int64_t j = 0; j < kAbreast; ++j) {
      const uint64_t block[2] = {low[j], high[j]};
      std::memcpy(lanes + 4 * (i + j), block, sizeof block);
    }
#endif
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA
#endif
