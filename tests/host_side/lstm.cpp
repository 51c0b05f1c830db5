// The host part of csrc/lstm.cu on the CPU, with its fused steps: kernels for PyTorch's CPU tensors. The persistent
// kernels are played; they are asked, answer as a test has said, and compute nothing.
#define FASTLM_EMULATED  // for the instructions alone, of which the fused steps use none
#include "../../csrc/ptx.h"
#undef FASTLM_EMULATED
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
static uint3 threadIdx, blockIdx;
static dim3 gridDim;
// Before what is to come is renamed.
#include "../../csrc/common.cuh"
#include "../../csrc/lstm_args.h"
#define CUDA CPU
#include "../../csrc/lstm.cu"

template <typename Kernel, typename Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, const Args& args) {
  ++steps_launched;
  gridDim = config->gridDim;
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < config->blockDim.x; ++threadIdx.x) kernel(args);
  return cudaSuccess;
}

namespace {
int device, forward_room, backward_room, launch_error, forwards, backwards, last_blocks, last_sum;
}

extern "C" {

void play(int multiprocessors, int capability, int cooperative, int room, int room_back, int error) {
  ++device;  // facts are asked for once a device
  const int facts[] = {multiprocessors, capability / 10, capability % 10, 227 * 1024, cooperative};
  for (int i = 0; i < 5; ++i) device_facts[i] = facts[i];
  forward_room = room, backward_room = room_back, launch_error = error;
  steps_launched = forwards = backwards = last_blocks = last_sum = 0;
}

// How many steps, persistent passes forward and backward; blocks of the last one and the sum of its sizes T, B and H.
void played(int* out) {
  const int all[] = {steps_launched, forwards, backwards, last_blocks, last_sum};
  for (int i = 0; i < 5; ++i) out[i] = all[i];
}

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) { return *index = device, 0; }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) { return *guard = nullptr, 0; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  static char text[] = "CUDA error";
  *message = error == cudaSuccess ? nullptr : text;
  return 0;
}
void torch_c10_cuda_free_error_msg(char*) {}
}

namespace fastlm::lstm {

int resident_forward(const Plan& plan) { return plan.cluster > 1 ? 0 : forward_room; }
int resident_backward(const Plan& plan) { return plan.cluster > 1 ? 0 : backward_room; }

cudaError_t run_forward(const Forward& args, cudaStream_t) {
  ++forwards;
  last_blocks = args.plan.blocks(), last_sum = args.T + args.B + args.H;
  return cudaError_t(launch_error);
}

cudaError_t run_backward(const Backward& args, cudaStream_t) {
  ++backwards;
  last_blocks = args.plan.blocks(), last_sum = args.T + args.B + args.H;
  for (int t = 0; t <= args.T; ++t) last_sum += args.peaks[t] != 0;  // maxima grow from zero
  return cudaError_t(launch_error);
}

}  // namespace fastlm::lstm
