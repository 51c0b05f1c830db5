// How the pooling operators split [T, B, H] into work items: a run of channels
// of one batch row, over all of time. Every channel is a recurrence of its own,
// so the split changes no result.
#pragma once
#include <cstdint>

namespace fastlm {

constexpr int64_t kChannels = 1024;  // of one work item at most: its fp32 state
                                     // stays in the first-level cache

struct Channels {
  int64_t batch, hidden, run,
      runs;  // a batch row is `runs` items of at most `run` channels
};

// Shorter runs where rows alone would leave threads idle.
static inline Channels split_channels(int64_t batch, int64_t hidden, int64_t threads) {
  int64_t run = kChannels;
  while (run > 128 && batch * ((hidden + run - 1) / run) < 4 * threads) run /= 2;
  return {batch, hidden, run, (hidden + run - 1) / run};
}

}  // namespace fastlm
