// The continuous cache over a stream on CUDA: flash attention over a band, with a scalar in the place of the values.
//
// A block keeps the depth of its query rows on the chip, as far as it fits, and walks the keys before them a tile at a
// time, from the nearest outwards: what a row holds when it passes the end of a window is that window's result, so one
// walk serves every window. A warp has 16 or 32 rows of the block's and all keys of a tile. A lane keeps, for its share
// of the scores of a row, their maximum and that of those with the row's own next word, and for every theta two sums:
// exp(theta (score - maximum)) over the other words against the first, over its own word against the second. So one
// exponential serves a pair, and lanes meet only where a window ends.
//
// A row in memory is a sequence of units of 16 numbers, 32 bytes; float32 rows are multiplied as float16, x 2^s = high
// + low, 22 bits of x in two units, and three of the four products. A stage of the copies is two units of each key.
//
// Tiles, for an H200 and the test split of WikiText-2 (245,569 rows, window 3785, D = 400: 9.3e8 pairs, 1.8e8 mma):
// - Level 2 gives D 2 bytes for each pair over the rows of a block: 3.1 GB with 256 rows (0.6 ms at 5.5 TB/s), 6 GB
//   with 128. 256 rows of 16 bits are 200 of the 227 KB, and with 64 keys six stages have 26 KB; the halves of 128 rows
//   are 200 KB too, three stages of 128 keys the other 27, and the keys 12 GB (2.2 ms).
// - A warp of 32 x 64 loads 192 bytes for an mma, of 16 x 128 and three products as many: 0.67 a cycle at the 128 bytes
//   of shared memory, beside the 0.6 of mma.sync. 16 x 64 would have 320.
// - So mma.sync takes 1.3 ms for 16 bits and 4.1 for float32, the scores a quarter and a tenth more, blocks in whole
//   waves another 10 and 3 %: 1.8 and 4.6 ms by this arithmetic, and 0.2 to split the rows of float32.
// Ampere's 163 KB hold 128 rows of 16 bits; what does not fit is copied again for each tile of keys.
#pragma once
#include <type_traits>

#include "common.cuh"
#include "ptx.h"

namespace fastlm {
namespace {

constexpr int kMostThetas = 8, kMostWindows = 8;  // of one walk: 16 sums for every row that a lane has a share of
constexpr int kUnit = 32;                         // bytes of 16 numbers
constexpr int kPad = 256;                         // ids and powers begin and end at a multiple, as every tile does
constexpr int kFar = 1 << 30;                     // beyond it a distance counts as this one
constexpr float kEmpty = -INFINITY;
template <typename T>
constexpr bool kSplit = sizeof(T) == 4;  // into halves

// kWarps of kRowTiles x 16 rows against kKeys keys, with kAhead stages under way while one is multiplied. A ring with
// fewer slots than that is wrong, and here for the tests.
template <int kWarps_, int kRowTiles_, int kKeys_, int kAhead_, int kSlots_ = kAhead_ + 1>
struct Tile {
  static constexpr int kWarps = kWarps_, kRowTiles = kRowTiles_, kKeys = kKeys_, kAhead = kAhead_, kSlots = kSlots_;
  static constexpr int kThreads = 32 * kWarps, kWarpRows = 16 * kRowTiles, kRows = kWarps * kWarpRows;
  static constexpr int kLaneRows = 2 * kRowTiles, kKeyTiles = kKeys / 8;
  // A slot of the ring: two units of each key, and in the last stage of a tile the ids and powers of the keys; then two
  // units of each query row, where not all are kept.
  static constexpr int kIds = 2 * kUnit * kKeys, kPowers = kIds + 4 * kKeys, kQuery = kPowers + 4 * kKeys;
  static constexpr int kSlotWithQuery = kQuery + 2 * kUnit * kRows;
  static_assert(kKeys % 16 == 0 && kRows % kKeys == 0 && kPad % kRows == 0);
};
using Tall = Tile<8, 2, 64, 5>;     // 16 bits, up to D = 400 of an H200, one theta
using Square = Tile<8, 1, 128, 2>;  // all else

struct CacheArgs {
  const unsigned char* packed;  // the rows of memory and call, `pitch` bytes each
  int64_t pitch, past, rows;    // past: rows of the memory
  int32_t bytes, units, kept;   // of a row; the last unit may lack some; units of a query row that stay on the chip
  const int32_t* ids;           // these three from the first row of the call on
  const float* powers;          // of two, that take a row of halves to its numbers
  const int64_t* start;         // may be null
  float *log_mass, *log_norm;
  int64_t stride;                                 // of the windows in the results
  int32_t thetas, windows, window[kMostWindows];  // ascending
  float theta[kMostThetas], factor[kMostThetas];  // factor: theta log2(e), see factor_of
};

// Where 16 bytes of a row stand in a unit of rows: the eight rows of an 8 x 8 matrix meet 32 different banks.
FASTLM_PTX int place(int row, int half) { return row * kUnit + ((half ^ (row >> 2 & 1)) << 4); }

FASTLM_PTX int near(int64_t distance) { return int(distance < -kFar ? -kFar : distance > kFar ? kFar : distance); }

FASTLM_PTX int least(int x) {
  for (int lanes = 1; lanes < 32; lanes *= 2) x = min(x, int(ptx::shuffle_xor(uint32_t(x), lanes)));
  return x;
}

// How far a maximum was below the new one, and 0 where there was none.
FASTLM_PTX float fallen(float old, float now) { return old == kEmpty ? 0.0f : old - now; }

// theta top + log(total), and -inf for an empty sum; a sum of NaN stays NaN.
FASTLM_PTX float log_sum(float theta, float top, float total) {
  return top == kEmpty && total == 0.0f ? kEmpty : theta * top + logf(total);
}

template <typename T>
FASTLM_PTX void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    ptx::mma_bf16(d, a, b0, b1);
  } else {
    ptx::mma_f16(d, a, b0, b1);
  }
}

// What a lane holds for its rows, of which row r stands 8 r + lane / 4 after the first of the warp.
template <typename T, typename Tile, int kThetas>
struct Walk {
  static constexpr int R = Tile::kLaneRows, M = Tile::kRowTiles, N = Tile::kKeyTiles;
  using Scores = float[M][N][4];

  const CacheArgs& a;
  const int64_t begin = int64_t(blockIdx.x) * Tile::kRows;  // the block's first row, from which all below are counted
  const int count = int(a.rows - begin < Tile::kRows ? a.rows - begin : Tile::kRows), lane = threadIdx.x % 32;
  const int warp_first = ptx::uniform(threadIdx.x / 32) * Tile::kWarpRows;
  const int warp_last = min(warp_first + Tile::kWarpRows, count) - 1;
  int row[R], oldest[R], own_id[R];
  float own_power[R], top[R], best[R], others[R][kThetas], matches[R][kThetas];

  FASTLM_PTX explicit Walk(const CacheArgs& args) : a(args) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      row[r] = warp_first + 8 * r + lane / 4;
      oldest[r] = oldest_of(row[r]);
      own_id[r] = a.ids[begin + row[r]];
      own_power[r] = kSplit<T> && row[r] < count ? a.powers[begin + row[r]] : 0.0f;
      top[r] = best[r] = kEmpty;
      for (int k = 0; k < kThetas; ++k) others[r][k] = matches[r][k] = 0.0f;
    }
  }

  // The first key that a row may see; a row after the last one sees none.
  FASTLM_PTX int oldest_of(int t) const {
    const int first = -near(a.past + begin);
    if (t >= count) return t;
    return a.start == nullptr ? first : min(max(near(a.start[begin + t] - begin), first), t);
  }

  // scores[m][n][2 i + j]: row 2 m + i of the lane's, key 8 n + 2 (lane % 4) + j of the tile.
  FASTLM_PTX void multiply(Scores& scores, const unsigned char* query, const unsigned char* keys, int units) const {
    const unsigned char* const x = query + place(warp_first + lane % 16, lane / 16);
    const unsigned char* const y = keys + place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const unsigned char *const next_x = x + Tile::kRows * kUnit, *const next_y = y + Tile::kKeys * kUnit;
    if constexpr (kSplit<T>) {
      uint32_t high[M][4], low[M][4];
      load<M>(high, x);
      load<M>(low, next_x);
      constexpr int kTogether = N < 4 ? N : 4;  // the three products of a score wait for each other
#pragma unroll
      for (int n = 0; n < N; n += kTogether) {
        uint32_t y_high[kTogether / 2][4], y_low[kTogether / 2][4];
        load<kTogether / 2>(y_high, y + 8 * n * kUnit);
        load<kTogether / 2>(y_low, next_y + 8 * n * kUnit);
        add_products<kTogether>(scores, n, low, y_high);
        add_products<kTogether>(scores, n, high, y_low);
        add_products<kTogether>(scores, n, high, y_high);
      }
    } else if (units == 1) {
      multiply_unit(scores, x, y);
    } else {  // in one piece, so that the second unit is loaded while the first is multiplied
      multiply_unit(scores, x, y);
      multiply_unit(scores, next_x, next_y);
    }
  }

  FASTLM_PTX void multiply_unit(Scores& scores, const unsigned char* x, const unsigned char* y) const {
    uint32_t query[M][4], keys[N / 2][4];
    load<M>(query, x);
    load<N / 2>(keys, y);
    add_products<N>(scores, 0, query, keys);
  }

  template <int kCount>
  FASTLM_PTX static void load(uint32_t (&matrices)[kCount][4], const unsigned char* at) {
    for (int i = 0; i < kCount; ++i) ptx::ldmatrix_x4(matrices[i], at + 16 * i * kUnit);
  }

  // Of kCount columns of scores from n on.
  template <int kCount>
  FASTLM_PTX static void add_products(Scores& scores, int n, const uint32_t (&x)[M][4],
                                      const uint32_t (&y)[kCount / 2][4]) {
    for (int i = 0; i < kCount; ++i)
      for (int m = 0; m < M; ++m) mma<T>(scores[m][n + i], x[m], y[i / 2][i % 2 * 2], y[i / 2][i % 2 * 2 + 1]);
  }

  FASTLM_PTX void scale(Scores& scores, const float* powers) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float2 power = *reinterpret_cast<const float2*>(powers + 8 * n + 2 * (lane % 4));
      for (int r = 0; r < R; ++r) {
        scores[r / 2][n][r % 2 * 2] *= own_power[r] * power.x;
        scores[r / 2][n][r % 2 * 2 + 1] *= own_power[r] * power.y;
      }
    }
  }

  // Takes in those scores of a tile whose key is one of `width` from `first` on; all if not kEdge.
  template <bool kEdge>
  FASTLM_PTX void add(const Scores& scores, const int32_t* ids, const int (&first)[R], const int (&width)[R]) {
    const int key = 2 * (lane % 4);
    const auto each = [&](auto take) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int2 id = *reinterpret_cast<const int2*>(ids + 8 * n + key);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          for (int j = 0; j < 2; ++j) {
            const bool seen = !kEdge || unsigned(key + 8 * n + j - first[r]) < unsigned(width[r]);
            take(r, seen ? scores[r / 2][n][r % 2 * 2 + j] : kEmpty, (j == 0 ? id.x : id.y) == own_id[r]);
          }
        }
      }
    };
    float old_top[R], old_best[R], from_top[R], from_best[R];
    for (int r = 0; r < R; ++r) old_top[r] = top[r], old_best[r] = best[r];
    each([&](int r, float score, bool match) {
      top[r] = fmaxf(top[r], score);
      if (match) best[r] = fmaxf(best[r], score);
    });
#pragma unroll
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < kThetas; ++k) {
        others[r][k] *= ptx::exp2(fallen(old_top[r], top[r]) * a.factor[k]);
        matches[r][k] *= ptx::exp2(fallen(old_best[r], best[r]) * a.factor[k]);
      }
      from_top[r] = top[r] == kEmpty ? 0.0f : top[r];
      from_best[r] = best[r] == kEmpty ? 0.0f : best[r];
    }
    each([&](int r, float score, bool match) {
      const float below = score - (match ? from_best[r] : from_top[r]);
      for (int k = 0; k < kThetas; ++k) {
        const float weight = ptx::exp2(below * a.factor[k]);
        if (match) {
          matches[r][k] += weight;
        } else {
          others[r][k] += weight;
        }
      }
    });
  }

  // The results of window j for the rows whose window ends in the tile: the four lanes of a row meet.
  FASTLM_PTX void write(int j, const bool (&ended)[R]) const {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (!ptx::any(ended[r])) continue;
      float row_top = top[r], row_best = best[r];
      for (int lanes = 1; lanes <= 2; ++lanes) {
        row_top = fmaxf(row_top, ptx::shuffle_xor(row_top, lanes));
        row_best = fmaxf(row_best, ptx::shuffle_xor(row_best, lanes));
      }
      const int64_t at = j * a.stride + begin + row[r];
#pragma unroll
      for (int k = 0; k < kThetas; ++k) {
        float rest = others[r][k] * ptx::exp2(fallen(top[r], row_top) * a.factor[k]);
        float mass = matches[r][k] * ptx::exp2(fallen(best[r], row_best) * a.factor[k]);
        for (int lanes = 1; lanes <= 2; ++lanes) {
          rest += ptx::shuffle_xor(rest, lanes);
          mass += ptx::shuffle_xor(mass, lanes);
        }
        if (ended[r] && k < a.thetas && lane % 4 == k % 4) {
          const float norm = rest + mass * ptx::exp2(fallen(row_best, row_top) * a.factor[k]);
          a.log_mass[at + k * a.rows] = log_sum(a.theta[k], row_best, mass);
          a.log_norm[at + k * a.rows] = log_sum(a.theta[k], row_top, norm);
        }
      }
    }
  }

  // The bands of a tile: mostly one, and where windows end for some row the next ones. `latest`: where the last of the
  // warp's rows begins to see; `window`: the nearest that not all of them have passed.
  FASTLM_PTX void take(const Scores& scores, const int32_t* ids, int edge, int latest, int& window) {
    while (window + 1 < a.windows && warp_first - a.window[window] >= edge + Tile::kKeys) ++window;
    int nearer = window == 0 ? 0 : a.window[window - 1];
    for (int j = window; j < a.windows && (edge <= latest || warp_last - nearer > edge); ++j) {
      const int far = a.window[j];
      int first[R], width[R];
      bool ended[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        first[r] = max(row[r] - far, oldest[r]) - edge;
        width[r] = max(row[r] - nearer, oldest[r]) - edge - first[r];
        ended[r] = row[r] < count && first[r] >= 0 && first[r] < Tile::kKeys;
      }
      const bool whole = edge >= max(warp_last - far, latest) && edge + Tile::kKeys <= warp_first - nearer;
      if (kThetas == 1 && whole) {  // masks are nothing beside eight exponentials, and the code of them is long
        add<false>(scores, ids, first, width);
      } else {
        add<true>(scores, ids, first, width);
      }
      write(j, ended);
      nearer = far;
    }
  }
};

// The copies of a block: its query, and the stages of the tiles from `top` down to `bottom` into the ring.
template <typename T, typename Tile>
struct Copies {
  const CacheArgs& a;
  const int64_t begin;
  const int count, bottom;
  const unsigned char* const first_row = a.packed + (a.past + begin) * a.pitch;
  const int before = -near(a.past + begin), top = (count - 1) & -Tile::kKeys, stages = max(1, (a.units + 1) / 2);
  const int slot_bytes = a.kept == a.units ? Tile::kQuery : Tile::kSlotWithQuery;
  int edge = top, stage = 0, filled = 0, used = 0;  // what is copied next, and the slots next filled and used

  FASTLM_PTX unsigned char* kept(int stage) const { return ptx::shared_memory() + 2 * stage * Tile::kRows * kUnit; }

  FASTLM_PTX unsigned char* slot(int& next) const {
    unsigned char* const at = ptx::shared_memory() + a.kept * Tile::kRows * kUnit + next * slot_bytes;
    if (++next == Tile::kSlots) next = 0;
    return at;
  }

  // `units` of a stage of kCount rows from `first` on; 16 bytes at a time.
  template <int kCount>
  FASTLM_PTX void copy(unsigned char* to, int first, int stage, int units) const {
    static_assert(4 * kCount % Tile::kThreads == 0);
#pragma unroll
    for (int round = 0; round < 4 * kCount / Tile::kThreads; ++round) {
      const int i = round * Tile::kThreads + threadIdx.x, row = i / 4, part = i % 4;
      const int at = stage * 2 * kUnit + part * 16;
      const bool inside = first + row >= before && first + row < count && at < a.bytes;
      const unsigned char* from = inside ? first_row + (first + row) * a.pitch + at : a.packed;
      if (part / 2 < units) ptx::copy_async_16(to + part / 2 * kCount * kUnit + place(row, part % 2), from, inside);
    }
  }

  // The next stage, if there is one; a group in any case.
  FASTLM_PTX void issue() {
    if (edge >= bottom) {
      unsigned char* const to = slot(filled);
      copy<Tile::kKeys>(to, edge, stage, 2);
      if (2 * stage >= a.kept && 2 * stage < a.units) copy<Tile::kRows>(to + Tile::kQuery, 0, stage, 2);
      if (stage == stages - 1 && threadIdx.x < Tile::kKeys / 4) {
        const int64_t from = begin + edge + 4 * threadIdx.x;
        ptx::copy_async_16(to + Tile::kIds + 16 * threadIdx.x, a.ids + from);
        if (kSplit<T>) ptx::copy_async_16(to + Tile::kPowers + 16 * threadIdx.x, a.powers + from);
      }
      if (++stage == stages) stage = 0, edge -= Tile::kKeys;
    }
    ptx::copy_async_commit();
  }
};

template <typename T, typename Tile, int kThetas>
__global__ void __launch_bounds__(Tile::kThreads, 1) cache_attention_kernel(const __grid_constant__ CacheArgs a) {
  Walk<T, Tile, kThetas> walk(a);

  // The oldest key of the block and of the warp. Each warp looks at all rows: cheaper than to meet.
  int bottom = kFar, warp_bottom = kFar, latest = kFar;  // latest: of the negative
  for (int t = walk.lane; t < walk.count; t += 32) {
    const int oldest = walk.oldest_of(t), first = max(t - a.window[a.windows - 1], oldest);
    bottom = min(bottom, first);
    if (t >= walk.warp_first && t <= walk.warp_last) {
      warp_bottom = min(warp_bottom, first);
      latest = min(latest, -oldest);
    }
  }
  bottom = least(bottom), warp_bottom = least(warp_bottom), latest = -least(latest);

  Copies<T, Tile> copies{a, walk.begin, walk.count, bottom & -Tile::kKeys};
  for (int s = 0; 2 * s < a.kept; ++s) copies.template copy<Tile::kRows>(copies.kept(s), 0, s, a.kept - 2 * s);
  for (int ahead = 0; ahead < Tile::kAhead; ++ahead) copies.issue();
  int window = 0;
  for (int edge = copies.top; edge >= copies.bottom; edge -= Tile::kKeys) {
    const bool concerned = edge <= walk.warp_last && edge + Tile::kKeys > warp_bottom;
    typename Walk<T, Tile, kThetas>::Scores scores = {};
    for (int stage = 0; stage < copies.stages; ++stage) {
      const unsigned char* const slot = copies.slot(copies.used);
      ptx::copy_async_wait<Tile::kAhead - 1>();
      ptx::sync_block();  // the stage is there for all, and all have left the slot that is filled next
      copies.issue();
      if (!concerned) continue;
      const unsigned char* query = 2 * stage < a.kept ? copies.kept(stage) : slot + Tile::kQuery;
      if (2 * stage < a.units) walk.multiply(scores, query, slot, a.units - 2 * stage);
      if (stage < copies.stages - 1) continue;
      if (kSplit<T>) walk.scale(scores, reinterpret_cast<const float*>(slot + Tile::kPowers));
      walk.take(scores, reinterpret_cast<const int32_t*>(slot + Tile::kIds), edge, latest, window);
    }
  }
}

// float32 rows as halves: a unit of high ones and one of low ones in turn, times a power of two that takes the largest
// number of a row to [2^14, 2^15). An infinity gets the least factor and comes out as NaN; so does a NaN. A warp a row.
__global__ void cache_attention_split_kernel(const float* rows, int64_t count, int64_t width, unsigned char* packed,
                                             int64_t pitch, float* powers) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int64_t i = int64_t(blockIdx.x) * warps + threadIdx.x / 32; i < count; i += int64_t(gridDim.x) * warps) {
    const float* const x = rows + i * width;
    uint32_t largest = 0;
    for (int64_t d = lane; d < width; d += 32) largest = max(largest, __float_as_uint(x[d]) & 0x7FFFFFFFu);
    for (int lanes = 16; lanes > 0; lanes /= 2) largest = max(largest, ptx::shuffle_xor(largest, lanes));
    // 127 + 14 - (exponent - 127), as long as the inverse is a normal number
    const uint32_t field = min(268u - (largest >> 23), 253u);
    const float factor = __uint_as_float(field << 23);
    if (lane == 0) powers[i] = __uint_as_float((254u - field) << 23);
    for (int64_t d = lane; d < pitch / 4; d += 32) {
      const float value = d < width ? x[d] * factor : 0.0f;
      const __half high = __float2half_rn(value);
      __half* const unit = reinterpret_cast<__half*>(packed + i * pitch + d / 16 * 2 * kUnit) + d % 16;
      unit[0] = high;
      unit[16] = __float2half_rn(value - __half2float(high));
    }
  }
}

// theta log2(e); for theta = 0 so little that every score weighs 1, but 0 where it is -inf.
inline float factor_of(float theta) { return fmaxf(theta * 1.4426950408889634f, 2e-38f); }

struct Room {
  int kept, bytes;  // units of a query row that stay in shared memory, and how much of it is then used
};

template <typename Tile>
Room room(int units, int shared) {
  const int row = Tile::kRows * kUnit, ring = Tile::kSlots * Tile::kQuery;
  if (int64_t{units} * row + ring <= shared) return {units, units * row + ring};
  const int streamed = Tile::kSlots * Tile::kSlotWithQuery;
  const int kept = (shared - streamed) / row & -2;
  return {kept, kept * row + streamed};
}

}  // namespace
}  // namespace fastlm
