// What the forward and the backward of the persistent LSTM share: the masked weights as fragments of the matrix unit,
// loaded once, and the product with columns that other blocks exchange at every step.
//
// The exchange lies in fragments, [step][portion of the batch][tile of 16 numbers][8 rows of the batch][lane][words]: a
// warp fetches one in a piece, into the registers where the product wants it. Lane (g, q) has numbers 4 q to 4 q + 3 of
// the tile for row g. Each word is a pair of halves; split ones are followed by what rounding left of them.
#pragma once
#include "common.cuh"
#include "lstm_plan.h"
#include "philox.h"
#include "ptx.h"

namespace fastlm::lstm {

#define FASTLM_DEVICE __device__ __forceinline__

constexpr uint32_t kAbsent = 0xFFFFFFFF;  // a word that has not arrived; pair_of makes it of nothing

using ptx::thread;

// Split numbers go by powers of two, or their low halves would be subnormal: weights below 255, h and h0 below 4,094.
constexpr float weight_up(bool split) { return split ? 256.0f : 1.0f; }
constexpr float state_up(bool split) { return split ? 16.0f : 1.0f; }

FASTLM_DEVICE float load(const void* p, int64_t n, DType dtype) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[n];
  if (dtype == DType::bf16) return to_float(static_cast<const __nv_bfloat16*>(p)[n]);
  return to_float(static_cast<const __half*>(p)[n]);
}

FASTLM_DEVICE void store(void* p, int64_t n, DType dtype, float x) {
  if (dtype == DType::f32) {
    static_cast<float*>(p)[n] = x;
  } else if (dtype == DType::bf16) {
    const __nv_bfloat16 rounded = __float2bfloat16_rn(x);
    static_cast<__nv_bfloat16*>(p)[n] = rounded;
  } else {
    const __half rounded = __float2half_rn(x);
    static_cast<__half*>(p)[n] = rounded;
  }
}

FASTLM_DEVICE float sigmoid(float x) { return ptx::reciprocal(1.0f + ptx::exp2(-1.4426950408889634f * x)); }
FASTLM_DEVICE float tanh_of(float x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// Two halves in a word, and in `left` what the rounding took.
FASTLM_DEVICE uint32_t pair_of(float a, float b, float2& left) {
  const __half2 pair = __floats2half2_rn(a, b);
  const float2 back = __half22float2(pair);
  left = {a - back.x, b - back.y};
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word == kAbsent ? 0x7FFF7FFF : word;
}

// The words of a lane in one fragment of the exchange.
template <bool SPLIT>
struct Words;

template <>
struct Words<false> {
  uint32_t high[2];
  FASTLM_DEVICE bool absent() const { return high[0] == kAbsent || high[1] == kAbsent; }
  template <bool POLL>
  FASTLM_DEVICE void fetch(const uint32_t* p) {
    const auto* from = reinterpret_cast<const uint2*>(p);
    const uint2 x = POLL ? ptx::load_relaxed_x2(from) : ptx::load_l2(from);
    high[0] = x.x, high[1] = x.y;
  }
  FASTLM_DEVICE void read(const uint32_t* p) {
    const uint2 x = *reinterpret_cast<const uint2*>(p);
    high[0] = x.x, high[1] = x.y;
  }
  FASTLM_DEVICE void fill(uint32_t x) { high[0] = high[1] = x; }
};

template <>
struct Words<true> {
  uint32_t high[2], low[2];
  FASTLM_DEVICE bool absent() const {
    return high[0] == kAbsent || high[1] == kAbsent || low[0] == kAbsent || low[1] == kAbsent;
  }
  template <bool POLL>
  FASTLM_DEVICE void fetch(const uint32_t* p) {
    const auto* from = reinterpret_cast<const uint4*>(p);
    const uint4 x = POLL ? ptx::load_relaxed_x4(from) : ptx::load_l2(from);
    high[0] = x.x, high[1] = x.y, low[0] = x.z, low[1] = x.w;
  }
  FASTLM_DEVICE void fill(uint32_t x) { high[0] = high[1] = low[0] = low[1] = x; }
};

constexpr int words_of(bool split) { return split ? 4 : 2; }

// The four weights from 4 * quad on.
FASTLM_DEVICE float4 load_quad(const void* weight, int64_t quad, DType dtype) {
  if (dtype == DType::f32 && (reinterpret_cast<uintptr_t>(weight) & 15) == 0)
    return static_cast<const float4*>(weight)[quad];
  return {load(weight, 4 * quad, dtype), load(weight, 4 * quad + 1, dtype), load(weight, 4 * quad + 2, dtype),
          load(weight, 4 * quad + 3, dtype)};
}

// A run of neighbouring weights: the first of them, and how many there are of LENGTH; those missing are zero.
struct Run {
  int64_t first;
  int count;
};

struct Masked {
  const void* weight;
  DType dtype;
  const int64_t* seed;  // null: nothing is dropped
  double p;
};

template <int MT, int NT>
FASTLM_DEVICE void clear(float (&sums)[MT][NT][4]) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int r = 0; r < 4; ++r) sums[m][n][r] = 0.0f;
}

// The fragments of `count` column tiles from `from` on, with POLL until all words have come, else they are there; rows
// from `rows` on are not fetched. see(words) sees each fragment.
template <bool POLL, bool SPLIT, int WAVE, int NT, typename See>
FASTLM_DEVICE void fetch(Words<SPLIT> (&columns)[WAVE][NT], const uint32_t* from, int count, int rows, See see) {
  const int lane = thread() % 32;
#pragma unroll
  for (int k = 0; k < WAVE; ++k)
#pragma unroll
    for (int n = 0; n < NT; ++n) columns[k][n].fill(k < count && n * 8 + lane / 4 < rows ? kAbsent : 0);
  bool waiting;
  ptx::Patience patience;
  do {
    waiting = false;
#pragma unroll
    for (int k = 0; k < WAVE; ++k)
#pragma unroll
      for (int n = 0; n < NT; ++n)
        if (columns[k][n].absent())
          columns[k][n].template fetch<POLL>(from + ((k * NT + n) * 32 + lane) * words_of(SPLIT));
#pragma unroll
    for (int k = 0; k < WAVE; ++k)
#pragma unroll
      for (int n = 0; n < NT; ++n) waiting |= columns[k][n].absent();
  } while (POLL && ptx::any(waiting && !patience.ended("words of other blocks")));
#pragma unroll
  for (int k = 0; k < WAVE; ++k)
#pragma unroll
    for (int n = 0; n < NT; ++n) see(columns[k][n]);
}

// Two words that belong to one unit, for others, who poll them if POLL.
template <bool POLL>
FASTLM_DEVICE void publish_pair(uint32_t* to, uint2 words) {
  uint2* pair = reinterpret_cast<uint2*>(to);
  if constexpr (POLL) {
    ptx::store_relaxed(pair, words);
  } else {
    pair->x = words.x;
    pair->y = words.y;
  }
}

// One word for others, who poll it if POLL.
template <bool POLL>
FASTLM_DEVICE void publish_word(uint32_t* to, uint32_t word) {
  if constexpr (POLL) {
    ptx::store_relaxed(to, word);
  } else {
    *to = word;
  }
}

// The 16 x 16 tiles of a warp, `kept` in registers, the others in shared memory.
template <bool SPLIT, int MT, int KEPT>
struct Weights {
  static constexpr int kKept = KEPT;
  uint32_t kept[MT][KEPT][4];
  uint4* tail;  // [slot][thread]
  int depth;

  FASTLM_DEVICE Weights(unsigned char* shared, int tiles) : tail(reinterpret_cast<uint4*>(shared)), depth(tiles) {}

  FASTLM_DEVICE uint4* slot(int k, int m) const { return tail + ((k - KEPT) * MT + m) * kThreads + thread(); }
  FASTLM_DEVICE uint4* low_slot(int k, int m) const {
    const int beyond = depth > KEPT ? depth - KEPT : 0;
    return tail + ((beyond + k) * MT + m) * kThreads + thread();
  }

  // By way of shared memory, column tile k of every warp at a time, so that a draw of the generator serves four
  // weights. run(i, k) is run i of RUNS, each of LENGTH weights, and place(i, j) where its weight j belongs: row,
  // column. The memory must hold load_bytes; what is kept goes to the registers last and at once, or they would be
  // alive twice.
  template <int RUNS, int LENGTH, typename Get, typename Place>
  FASTLM_DEVICE void load(const Masked& from, Get run, Place place) {
    constexpr Tiling TILING{SPLIT, MT, KEPT, KEPT, 1};
    constexpr int PLANE = 16 * MT * kStagePitch;
    const int64_t slots = larger(tail_bytes(TILING, depth), kept_bytes(TILING, depth));
    __half* stage = reinterpret_cast<__half*>(reinterpret_cast<unsigned char*>(tail) + slots);
#pragma unroll 1
    for (int k = 0; k < min(KEPT, depth); ++k) {
      load_tile<RUNS, LENGTH>(stage, from, run, place, k);
#pragma unroll
      for (int m = 0; m < MT; ++m) tail[(k * MT + m) * kThreads + thread()] = read_tile(stage, m);
    }
#pragma unroll
    for (int k = 0; k < KEPT; ++k)
#pragma unroll
      for (int m = 0; m < MT; ++m) unpack(k < depth ? tail[(k * MT + m) * kThreads + thread()] : uint4{}, kept[m][k]);
#pragma unroll 1
    for (int k = SPLIT ? 0 : KEPT; k < depth; ++k) {
      load_tile<RUNS, LENGTH>(stage, from, run, place, k);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        if (k >= KEPT) *slot(k, m) = read_tile(stage, m);
        if constexpr (SPLIT) *low_slot(k, m) = read_tile(stage + PLANE, m);
      }
    }
    ptx::sync_block();
  }

  template <int RUNS, int LENGTH, typename Get, typename Place>
  FASTLM_DEVICE static void load_tile(__half* stage, const Masked& from, Get run, Place place, int k) {
    constexpr int QUADS = LENGTH / 4 + 1, PLANE = 16 * MT * kStagePitch;
    const uint64_t threshold = philox_threshold(from.p), key = from.seed == nullptr ? 0 : uint64_t(*from.seed);
    const float scale = from.seed == nullptr ? 1.0f : philox_scale(from.p);
    ptx::sync_block();
#pragma unroll 1
    for (int item = thread(); item < RUNS * QUADS; item += kThreads) {
      const int i = item / QUADS;
      const Run r = run(i, k);
      const int64_t quad = (r.first >> 2) + item % QUADS;
      const int begin = int(4 * quad - r.first);
      float4 w{};
      if (max(begin, 0) < r.count) {
        w = load_quad(from.weight, quad, from.dtype);
        if (from.seed != nullptr) {
          const Philox x = philox_block(key, uint64_t(quad), kWeightStream);
          w.x = x.lane[0] >= threshold ? w.x * scale : 0.0f;
          w.y = x.lane[1] >= threshold ? w.y * scale : 0.0f;
          w.z = x.lane[2] >= threshold ? w.z * scale : 0.0f;
          w.w = x.lane[3] >= threshold ? w.w * scale : 0.0f;
        }
      }
      const float values[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = begin + e;
        if (j < 0 || j >= LENGTH) continue;
        const float value = j < r.count ? values[e] * weight_up(SPLIT) : 0.0f;
        const __half high = __float2half_rn(value);
        stage[place(i, j)] = high;
        if constexpr (SPLIT) {
          const __half low = __float2half_rn(value - __half2float(high));
          stage[PLANE + place(i, j)] = low;
        }
      }
    }
    ptx::sync_block();
  }

  // As the matrix unit wants it: rows g and g + 8, of each the first and the second pair of the lane's four columns.
  FASTLM_DEVICE static uint4 read_tile(const __half* stage, int m) {
    const int lane = thread() % 32, column = thread() / 32 * 16 + lane % 4 * 4;
    const __half* from = stage + (16 * m + lane / 4) * kStagePitch + column;
    const uint2 upper = *reinterpret_cast<const uint2*>(from);
    const uint2 lower = *reinterpret_cast<const uint2*>(from + 8 * kStagePitch);
    return {upper.x, lower.x, upper.y, lower.y};
  }

  // sums += column tile k of the warp times `columns`; of the kept ones if KEPT_ONE, and then k is known when compiled.
  template <bool KEPT_ONE, int NT>
  FASTLM_DEVICE void multiply(float (&sums)[MT][NT][4], const Words<SPLIT> (&columns)[NT], int k) const {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      uint32_t a[4];
      if constexpr (KEPT_ONE) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[r] = kept[m][k][r];
      } else {
        unpack(*slot(k, m), a);
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        ptx::mma_f16(sums[m][n], a, columns[n].high[0], columns[n].high[1]);
        if constexpr (SPLIT) ptx::mma_f16(sums[m][n], a, columns[n].low[0], columns[n].low[1]);
      }
      if constexpr (SPLIT) {
        unpack(*low_slot(k, m), a);
#pragma unroll
        for (int n = 0; n < NT; ++n) ptx::mma_f16(sums[m][n], a, columns[n].high[0], columns[n].high[1]);
      }
    }
  }

  FASTLM_DEVICE static void unpack(const uint4& x, uint32_t (&a)[4]) { a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w; }

  // sums = the column tiles of the warp times the `count` of them that the exchange has; see(words) sees each fragment.
  template <int WAVE, bool POLL, int NT, typename See>
  FASTLM_DEVICE void multiply_exchanged(float (&sums)[MT][NT][4], const uint32_t* from, int count, int rows,
                                        See see) const {
    Words<SPLIT> columns[WAVE][NT];
    fetch<POLL>(columns, from, count, rows, see);
    clear(sums);  // not before: these registers are not there while the words come in
#pragma unroll
    for (int k = 0; k < KEPT; ++k)
      if (k < count) multiply<true>(sums, columns[k], k);
#pragma unroll
    for (int k = KEPT; k < WAVE; ++k)
      if (k < count) multiply<false>(sums, columns[k], k);
#pragma unroll 1
    for (int first = WAVE; first < count; first += WAVE) {
      fetch<POLL>(columns, from + first * NT * 32 * words_of(SPLIT), count - first, rows, see);
#pragma unroll
      for (int k = 0; k < WAVE; ++k)
        if (first + k < count) multiply<false>(sums, columns[k], first + k);
    }
  }
};

// The sums of a warp to shared memory, [warp][row of the batch][pitch].
template <int MT, int NT>
FASTLM_DEVICE void store_sums(const float (&sums)[MT][NT][4], float* to) {
  constexpr int PITCH = 16 * MT + 4;
  const int lane = thread() % 32, warp = thread() / 32, g = lane / 4, q = lane % 4;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        to[(warp * 8 * NT + n * 8 + 2 * q + (r & 1)) * PITCH + 16 * m + g + (r >> 1) * 8] = sums[m][n][r];
}

// The largest of `count` numbers, none of them negative, as soon as other blocks have written the bits of each.
FASTLM_DEVICE float largest_of(const uint32_t* words, int count) {
  uint32_t largest = 0;
  for (int i = thread() % 32; i < count; i += 32) {
    uint32_t word;
    ptx::Patience patience;
    do {
      word = ptx::load_relaxed(words + i);
    } while (word == kAbsent && !patience.ended("the largest dc"));
    largest = max(largest, word);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) largest = max(largest, ptx::shuffle_xor(largest, lanes));
  return __uint_as_float(largest);
}

// Until flags first to last of `flags` have reached `epoch`, for the whole warp.
FASTLM_DEVICE void wait_for(const uint32_t* flags, int first, int last, uint32_t epoch,
                            ptx::Site site = ptx::Site::current()) {
  for (int i = first + thread() % 32; i <= last; i += 32)
    for (ptx::Patience patience; ptx::load_acquire(flags + i, site) < epoch && !patience.ended("a flag");) {
    }
  ptx::sync_warp(site);
}

}  // namespace fastlm::lstm
