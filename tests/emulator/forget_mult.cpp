// csrc/forget_mult.cu under the emulator.
#include "forget_mult.cu"

using namespace fastlm;

extern "C" void forget_mult_fwd(int dtype, const void* f, const void* x, const void* h0, int wide, void* out,
                                int64_t steps, int64_t count, int reverse, int blocks) {
  FASTLM_CUDA_DISPATCH(DType(dtype), emulator::launch({unsigned(blocks), kThreads}, [&] {
                         forget_mult_fwd_kernel(static_cast<const scalar_t*>(f), static_cast<const scalar_t*>(x), h0,
                                                wide != 0, static_cast<scalar_t*>(out), steps, count, reverse != 0);
                       }));
}

extern "C" void forget_mult_bwd(int dtype, const void* grad, const void* f, const void* x, const void* h0, int wide,
                                const void* h, void* df, void* dx, void* dh0, int64_t steps, int64_t count, int reverse,
                                int blocks) {
  FASTLM_CUDA_DISPATCH(DType(dtype), emulator::launch({unsigned(blocks), kThreads}, [&] {
                         forget_mult_bwd_kernel(static_cast<const scalar_t*>(grad), static_cast<const scalar_t*>(f),
                                                static_cast<const scalar_t*>(x), h0, wide != 0,
                                                static_cast<const scalar_t*>(h), static_cast<scalar_t*>(df),
                                                static_cast<scalar_t*>(dx), dh0, steps, count, reverse != 0);
                       }));
}
