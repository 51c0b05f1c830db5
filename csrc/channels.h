// How the pooling operators split [T, B, H]: a thread has a range of the B H channels, in the order of memory, and
// walks it through time in blocks of kBlock. Every channel is a recurrence of its own, so the split changes no result.
#pragma once
#include <cstdint>

#include "dtype.h"
#ifdef FASTLM_ISA
#include "simd.h"
#else
#include "common.h"
#endif

namespace fastlm {

constexpr int64_t kUnit = 64;      // a range begins at a multiple of it
constexpr int64_t kBlock = 16384;  // whole rows of memory in one piece, and an fp32 state that fits a private cache

struct Channels {
  int64_t batch, hidden, count;  // count = batch hidden
};

#ifdef FASTLM_ISA
namespace FASTLM_ISA {
namespace {

// Part of a state as fp32, zeros when there is none; `run` has room for whole vectors.
FASTLM_INLINE void load_state(const void* state, DType dtype, int64_t offset, int64_t count, float* run) {
  for (int64_t j = 0; j < count; j += kWidth) {
    vec v = splat(0.0f);
    if (state != nullptr) FASTLM_DISPATCH(dtype, v = load(static_cast<const scalar_t*>(state) + offset + j, count - j));
    store(run + j, v);
  }
}

FASTLM_INLINE void store_state(void* state, DType dtype, int64_t offset, int64_t count, const float* run) {
  for (int64_t j = 0; j < count; j += kWidth)
    FASTLM_DISPATCH(dtype, store(static_cast<scalar_t*>(state) + offset + j, load(run + j), count - j));
}

// `count` channels from `channel` of batch row b on, which are channels `first` and on of all.
struct Segment {
  int64_t b, channel, first, count;
};

// The segment of at most `most` channels that begins with channel `first` of all and ends before `end`.
FASTLM_INLINE Segment segment_at(const Channels& channels, int64_t first, int64_t end, int64_t most) {
  const int64_t b = first / channels.hidden, channel = first % channels.hidden;
  return {b, channel, first, lesser(most, lesser(channels.hidden - channel, end - first))};
}

}  // namespace
}  // namespace FASTLM_ISA
#else

// Calls body(begin, end) on the threads, for ranges of channels.
template <typename Body>
void split_channels(const Channels& channels, int64_t steps, Body body) {
  const int64_t units = (channels.count + kUnit - 1) / kUnit;
  const int64_t grain = 1 + 32768 / (kUnit * (steps + 1));  // units worth a thread
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    body(begin * kUnit, end == units ? channels.count : end * kUnit);
  });
}

#endif

}  // namespace fastlm
