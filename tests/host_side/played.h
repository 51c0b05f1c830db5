// What stands in for PyTorch's CUDA in the host part of a CUDA source, which then registers for the CPU's tensors. It
// comes before the source.
#pragma once
#define FASTLM_EMULATED  // for the instructions alone, of which the fused steps use none
#include "../../csrc/ptx.h"
#undef FASTLM_EMULATED
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
static uint3 threadIdx, blockIdx;
static dim3 gridDim;
#include "../../csrc/common.cuh"
#include "../../csrc/lstm_args.h"

inline int device;  // a test changes it for the facts to be asked for anew

extern "C" {
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
AOTITorchError torch_get_current_cuda_blas_handle(void** handle) { return *handle = nullptr, 0; }
}

#define CUDA CPU
