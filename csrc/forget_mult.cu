// ForgetMult on CUDA: h_t = h_{t-1} + f_t (x_t - h_{t-1}) and its adjoint over [T, B, H].
#include "packs.cuh"

namespace fastlm {
namespace {

template <typename T>
struct ForgetMult {
  const T *f, *x, *grad, *h;  // grad and h: backward only
  const void* h0;             // null: zeros
  T *out, *df, *dx;           // out: forward only, df and dx: backward only
  void* dh0;                  // backward only
  int64_t steps, count;
  bool wide, reverse;  // wide: h0 and dh0 are float32
};

template <typename T, int V, int kArrays>
struct Group {
  Pack<T, V> array[kAhead<V>][kArrays][kThreads];
};

template <bool kAll, typename T, int V>
__device__ __forceinline__ void fetch_group(const ForgetMult<T>& a, int64_t at, int64_t left, int64_t stride,
                                            Group<T, V, 2>& group) {
#pragma unroll
  for (int u = 0; u < kAhead<V>; ++u, at += stride) {
    if (!kAll && u >= left) break;
    fetch(group.array[u][0][threadIdx.x], a.f + at);
    fetch(group.array[u][1][threadIdx.x], a.x + at);
  }
}

template <bool kAll, typename T, int V>
__device__ __forceinline__ void forward(T* out, int64_t left, int64_t stride, const Group<T, V, 2>& group,
                                        float (&h)[V]) {
#pragma unroll
  for (int u = 0; u < kAhead<V>; ++u, out += stride) {
    if (!kAll && u >= left) break;
    const auto& array = group.array[u];
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] = fmaf(array[0][threadIdx.x][v], array[1][threadIdx.x][v] - h[v], h[v]);
    store_pack<V>(out, h);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) forget_mult_fwd_kernel(const __grid_constant__ ForgetMult<T> a) {
  auto* groups = reinterpret_cast<Group<T, V, 2>*>(ptx::shared_memory());
  const int64_t stride = a.reverse ? -a.count : a.count, first = a.reverse ? (a.steps - 1) * a.count : 0;
  const int64_t all = int64_t(gridDim.x) * kThreads * V;
  for (int64_t n = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V; n < a.count; n += all) {
    float h[V];
    load_state<T>(a.h0, a.wide, n, h);
    pipeline<kGroups<T, V>>(
        (a.steps + kAhead<V> - 1) / kAhead<V>,
        [&](int slot, int64_t group) {
          const int64_t step = group * kAhead<V>, left = a.steps - step, at = n + first + step * stride;
          if (left >= kAhead<V>) {
            fetch_group<true>(a, at, left, stride, groups[slot]);
          } else {
            fetch_group<false>(a, at, left, stride, groups[slot]);
          }
        },
        [&](int slot, int64_t group) {
          const int64_t step = group * kAhead<V>, left = a.steps - step, at = n + first + step * stride;
          if (left >= kAhead<V>) {
            forward<true>(a.out + at, left, stride, groups[slot], h);
          } else {
            forward<false>(a.out + at, left, stride, groups[slot], h);
          }
        });
  }
}

// `left` steps to the first one; `at` is the first element of the group, `stride` that of the forward pass.
template <bool kAll, typename T, int V>
__device__ __forceinline__ void fetch_group(const ForgetMult<T>& a, int64_t at, int64_t left, int64_t stride,
                                            Group<T, V, 4>& group) {
#pragma unroll
  for (int u = 0; u < kAhead<V>; ++u, at -= stride) {
    if (!kAll && u >= left) break;
    fetch(group.array[u][0][threadIdx.x], a.f + at);
    fetch(group.array[u][1][threadIdx.x], a.x + at);
    fetch(group.array[u][2][threadIdx.x], a.grad + at);
    if (u + 1 < left) fetch(group.array[u][3][threadIdx.x], a.h + at - stride);
  }
}

template <bool kAll, typename T, int V>
__device__ __forceinline__ void backward(const ForgetMult<T>& a, int64_t at, int64_t left, int64_t stride,
                                         const Group<T, V, 4>& group, const float (&h0)[V], float (&r)[V]) {
#pragma unroll
  for (int u = 0; u < kAhead<V>; ++u, at -= stride) {
    if (!kAll && u >= left) break;
    const auto& array = group.array[u];
    float df[V], dx[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float gate = array[0][threadIdx.x][v];
      const float before = u + 1 < left ? array[3][threadIdx.x][v] : h0[v];
      r[v] += array[2][threadIdx.x][v];
      df[v] = (array[1][threadIdx.x][v] - before) * r[v];
      dx[v] = gate * r[v];
      r[v] = fmaf(-gate, r[v], r[v]);
    }
    store_pack<V>(a.df + at, df);
    store_pack<V>(a.dx + at, dx);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) forget_mult_bwd_kernel(const __grid_constant__ ForgetMult<T> a) {
  auto* groups = reinterpret_cast<Group<T, V, 4>*>(ptx::shared_memory());
  const int64_t stride = a.reverse ? -a.count : a.count, last = a.reverse ? 0 : (a.steps - 1) * a.count;
  const int64_t all = int64_t(gridDim.x) * kThreads * V;
  for (int64_t n = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V; n < a.count; n += all) {
    float h0[V], r[V] = {};
    load_state<T>(a.h0, a.wide, n, h0);
    pipeline<kGroups<T, V>>(
        (a.steps + kAhead<V> - 1) / kAhead<V>,
        [&](int slot, int64_t group) {
          const int64_t step = group * kAhead<V>, left = a.steps - step, at = n + last - step * stride;
          if (left > kAhead<V>) {
            fetch_group<true>(a, at, kAhead<V> + 1, stride, groups[slot]);
          } else {
            fetch_group<false>(a, at, left, stride, groups[slot]);
          }
        },
        [&](int slot, int64_t group) {
          const int64_t step = group * kAhead<V>, left = a.steps - step, at = n + last - step * stride;
          if (left > kAhead<V>) {
            backward<true>(a, at, kAhead<V> + 1, stride, groups[slot], h0, r);
          } else {
            backward<false>(a, at, left, stride, groups[slot], h0, r);
          }
        });
    store_state<T>(a.dh0, a.wide, n, r);
  }
}

// Calls start(kernel, blocks, bytes of shared memory); `busy` blocks are wanted.
template <typename T, int V, typename Start>
void launch(const ForgetMult<T>& a, bool forward, Start start) {
  const dim3 blocks(grid(a.count, kThreads * V));
  if (forward) {
    start(forget_mult_fwd_kernel<T, V>, blocks, kGroups<T, V> * sizeof(Group<T, V, 2>));
  } else {
    start(forget_mult_bwd_kernel<T, V>, blocks, kGroups<T, V> * sizeof(Group<T, V, 4>));
  }
}

template <typename T, typename Start>
void launch(const ForgetMult<T>& a, bool forward, int64_t busy, Start start) {
  const int most = neighbours(
      a.count, 4,
      {element(a.f), element(a.x), element(a.grad), element(a.h), element(a.out), element(a.df), element(a.dx)});
  const int channels = fewer<T>(most, 1, a.count, busy);
  if (channels == 4) {
    launch<T, 4>(a, forward, start);
  } else if (channels == 2) {
    launch<T, 2>(a, forward, start);
  } else {
    launch<T, 1>(a, forward, start);
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

// What both directions share.
template <typename T>
ForgetMult<T> arguments(const Tensor& f, const Tensor& x, const std::optional<Tensor>& h0, bool reverse) {
  ForgetMult<T> a{};
  a.f = static_cast<const T*>(f.const_data_ptr()), a.x = static_cast<const T*>(x.const_data_ptr());
  a.h0 = data(h0), a.wide = h0.has_value() && h0->scalar_type() == ScalarType::Float;
  a.steps = f.size(0), a.count = f.size(1) * f.size(2), a.reverse = reverse;
  return a;
}

Tensor fwd(const Tensor& f_, const Tensor& x_, const std::optional<Tensor>& h0_, bool reverse) {
  check(f_, x_, h0_);
  const torch::stable::accelerator::DeviceGuard guard(f_.get_device_index());
  const Tensor f = contiguous(f_), x = contiguous(x_);
  const std::optional<Tensor> h0 = contiguous(h0_);
  Tensor out = torch::stable::empty_like(f);
  if (out.numel() == 0) return out;
  FASTLM_CUDA_DISPATCH(dtype_of(f, "f"), {
    ForgetMult<scalar_t> a = arguments<scalar_t>(f, x, h0, reverse);
    a.out = static_cast<scalar_t*>(out.mutable_data_ptr());
    launch(a, true, kBusy, [&](auto kernel, dim3 blocks, size_t shared) {
      kernel<<<blocks, kThreads, shared, current_stream(f)>>>(a);
    });
  });
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
  FASTLM_CUDA_DISPATCH(dtype_of(f, "f"), {
    ForgetMult<scalar_t> a = arguments<scalar_t>(f, x, h0, reverse);
    a.grad = static_cast<const scalar_t*>(grad.const_data_ptr());
    a.h = static_cast<const scalar_t*>(h.const_data_ptr());
    a.df = static_cast<scalar_t*>(df.mutable_data_ptr()), a.dx = static_cast<scalar_t*>(dx.mutable_data_ptr());
    a.dh0 = dh0.mutable_data_ptr();
    launch(a, false, kBusy, [&](auto kernel, dim3 blocks, size_t shared) {
      kernel<<<blocks, kThreads, shared, current_stream(f)>>>(a);
    });
  });
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
