// csrc/lstm_forward.cu under the emulator.
#include "lstm.h"
//
#include "../../csrc/lstm_forward.cu"

using namespace fastlm;
using namespace fastlm::lstm;

extern "C" void lstm_forward_plan(const Wish* wish, int64_t* out) {
  const Plan p = wish->plan(false);
  describe(p, p.nanoseconds > 0 ? forward_exchange(p, wish->T, wish->B, wish->H) : 0, out);
}

extern "C" void lstm_forward(const Wish* wish, int dtype, int state, int reverse, double p, const int64_t* seed,
                             const void* weight, const void* h0, const void* c0, void* gates, float* cells, void* y,
                             void* h_n, void* c_n, uint32_t* exchange, uint32_t* flags) {
  Forward a{};
  a.plan = wish->plan(false);
  a.T = int(wish->T), a.B = int(wish->B), a.H = int(wish->H);
  a.dtype = DType(dtype), a.state = DType(state), a.reverse = reverse != 0, a.p = p, a.seed = seed;
  a.weight = weight, a.h0 = h0, a.c0 = c0, a.gates = gates, a.cells = cells;
  a.y = y, a.h_n = h_n, a.c_n = c_n, a.exchange = exchange, a.flags = flags;
  run(forward_begin_kernel(), forward_kernel(a.plan), a);
}
