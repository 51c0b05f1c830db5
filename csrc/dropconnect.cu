// DropConnect on CUDA: y = w keep / (1 - p), and the mask alone. A thread owns the four elements of a Philox
// block, so neighbouring threads read neighbouring quads. The seed is read on the device: nothing waits for
// the host.
#include "common.cuh"
#include "philox.h"

namespace fastlm {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void dropconnect_fwd_kernel(const T* weight, T* out, int64_t count, double p, const int64_t* seed) {
  const uint64_t threshold = philox_threshold(p), key = uint64_t(*seed);
  const float scale = philox_scale(p);
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t block = int64_t(blockIdx.x) * kThreads + threadIdx.x; 4 * block < count; block += step) {
    const Philox x = philox_block(key, uint64_t(block), kWeightStream);
    for (int j = 0; j < 4 && 4 * block + j < count; ++j) {
      const int64_t e = 4 * block + j;
      out[e] = from_float<T>(x.lane[j] >= threshold ? to_float(weight[e]) * scale : 0.0f);
    }
  }
}

__global__ void dropconnect_mask_kernel(bool* out, int64_t count, double p, const int64_t* seed, uint32_t stream) {
  const uint64_t threshold = philox_threshold(p), key = uint64_t(*seed);
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t block = int64_t(blockIdx.x) * kThreads + threadIdx.x; 4 * block < count; block += step) {
    const Philox x = philox_block(key, uint64_t(block), stream);
    for (int j = 0; j < 4 && 4 * block + j < count; ++j) out[4 * block + j] = x.lane[j] >= threshold;
  }
}

}  // namespace
}  // namespace fastlm

#ifndef FASTLM_EMULATED
namespace fastlm {
namespace {

template <typename T>
void launch_dropconnect_fwd(const Tensor& weight, Tensor& out, double p, const Tensor& seed) {
  const int64_t count = weight.numel();
  dropconnect_fwd_kernel<T><<<grid((count + 3) / 4, kThreads), kThreads, 0, current_stream(weight)>>>(
      static_cast<const T*>(weight.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()), count, p,
      static_cast<const int64_t*>(seed.const_data_ptr()));
}

Tensor fwd(const Tensor& weight_, double p, const Tensor& seed) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed must be an int64 scalar tensor");
  const torch::stable::accelerator::DeviceGuard guard(weight_.get_device_index());
  const Tensor weight = contiguous(weight_);
  Tensor out = torch::stable::empty_like(weight);
  if (weight.numel() == 0) return out;
  FASTLM_CUDA_DISPATCH(dtype_of(weight, "weight"), launch_dropconnect_fwd<scalar_t>(weight, out, p, seed));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor mask(const Tensor& seed, int64_t count, double p, int64_t stream) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed must be an int64 scalar tensor");
  const torch::stable::accelerator::DeviceGuard guard(seed.get_device_index());
  Tensor out = torch::stable::new_empty(seed, {count}, ScalarType::Bool);
  if (count == 0) return out;
  dropconnect_mask_kernel<<<grid((count + 3) / 4, kThreads), kThreads, 0, current_stream(seed)>>>(
      static_cast<bool*>(out.mutable_data_ptr()), count, p, static_cast<const int64_t*>(seed.const_data_ptr()),
      uint32_t(stream));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) {
  m.impl("dropconnect_fwd", TORCH_BOX(&fastlm::fwd));
  m.impl("dropconnect_mask", TORCH_BOX(&fastlm::mask));
}
#endif
