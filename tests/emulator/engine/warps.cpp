// Collectives of a warp: the last lane to come acts for all. They order no memory.
#include <cuda_fp16.h>

#include "machine.h"

namespace fastlm::emulator {
namespace {

template <typename Operand, typename Act>
void collect(const char* what, const Site& site, Operand& mine, Act act) {
  if (!meet_warp(what, site, &mine)) return;
  act([](unsigned lane) -> Operand& { return *static_cast<Operand*>(const_cast<void*>(warp().operands[lane])); });
  wake_others(warp());
}

struct Exchange {
  uint32_t x;
  int from;
  uint32_t result;
};

uint32_t exchange(const char* what, uint32_t x, int from, const Site& site) {
  Exchange mine{x, from & 31, 0};
  collect(what, site, mine, [&](auto lane) {
    const unsigned n = unsigned(warp().lanes.size());
    for (unsigned i = 0; i < n; ++i) {
      if (unsigned(lane(i).from) >= n) misuse("a lane that is not there", what, site);
      lane(i).result = lane(unsigned(lane(i).from)).x;
    }
  });
  return mine.result;
}

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

float from_f16(uint16_t bits) { return __half2float(__half_raw{bits}); }
float from_bf16(uint16_t bits) { return __uint_as_float(unsigned{bits} << 16); }

template <float (*convert)(uint16_t)>
void multiply(const char* what, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, const Site& site) {
  Product mine{d, a, {b0, b1}};
  collect(what, site, mine, [&](auto lane) {
    if (warp().lanes.size() < 32) misuse("a warp that is not whole", what, site);
    float A[16][16], B[16][8], D[16][8] = {};
    for (unsigned l = 0; l < 32; ++l) {
      const unsigned g = l / 4, q = l % 4 * 2;
      for (unsigned r = 0; r < 4; ++r) {
        const uint32_t pair = lane(l).a[r];
        float* to = &A[g + r % 2 * 8][q + r / 2 * 8];
        to[0] = convert(uint16_t(pair));
        to[1] = convert(uint16_t(pair >> 16));
      }
      for (unsigned r = 0; r < 2; ++r) {
        B[q + r * 8][g] = convert(uint16_t(lane(l).b[r]));
        B[q + r * 8 + 1][g] = convert(uint16_t(lane(l).b[r] >> 16));
      }
    }
    for (unsigned i = 0; i < 16; ++i) {
      for (unsigned k = 0; k < 16; ++k) {
        for (unsigned j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
      }
    }
    for (unsigned l = 0; l < 32; ++l) {
      for (unsigned r = 0; r < 4; ++r) lane(l).d[r] += D[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
    }
  });
}

}  // namespace

uint32_t shuffle(uint32_t x, int lane, Site site) { return exchange("shuffle", x, lane, site); }

uint32_t shuffle_xor(uint32_t x, int lane_mask, Site site) {
  return exchange("shuffle_xor", x, int(self().lane) ^ lane_mask, site);
}

bool any(bool x, Site site) {
  Exchange mine{x, 0, 0};
  collect("a vote", site, mine, [](auto lane) {
    uint32_t sum = 0;
    for (unsigned i = 0; i < warp().lanes.size(); ++i) sum |= lane(i).x;
    for (unsigned i = 0; i < warp().lanes.size(); ++i) lane(i).result = sum;
  });
  return mine.result != 0;
}

void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  multiply<from_f16>("mma_f16", d, a, b0, b1, site);
}

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  multiply<from_bf16>("mma_bf16", d, a, b0, b1, site);
}

void ldmatrix(uint32_t* r, unsigned matrices, const void* row, Site site) {
  if (self().lane < 8 * matrices) {
    want_shared(row, "ldmatrix", site);
    want_aligned(row, 16, "ldmatrix", site);
    access(row, 16, Access::padding, site);
  }
  struct Rows {
    uint32_t* r;
    const void* row;
  } mine{r, row};
  collect("ldmatrix", site, mine, [&](auto lane) {
    if (warp().lanes.size() < 32) misuse("a warp that is not whole", "ldmatrix", site);
    for (unsigned l = 0; l < 32; ++l) {
      for (unsigned m = 0; m < matrices; ++m) {
        std::memcpy(lane(l).r + m, static_cast<const unsigned char*>(lane(m * 8 + l / 4).row) + l % 4 * 4, 4);
      }
    }
  });
}

}  // namespace fastlm::emulator
