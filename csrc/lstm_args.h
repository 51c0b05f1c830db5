// What the host hands to the kernels of the persistent LSTM.
#pragma once
#include <cuda_runtime.h>

#include <iterator>
#include <utility>

#include "dtype.h"
#include "lstm_plan.h"
#include "ptx.h"

namespace fastlm::lstm {

// Pointers to contiguous tensors. `dtype` is that of weight, gates and y; `state` that of h0, c0, h_n and c_n.
struct Forward {
  Plan plan;
  int T, B, H;
  DType dtype, state;
  bool reverse;
  double p;
  const int64_t* seed;  // null: nothing is dropped
  const void* weight;   // [4H, H]
  const void *h0, *c0;  // [B, H]
  void* gates;          // [T, B, 4H]: the input's part; activated gates replace it where cells are kept
  float* cells;         // [T, B, H], or null
  void *y, *h_n, *c_n;  // [T, B, H], [B, H] each
  uint32_t *exchange, *flags;
};

// `gates` come in activated and leave as da; gradients that are null are zero.
struct Backward {
  Plan plan;
  int T, B, H;
  DType dtype, state;  // of weight, gates and dy; of c0
  bool reverse;
  double p;
  const int64_t* seed;
  const void* weight;
  const void* dy;            // [T, B, H]
  const float *dh_n, *dc_n;  // [B, H]
  const void* c0;            // [B, H]
  const float* cells;        // [T, B, H]
  void* gates;               // [T, B, 4H]
  float *dh0, *dc0;          // [B, H]
  uint32_t *exchange, *flags;
  uint32_t* peaks;  // [T + 1]: the bits of the largest |dy| of a step, and last of |dh_n| and |dc_n|
  float* handed;    // what the ranks of a group hand to one another, where that is no cluster
};

constexpr int64_t portions_of(const Plan& p, int64_t B) { return ceil_div(B, 8 * p.tiling.columns); }

// Words of 32 bits that a pass needs beside its tensors.
constexpr int64_t forward_exchange(const Plan& p, int64_t T, int64_t B, int64_t H) {
  return p.exchange == Exchange::cluster ? 0 : (T + 1) * portions_of(p, B) * operand_bytes(p.tiling, H) / 4;
}
// Behind da, a word of each block of a slice: the largest dc that it carries on.
constexpr int64_t backward_exchange(const Plan& p, int64_t T, int64_t B) {
  const int64_t slice = operand_bytes(p.tiling, int64_t{4} * p.groups * p.units) / 4 + p.groups;
  return T * portions_of(p, B) * p.slices * slice;
}
constexpr int64_t handed_floats(const Plan& p) {
  return p.cluster > 1 ? 0 : int64_t{2} * p.blocks() * p.slices * p.units * 8 * p.tiling.columns;
}
constexpr int64_t flag_words(const Plan& p) { return int64_t{2} * p.blocks() * p.passes; }

using ForwardKernel = void (*)(const Forward);
using BackwardKernel = void (*)(const Backward);

// The kernel of a plan, and the one that prepares its exchange; null where the plan's tiling is none of the table's.
ForwardKernel forward_kernel(const Plan& plan);
ForwardKernel forward_begin_kernel();
BackwardKernel backward_kernel(const Plan& plan);
BackwardKernel backward_begin_kernel();

template <typename Kernel, const auto& TILINGS, typename Make, size_t... I>
Kernel find_kernel(const Tiling& t, Make make, std::index_sequence<I...>) {
  Kernel found = nullptr;
  const auto same = [&](const Tiling& x) {
    return x.split == t.split && x.tiles == t.tiles && x.kept == t.kept && x.wave == t.wave && x.columns == t.columns;
  };
  ((same(TILINGS[I]) ? void(found = make(std::integral_constant<size_t, I>{})) : void()), ...);
  return found;
}

#ifndef FASTLM_EMULATED
// The launches on a stream; cudaErrorCooperativeLaunchTooLarge where the blocks cannot run at once.
cudaError_t run_forward(const Forward& args, cudaStream_t stream);
cudaError_t run_backward(const Backward& args, cudaStream_t stream);

// How many blocks of a plan's kernel run at once on the current device, as the driver says.
int resident_forward(const Plan& plan);
int resident_backward(const Plan& plan);

// Cooperative, for the blocks of the plan wait for one another, and in its clusters.
template <typename Args>
cudaError_t configure(void (*kernel)(const Args), const Plan& plan, cudaLaunchConfig_t& config,
                      cudaLaunchAttribute (&attributes)[2]) {
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const void* function = reinterpret_cast<const void*>(kernel);
  int device = 0, most = 0;  // always the device's: a plan's own could be taken back by another thread's
  auto error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess && plan.cluster > 8)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {unsigned(plan.cluster), 1, 1};
  config = {};
  config.gridDim = dim3(unsigned(plan.blocks()));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(plan.shared);
  config.attrs = attributes;
  config.numAttrs = plan.cluster > 1 ? 2 : 1;
  return error;
}

template <typename Args>
cudaError_t launch(void (*kernel)(const Args), const Plan& plan, const Args& args, cudaStream_t stream) {
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attributes[2];
  if (const cudaError_t error = configure(kernel, plan, config, attributes)) return error;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
#ifdef FASTLM_BOUNDED_SPIN
  unsigned in_vain = 0;
  const unsigned none = 0;
  if (error == cudaSuccess && cudaStreamSynchronize(stream) == cudaSuccess)
    cudaMemcpyFromSymbol(&in_vain, ptx::waited_in_vain, sizeof in_vain);
  cudaMemcpyToSymbol(ptx::waited_in_vain, &none, sizeof none);
  if (in_vain != 0) return cudaErrorLaunchTimeout;
#endif
  return error;
}

template <typename Args>
int resident(void (*kernel)(const Args), const Plan& plan) {
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attributes[2];
  int count = 0, device = 0, multiprocessors = 0;
  if (configure(kernel, plan, config, attributes) != cudaSuccess) return 0;
  if (plan.cluster > 1) {
    cudaFuncAttributes code{};  // compiled for less than Hopper, it has no clusters even there
    if (cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(kernel)) != cudaSuccess || code.ptxVersion < 90)
      return 0;
    if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) return 0;
    return count * plan.cluster;
  }
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, kThreads, size_t(plan.shared)) != cudaSuccess)
    return 0;
  return count * multiprocessors;
}
#endif

}  // namespace fastlm::lstm
