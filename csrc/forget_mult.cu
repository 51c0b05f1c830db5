// ForgetMult on CUDA: h_t = h_{t-1} + f_t (x_t - h_{t-1}) and its adjoint over [T, B, H]. A thread owns one of the B H
// recurrences and walks it through time, several steps of loads ahead of their use; neighbours read neighbouring
// channels.
#include "common.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 256, kBlocks = 4;  // a multiprocessor keeps this many blocks
constexpr int kAheadForward = 8, kAheadBackward = 4;

// Element n of a state in the dtype of the inputs or, if wide, in float32; zero when there is none.
template <typename T>
__device__ __forceinline__ float load_state(const void* h0, bool wide, int64_t n) {
  if (h0 == nullptr) return 0.0f;
  return wide ? static_cast<const float*>(h0)[n] : to_float(static_cast<const T*>(h0)[n]);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forget_mult_fwd_kernel(const T* __restrict__ f, const T* __restrict__ x, const void* __restrict__ h0, bool wide,
                           T* __restrict__ out, int64_t steps, int64_t count, bool reverse) {
  const int64_t stride = reverse ? -count : count;
  for (int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x; n < count; n += int64_t(gridDim.x) * kThreads) {
    int64_t first = n + (reverse ? (steps - 1) * count : 0);
    float h = load_state<T>(h0, wide, n);
    for (int64_t step = 0; step < steps; step += kAheadForward, first += kAheadForward * stride) {
      float gate[kAheadForward], value[kAheadForward];
#pragma unroll
      for (int u = 0; u < kAheadForward; ++u) {
        if (step + u < steps) {
          gate[u] = to_float(f[first + u * stride]);
          value[u] = to_float(x[first + u * stride]);
        }
      }
#pragma unroll
      for (int u = 0; u < kAheadForward; ++u) {
        if (step + u < steps) {
          h = fmaf(gate[u], value[u] - h, h);
          out[first + u * stride] = from_float<T>(h);
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forget_mult_bwd_kernel(const T* __restrict__ grad, const T* __restrict__ f, const T* __restrict__ x,
                           const void* __restrict__ h0, bool wide, const T* __restrict__ h, T* __restrict__ df,
                           T* __restrict__ dx, void* __restrict__ dh0, int64_t steps, int64_t count, bool reverse) {
  const int64_t stride = reverse ? -count : count;  // of the forward pass, which is walked back here
  for (int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x; n < count; n += int64_t(gridDim.x) * kThreads) {
    int64_t last = n + (reverse ? 0 : (steps - 1) * count);
    float sum = 0.0f;
    for (int64_t step = steps - 1; step >= 0; step -= kAheadBackward, last -= kAheadBackward * stride) {
      float total[kAheadBackward], gate[kAheadBackward], value[kAheadBackward], before[kAheadBackward];
#pragma unroll
      for (int u = 0; u < kAheadBackward; ++u) {
        if (step >= u) {
          total[u] = to_float(grad[last - u * stride]);
          gate[u] = to_float(f[last - u * stride]);
          value[u] = to_float(x[last - u * stride]);
          before[u] = step > u ? to_float(h[last - (u + 1) * stride]) : load_state<T>(h0, wide, n);
        }
      }
#pragma unroll
      for (int u = 0; u < kAheadBackward; ++u) {
        if (step >= u) {
          sum += total[u];
          df[last - u * stride] = from_float<T>((value[u] - before[u]) * sum);
          dx[last - u * stride] = from_float<T>(gate[u] * sum);
          sum = fmaf(-gate[u], sum, sum);
        }
      }
    }
    if (wide) {
      static_cast<float*>(dh0)[n] = sum;
    } else {
      static_cast<T*>(dh0)[n] = from_float<T>(sum);
    }
  }
}

}  // namespace
}  // namespace fastlm

#ifndef FASTLM_EMULATED
namespace fastlm {
namespace {

void check(const Tensor& f, const Tensor& x, const std::optional<Tensor>& h0) {
  STD_TORCH_CHECK(f.dim() == 3 && x.sizes().equals(f.sizes()), "f and x must have one shape [T, B, H]");
  STD_TORCH_CHECK(x.scalar_type() == f.scalar_type(), "x must have the dtype of f");
  STD_TORCH_CHECK(!h0.has_value() || h0->sizes().equals(f.sizes().slice(1)), "h0 must have shape [B, H]");
  STD_TORCH_CHECK(!h0.has_value() || h0->scalar_type() == f.scalar_type() || h0->scalar_type() == ScalarType::Float,
                  "h0 must have the dtype of f or float32");
}

bool is_wide(const std::optional<Tensor>& h0) { return h0.has_value() && h0->scalar_type() == ScalarType::Float; }

template <typename T>
void launch_forget_mult_fwd(const Tensor& f, const Tensor& x, const std::optional<Tensor>& h0, Tensor& out,
                            bool reverse) {
  const int64_t count = f.size(1) * f.size(2);
  forget_mult_fwd_kernel<T><<<grid(count, kThreads), kThreads, 0, current_stream(f)>>>(
      static_cast<const T*>(f.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()), data(h0), is_wide(h0),
      static_cast<T*>(out.mutable_data_ptr()), f.size(0), count, reverse);
}

template <typename T>
void launch_forget_mult_bwd(const Tensor& grad, const Tensor& f, const Tensor& x, const std::optional<Tensor>& h0,
                            const Tensor& h, Tensor& df, Tensor& dx, Tensor& dh0, bool reverse) {
  const int64_t count = f.size(1) * f.size(2);
  forget_mult_bwd_kernel<T><<<grid(count, kThreads), kThreads, 0, current_stream(f)>>>(
      static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(f.const_data_ptr()),
      static_cast<const T*>(x.const_data_ptr()), data(h0), is_wide(h0), static_cast<const T*>(h.const_data_ptr()),
      static_cast<T*>(df.mutable_data_ptr()), static_cast<T*>(dx.mutable_data_ptr()), dh0.mutable_data_ptr(), f.size(0),
      count, reverse);
}

Tensor fwd(const Tensor& f_, const Tensor& x_, const std::optional<Tensor>& h0_, bool reverse) {
  check(f_, x_, h0_);
  const torch::stable::accelerator::DeviceGuard guard(f_.get_device_index());
  const Tensor f = contiguous(f_), x = contiguous(x_);
  const std::optional<Tensor> h0 = contiguous(h0_);
  Tensor out = torch::stable::empty_like(f);
  if (out.numel() == 0) return out;
  FASTLM_CUDA_DISPATCH(dtype_of(f, "f"), launch_forget_mult_fwd<scalar_t>(f, x, h0, out, reverse));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& grad_, const Tensor& f_, const Tensor& x_,
                                       const std::optional<Tensor>& h0_, const Tensor& h_, bool reverse) {
  check(f_, x_, h0_);
  STD_TORCH_CHECK(grad_.sizes().equals(f_.sizes()) && h_.sizes().equals(f_.sizes()), "grad and h must be like f");
  STD_TORCH_CHECK(grad_.scalar_type() == f_.scalar_type() && h_.scalar_type() == f_.scalar_type(),
                  "grad and h must have the dtype of f");
  const torch::stable::accelerator::DeviceGuard guard(f_.get_device_index());
  const Tensor grad = contiguous(grad_), f = contiguous(f_), x = contiguous(x_), h = contiguous(h_);
  const std::optional<Tensor> h0 = contiguous(h0_);
  Tensor df = torch::stable::empty_like(f), dx = torch::stable::empty_like(f);
  Tensor dh0 = torch::stable::new_empty(h0.has_value() ? *h0 : f, {f.size(1), f.size(2)});
  if (dh0.numel() == 0) return {df, dx, dh0};
  FASTLM_CUDA_DISPATCH(dtype_of(f, "f"), launch_forget_mult_bwd<scalar_t>(grad, f, x, h0, h, df, dx, dh0, reverse));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {df, dx, dh0};
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) {
  m.impl("forget_mult_fwd", TORCH_BOX(&fastlm::fwd));
  m.impl("forget_mult_bwd", TORCH_BOX(&fastlm::bwd));
}
#endif
