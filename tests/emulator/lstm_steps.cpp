// The steps of the alternating path of csrc/lstm.cu under the emulator.
#include "../../csrc/lstm.cu"

using namespace fastlm;

extern "C" void forward_step(int dtype, const float* product, const float* before, void* gates, float* after, void* y,
                             void* h_n, void* c_n, int64_t batch, int64_t hidden, int keep, int wide, int rows) {
  const ForwardStep step{product, before, gates, after, y, h_n, c_n, batch, hidden, keep != 0, wide != 0};
  const dim3 grid(unsigned(hidden + kThreads - 1) / kThreads, unsigned(rows));
  FASTLM_CUDA_DISPATCH(DType(dtype),
                       emulator::launch({grid, kThreads}, [&] { lstm_forward_step_kernel<scalar_t>(step); }));
}

extern "C" void backward_step(int dtype, void* gates, const float* cells, const float* before, const void* dy,
                              const float* given, const float* product, const float* dc, float* dc_before,
                              int64_t batch, int64_t hidden, int rows) {
  const BackwardStep step{gates, cells, before, dy, given, product, dc, dc_before, batch, hidden};
  const dim3 grid(unsigned(hidden + kThreads - 1) / kThreads, unsigned(rows));
  FASTLM_CUDA_DISPATCH(DType(dtype),
                       emulator::launch({grid, kThreads}, [&] { lstm_backward_step_kernel<scalar_t>(step); }));
}
