// How the pooling operators split [T, B, H] into work items: a run of channels of one batch row, over all of time.
// Every channel is a recurrence of its own, so the split changes no result.
#pragma once
#include <cstdint>

#include "dtype.h"
#ifdef FASTLM_ISA
#include "simd.h"
#endif

namespace fastlm {

constexpr int64_t kChannels = 1024;  // of one work item at most: its fp32 state stays in the first-level cache

struct Channels {
  int64_t batch, hidden, run, runs;  // a batch row is `runs` items of at most `run` channels
};

// Shorter runs where rows alone would leave threads idle.
static inline Channels split_channels(int64_t batch, int64_t hidden, int64_t threads) {
  int64_t run = kChannels;
  while (run > 128 && batch * ((hidden + run - 1) / run) < 4 * threads) run /= 2;
  return {batch, hidden, run, (hidden + run - 1) / run};
}

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

}  // namespace
}  // namespace FASTLM_ISA
#endif

}  // namespace fastlm
