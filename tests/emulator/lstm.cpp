// csrc/lstm_forward.cu and csrc/lstm_backward.cu under the emulator, with two warps to a block: their small layers then
// have what large ones have with eight, weights beyond the registers and several fetches a step.
#define FASTLM_LSTM_WARPS 2
#include "../../csrc/lstm_forward.cu"
// Another kernel, in a namespace of its own.
#include "../../csrc/lstm_backward.cu"

using namespace fastlm;
using namespace fastlm::lstm;

namespace {

Device device_of(int multiprocessors, int clusters) {
  Device d{multiprocessors, 227 * 1024, {multiprocessors, 0, 0, 0, 0}};
  for (int i = 1; i < 5 && clusters != 0; ++i) d.clusters[i] = multiprocessors >> i;
  return d;
}

// exchange: of lstm_plan.h; split: 1 for float32 in full. rank: 0 the best plan, else the tiling's place in its table
// + 1.
Plan plan_of(int backward, int H, int B, int split, int exchange, int clusters, int multiprocessors) {
  const Device d = device_of(multiprocessors, clusters);
  return backward != 0 ? plan_backward(H, B, split != 0, Exchange(exchange), clusters != 0, d)
                       : plan_forward(H, B, split != 0, Exchange(exchange), d);
}

template <typename Kernel, typename Args>
void run_all(Kernel begin, Kernel kernel, const Args& args) {
  emulator::launch({dim3(2, 3), kThreads}, [&] {
    const Args copy = args;
    begin(copy);
  });
  const Plan& p = args.plan;
  emulator::launch({unsigned(p.blocks()), kThreads, size_t(p.shared), unsigned(p.cluster), true}, [&] {
    const Args copy = args;
    kernel(copy);
  });
}

}  // namespace

// What a pass needs: words of the exchange, of the flags, floats handed; and of the plan, for the tests to look at.
extern "C" void lstm_plan(int backward, int T, int B, int H, int split, int exchange, int clusters, int multiprocessors,
                          int64_t* out) {
  const Plan p = plan_of(backward, H, B, split, exchange, clusters, multiprocessors);
  const int64_t words = p.nanoseconds == 0 ? 0
                        : backward != 0    ? backward_exchange(p, T, B)
                                           : forward_exchange(p, T, B, H);
  const int64_t all[] = {words,     flag_words(p), handed_floats(p),  p.tiling.tiles, p.tiling.columns, p.units,
                         p.slices,  p.groups,      p.replicas,        p.passes,       p.depth,          p.sides,
                         p.cluster, p.shared,      p.nanoseconds > 0, p.tiling.kept};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i) out[i] = all[i];
}

extern "C" void lstm_forward(int T, int B, int H, int split, int exchange, int clusters, int multiprocessors, int dtype,
                             int state, int reverse, double p, const int64_t* seed, const void* weight, const void* h0,
                             const void* c0, void* gates, float* cells, void* y, void* h_n, void* c_n, uint32_t* words,
                             uint32_t* flags) {
  const Plan plan = plan_of(0, H, B, split, exchange, clusters, multiprocessors);
  const Forward args{plan, T,     B,     H, DType(dtype), DType(state), reverse != 0, p,    seed, weight, h0,
                     c0,   gates, cells, y, h_n,          c_n,          words,        flags};
  run_all(forward_begin_kernel(), forward_kernel(plan), args);
}

extern "C" void lstm_backward(int T, int B, int H, int split, int exchange, int clusters, int multiprocessors,
                              int dtype, int state, int reverse, double p, const int64_t* seed, const void* weight,
                              const void* dy, const float* dh_n, const float* dc_n, const void* c0, const float* cells,
                              void* gates, float* dh0, float* dc0, uint32_t* words, uint32_t* flags, uint32_t* peaks,
                              float* handed) {
  const Plan plan = plan_of(1, H, B, split, exchange, clusters, multiprocessors);
  const Backward args{plan, T,    B,  H,     DType(dtype), DType(state), reverse != 0, p,     seed,  weight, dy,
                      dh_n, dc_n, c0, cells, gates,        dh0,          dc0,          words, flags, peaks,  handed};
  run_all(backward_begin_kernel(), backward_kernel(plan), args);
}
