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
