// csrc/lstm_backward.cu under the emulator.
#include "lstm.h"
//
#include "../../csrc/lstm_backward.cu"

using namespace fastlm;
using namespace fastlm::lstm;

extern "C" void lstm_backward_plan(const Wish* wish, int64_t* out) {
  const Plan p = wish->plan(true);
  describe(p, p.nanoseconds > 0 ? backward_exchange(p, wish->T, wish->B) : 0, out);
}

extern "C" void lstm_backward(const Wish* wish, int dtype, int state, int reverse, double p, const int64_t* seed,
                              const void* weight, const void* dy, const float* dh_n, const float* dc_n, const void* c0,
                              const float* cells, void* gates, float* dh0, float* dc0, uint32_t* exchange,
                              uint32_t* flags, uint32_t* peaks, float* handed) {
  Backward a{};
  a.plan = wish->plan(true);
  a.T = int(wish->T), a.B = int(wish->B), a.H = int(wish->H);
  a.dtype = DType(dtype), a.state = DType(state), a.reverse = reverse != 0, a.p = p, a.seed = seed;
  a.weight = weight, a.dy = dy, a.dh_n = dh_n, a.dc_n = dc_n, a.c0 = c0, a.cells = cells, a.gates = gates;
  a.dh0 = dh0, a.dc0 = dc0, a.exchange = exchange, a.flags = flags, a.peaks = peaks, a.handed = handed;
  run(backward_begin_kernel(), backward_kernel(a.plan), a);
}
