// What the units of the persistent LSTM share. With two warps to a block their small layers have what large ones have
// with eight: weights beyond the registers, and several fetches a step.
#pragma once
#ifndef FASTLM_LSTM_WARPS
#define FASTLM_LSTM_WARPS 2
#endif
#include "emulator.h"
#include "lstm_args.h"

namespace fastlm::lstm {

// What a test chooses of a pass.
struct Wish {
  int64_t T, B, H, split, exchange, clusters, multiprocessors, shared, only;

  Plan plan(bool backward) const {
    Device d{int(multiprocessors), int(shared), {}};
    for (int i = 0; i < 5 && clusters != 0; ++i) d.clusters[i] = int(multiprocessors) >> i;
    const Exchange way = Exchange(exchange);
    return backward ? plan_backward(H, B, split != 0, way, clusters != 0, d, int(only))
                    : plan_forward(H, B, split != 0, way, d, int(only));
  }
};

// The plan, and the words of the exchange and the flags and the floats handed, in the order of the test's names.
inline void describe(const Plan& p, int64_t words, int64_t* out) {
  const int64_t all[] = {p.nanoseconds > 0, words,   flag_words(p), handed_floats(p), p.tiling.tiles,
                         p.tiling.kept,     p.units, p.slices,      p.groups,         p.replicas,
                         p.passes,          p.depth, p.sides,       p.cluster,        p.shared};
  for (const int64_t x : all) *out++ = x;
}

template <typename Args>
void run(void (*begin)(const Args), void (*kernel)(const Args), const Args& args) {
  const Plan& p = args.plan;
  emulator::launch({dim3(2, 3), kThreads}, [&] {
    const Args copy = args;
    begin(copy);
  });
  emulator::launch({unsigned(p.blocks()), kThreads, size_t(p.shared), unsigned(p.cluster), true}, [&] {
    const Args copy = args;
    kernel(copy);
  });
}

}  // namespace fastlm::lstm
