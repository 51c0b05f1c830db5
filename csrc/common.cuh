// What the CUDA sources share: dtype access in fp32 and grids; for the host functions, which the emulator leaves out,
// the current stream and the device.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "dtype.h"
#include "ptx.h"

#ifndef FASTLM_EMULATED
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>

#include "common.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fastlm {

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// out = a b of float32 with factors of 11 bits (matmul.cu); false where no library has that, or one of them is empty.
bool multiply_tf32(const Tensor& a, const Tensor& b, const Tensor& out);

// What a launch depends on.
struct Device {
  int index, multiprocessors, capability;  // the last as 10 major + minor
  int shared_memory;                       // bytes, of a block at most
  bool cooperative;                        // whether all blocks of a grid can be made to run at once
};

// Asked of the driver once a device. FASTLM_CUDA_MULTIPROCESSORS makes it a smaller one, for tests.
inline Device device_of(const Tensor& x) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const int index = x.get_device_index();
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.count(index) == 0) {
    const auto ask = [index](cudaDeviceAttr attribute) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, index));
      return value;
    };
    known[index] = {index, ask(cudaDevAttrMultiProcessorCount),
                    10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor),
                    ask(cudaDevAttrMaxSharedMemoryPerBlockOptin), ask(cudaDevAttrCooperativeLaunch) != 0};
  }
  Device device = known[index];
  const char* fewer = std::getenv("FASTLM_CUDA_MULTIPROCESSORS");
  if (fewer != nullptr && std::atoi(fewer) > 0)
    device.multiprocessors = std::min(device.multiprocessors, std::atoi(fewer));
  return device;
}

}  // namespace fastlm
#endif

namespace fastlm {

// Blocks for one thread per item; 32 per multiprocessor of the largest device are enough to fill it.
inline unsigned grid(int64_t items, int64_t threads) {
  const int64_t blocks = (items + threads - 1) / threads;
  return unsigned(blocks < 65535 ? blocks : 65535);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

}  // namespace fastlm

// Runs the statement with `scalar_t` bound to the CUDA type of a DType.
#define FASTLM_CUDA_DISPATCH(dtype, ...) \
  switch (dtype) {                       \
    case ::fastlm::DType::f32: {         \
      using scalar_t = float;            \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
    case ::fastlm::DType::bf16: {        \
      using scalar_t = __nv_bfloat16;    \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
    case ::fastlm::DType::f16: {         \
      using scalar_t = __half;           \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
  }
