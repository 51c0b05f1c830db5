// csrc/forget_mult.cu under the emulator, on `blocks` blocks, as many recurrences a thread as leave `busy` blocks.
#include "forget_mult.cu"

using namespace fastlm;

namespace {

template <typename T>
void run(const ForgetMult<T>& a, bool forward, int blocks, int busy) {
  launch(a, forward, busy, [&](auto kernel, dim3, size_t shared) {
    emulator::launch({unsigned(blocks), kThreads, shared}, [&] {
      const ForgetMult<T> arguments = a;
      kernel(arguments);
    });
  });
}

}  // namespace

extern "C" void forget_mult_fwd(int dtype, const void* f, const void* x, const void* h0, int wide, void* out,
                                int64_t steps, int64_t count, int reverse, int blocks, int busy) {
  FASTLM_CUDA_DISPATCH(DType(dtype), {
    ForgetMult<scalar_t> a{};
    a.f = static_cast<const scalar_t*>(f), a.x = static_cast<const scalar_t*>(x);
    a.h0 = h0, a.wide = wide, a.reverse = reverse;
    a.out = static_cast<scalar_t*>(out);
    a.steps = steps, a.count = count;
    run(a, true, blocks, busy);
  });
}

extern "C" void forget_mult_bwd(int dtype, const void* grad, const void* f, const void* x, const void* h0, int wide,
                                const void* h, void* df, void* dx, void* dh0, int64_t steps, int64_t count, int reverse,
                                int blocks, int busy) {
  FASTLM_CUDA_DISPATCH(DType(dtype), {
    ForgetMult<scalar_t> a{};
    a.f = static_cast<const scalar_t*>(f), a.x = static_cast<const scalar_t*>(x);
    a.grad = static_cast<const scalar_t*>(grad), a.h = static_cast<const scalar_t*>(h);
    a.h0 = h0, a.wide = wide, a.reverse = reverse;
    a.df = static_cast<scalar_t*>(df), a.dx = static_cast<scalar_t*>(dx), a.dh0 = dh0;
    a.steps = steps, a.count = count;
    run(a, false, blocks, busy);
  });
}
