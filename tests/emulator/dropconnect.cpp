// csrc/dropconnect.cu under the emulator.
#include "dropconnect.cu"

using namespace fastlm;

extern "C" void dropconnect_fwd(int dtype, const void* weight, void* out, int64_t count, double p, const int64_t* seed,
                                int blocks) {
  FASTLM_CUDA_DISPATCH(DType(dtype), emulator::launch({unsigned(blocks), kThreads}, [&] {
                         dropconnect_fwd_kernel(static_cast<const scalar_t*>(weight), static_cast<scalar_t*>(out),
                                                count, p, seed);
                       }));
}

extern "C" void dropconnect_mask(bool* out, int64_t count, double p, const int64_t* seed, int stream, int blocks) {
  emulator::launch({unsigned(blocks), kThreads},
                   [&] { dropconnect_mask_kernel(out, count, p, seed, uint32_t(stream)); });
}
