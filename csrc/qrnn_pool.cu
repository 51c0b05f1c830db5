// QRNN pooling on CUDA: from pre-activations [T, B, kH] to h [T, B, H], and the adjoint, as fastlm/ops/qrnn_pool.py has
// them. The backward pass walks chunks of kEvery steps from the back and recomputes each from the state kept before it.
//
// With the three gates of "fo", (70, 20, 1550) float32 has 235 recurrences a multiprocessor and 45 KB on the way, and
// (140, 60, 2500) 1136 and 54 KB, where 22 are enough; backward a chunk, 128 bytes a recurrence. At 4.3 TB/s and 1.75
// GHz a multiprocessor has time for 55 instructions for a bfloat16 element, 6.9 of them exponentials or quotients: the
// kernel has 45 and 5, because two gates share a quotient. Backward there is time for 97 and 12, and it has 75 and 6.
#include "packs.cuh"
#include "philox.h"
#include "ptx.h"

namespace fastlm {
namespace {

constexpr int kMostForward = 4, kMostBackward = 2;  // channels a thread; four backward would leave few threads
constexpr int kEvery = 8;  // steps from one kept state to the next; fastlm/ops/qrnn_pool.py has the same

template <typename T>
struct QrnnPool {
  const T *gates, *dh;  // dh: backward only, null: zeros
  T *h, *dgates;
  const void *c0, *dc_n;  // null: zeros
  void* c_n;
  float *kept, *dc0;    // kept: written forward unless null, read backward
  const int64_t* seed;  // null: no mask
  int64_t steps, batch, hidden;
  uint32_t last_dropped;  // of the lanes of the mask
  float scale;            // of the write gate where it is kept
  bool wide, reverse;     // wide: c0, c_n and dc_n are float32
};

constexpr float kLog2E = 1.44269504f;

__device__ __forceinline__ float sigmoid(float x) { return ptx::reciprocal(1.0f + ptx::exp2(-kLog2E * x)); }

// tanh(x) / x where the quotient of exponentials would cancel, |x| < 0.55, with a relative error of 3e-7.
__device__ __forceinline__ float tanh_ratio(float x) {
  const float s = x * x;
  const float high = fmaf(s, fmaf(s, -0.00627260751f, 0.0210702536f), -0.0538518654f);
  return fmaf(s, fmaf(s, fmaf(s, high, 0.133325804f), -0.333333173f), 1.0f);
}

__device__ __forceinline__ float tanh(float x) {
  const float e = ptx::exp2(-2.0f * kLog2E * fabsf(x)), near = x * tanh_ratio(x);
  const float far = copysignf((1.0f - e) * ptx::reciprocal(1.0f + e), x);
  return fabsf(x) < 0.55f ? near : far;
}

// gate = factor sigmoid(x), and the product of it and tanh(y): e^-x may be infinite, e^-|2y| is at most 1.
__device__ __forceinline__ float gate_and_product(float x, float y, float factor, float& gate) {
  const float e = ptx::exp2(-2.0f * kLog2E * fabsf(y)), below = (1.0f + ptx::exp2(-kLog2E * x)) * (1.0f + e);
  const float quotient = factor * ptx::reciprocal(below);
  gate = quotient * (1.0f + e);
  const float near = gate * (y * tanh_ratio(y)), far = copysignf(quotient * (1.0f - e), y);
  return fabsf(y) < 0.55f ? near : far;
}

// Whether zoneout keeps a channel: bit u V + v for step u of the U whose elements begin at `first`, `stride` apart.
template <int V, int U>
__device__ __forceinline__ uint32_t draw(uint64_t key, uint32_t last_dropped, int64_t first, int64_t stride) {
  uint32_t bits = 0;
#pragma unroll 2
  for (int u = 0; u < U; ++u, first += stride) {
    const Philox x = philox_block(key, uint64_t(first) >> 2, kZoneoutStream);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      uint32_t lane = x.lane[v];
      if (V == 2) lane = first & 2 ? x.lane[2 + v] : lane;
      if (V == 1) lane = first & 2 ? (first & 1 ? x.lane[3] : x.lane[2]) : (first & 1 ? x.lane[1] : lane);
      bits |= uint32_t(lane > last_dropped) << (u * V + v);
    }
  }
  return bits;
}

// Where a thread is: its channels, and how far it is from one step to the next, in rows of H.
struct Place {
  int64_t b, j, n, row, stride;  // n: of all channels; row: of step 0

  template <typename T>
  __device__ Place(const QrnnPool<T>& a, int64_t b, int64_t j)
      : b(b),
        j(j),
        n(b * a.hidden + j),
        row(b + (a.reverse ? (a.steps - 1) * a.batch : 0)),
        stride(a.reverse ? -a.batch : a.batch) {}

  __device__ int64_t at(int64_t step, int64_t hidden) const { return (row + step * stride) * hidden + j; }
};

template <typename T, int kGates, int V>
struct ForwardGroup {
  Pack<T, V> gate[kAhead<V>][kGates][kThreads];
};

template <typename T, int kGates, int V>
struct BackwardGroup {
  Pack<float, V> kept[kThreads];
  Pack<T, V> gate[kEvery][kGates][kThreads], dh[kEvery][kThreads];
};

// `left` steps are still there, or with kAll enough; moves `at` on to the next group.
template <bool kAll, typename T, int kGates, int V>
__device__ __forceinline__ void fetch_group(int64_t left, int64_t hidden, int64_t stride, const T*& at,
                                            ForwardGroup<T, kGates, V>& group) {
#pragma unroll
  for (int u = 0; u < kAhead<V>; ++u, at += stride * kGates) {
    if (!kAll && u >= left) break;
#pragma unroll
    for (int k = 0; k < kGates; ++k) fetch(group.gate[u][k][threadIdx.x], at + k * hidden);
  }
}

template <bool kAll, typename T, int kGates, int V>
__device__ __forceinline__ void forward(const QrnnPool<T>& a, uint64_t key, int64_t left, int64_t stride,
                                        const ForwardGroup<T, kGates, V>& group, float (&c)[V], T*& h) {
  const uint32_t bits = a.seed != nullptr ? draw<V, kAhead<V>>(key, a.last_dropped, h - a.h, stride) : ~0u;
#pragma unroll
  for (int u = 0; u < kAhead<V>; ++u, h += stride) {
    if (!kAll && u >= left) break;
    const auto& gate = group.gate[u];
    float out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const auto value = [&](int k) { return gate[k][threadIdx.x][v]; };
      const float factor = bits & 1u << (u * V + v) ? a.scale : 0.0f;
      float write, written, input;
      if constexpr (kGates == 4) {
        write = factor * sigmoid(value(1));
        written = gate_and_product(value(3), value(0), 1.0f, input);
      } else {
        written = gate_and_product(value(1), value(0), factor, write);
      }
      c[v] = fmaf(-write, c[v], c[v]) + written;
      if constexpr (kGates == 2) {
        out[v] = c[v];
      } else {
        out[v] = sigmoid(value(2)) * c[v];
      }
    }
    store_pack<V>(h, out);
  }
}

template <typename T, int kGates, int V>
__global__ void __launch_bounds__(kThreads) qrnn_pool_fwd_kernel(const __grid_constant__ QrnnPool<T> a) {
  auto* groups = reinterpret_cast<ForwardGroup<T, kGates, V>*>(ptx::shared_memory());
  const int64_t j = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (j >= a.hidden) return;
  const uint64_t key = a.seed != nullptr ? uint64_t(*a.seed) : 0;
  for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
    const Place place(a, b, j);
    const int64_t stride = place.stride * a.hidden;
    const T* next = a.gates + place.at(0, kGates * a.hidden);
    T* h = a.h + place.at(0, a.hidden);
    float c[V];
    load_state<T>(a.c0, a.wide, place.n, c);
    pipeline<kGroups<T, V>>((a.steps + kAhead<V> - 1) / kAhead<V>,
                            [&](int slot, int64_t group) {
                              const int64_t left = a.steps - group * kAhead<V>;
                              if (left >= kAhead<V>) {
                                fetch_group<true>(left, a.hidden, stride, next, groups[slot]);
                              } else {
                                fetch_group<false>(left, a.hidden, stride, next, groups[slot]);
                              }
                            },
                            [&](int slot, int64_t group) {
                              const int64_t step = group * kAhead<V>, left = a.steps - step;
                              if (a.kept != nullptr && step % kEvery == 0) {
                                store_pack<V>(a.kept + step / kEvery * a.batch * a.hidden + place.n, c);
                              }
                              if (left >= kAhead<V>) {
                                forward<true>(a, key, left, stride, groups[slot], c, h);
                              } else {
                                forward<false>(a, key, left, stride, groups[slot], c, h);
                              }
                            });
    store_state<T>(a.c_n, a.wide, place.n, c);
  }
}

template <bool kAll, typename T, int kGates, int V>
__device__ __forceinline__ void fetch_group(const QrnnPool<T>& a, const Place& place, int64_t step,
                                            BackwardGroup<T, kGates, V>& group) {
  const int64_t left = a.steps - step, stride = place.stride * a.hidden;
  int64_t row = place.at(step, a.hidden);
  const T* gates = a.gates + place.at(step, kGates * a.hidden);
  fetch(group.kept[threadIdx.x], a.kept + step / kEvery * a.batch * a.hidden + place.n);
#pragma unroll
  for (int u = 0; u < kEvery; ++u, gates += stride * kGates, row += stride) {
    if (!kAll && u >= left) break;
#pragma unroll
    for (int k = 0; k < kGates; ++k) fetch(group.gate[u][k][threadIdx.x], gates + k * a.hidden);
    if (a.dh != nullptr) fetch(group.dh[u][threadIdx.x], a.dh + row);
  }
}

template <bool kAll, typename T, int kGates, int V>
__device__ __forceinline__ void backward(const QrnnPool<T>& a, const Place& place, uint64_t key, int64_t step,
                                         const BackwardGroup<T, kGates, V>& group, float (&r)[V]) {
  const int64_t left = a.steps - step, stride = place.stride * a.hidden;
  uint32_t bits = ~0u;
  if (a.seed != nullptr) bits = draw<V, kEvery>(key, a.last_dropped, place.at(step, a.hidden), stride);
  const auto value = [&](int u, int k, int v) { return group.gate[u][k][threadIdx.x][v]; };
  float z[kEvery][V], f[kEvery][V], i[kGates == 4 ? kEvery : 1][V], c[kEvery + 1][V];
#pragma unroll
  for (int v = 0; v < V; ++v) c[0][v] = group.kept[threadIdx.x][v];
#pragma unroll
  for (int u = 0; u < kEvery; ++u) {
    if (!kAll && u >= left) break;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float gate = sigmoid(value(u, 1, v));
      z[u][v] = tanh(value(u, 0, v));
      f[u][v] = bits & 1u << (u * V + v) ? gate : 0.0f;  // which is right in all that follows
      float input = a.scale * f[u][v];
      if constexpr (kGates == 4) input = i[u][v] = sigmoid(value(u, 3, v));
      c[u + 1][v] = fmaf(-a.scale * f[u][v], c[u][v], c[u][v]) + input * z[u][v];
    }
  }
  T* out = a.dgates + place.at(step, kGates * a.hidden) + (kEvery - 1) * stride * kGates;
#pragma unroll
  for (int u = kEvery - 1; u >= 0; --u, out -= stride * kGates) {
    if (!kAll && u >= left) continue;
    float d[kGates][V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float write = a.scale * f[u][v], before = c[u][v];
      float total = a.dh != nullptr ? group.dh[u][threadIdx.x][v] : 0.0f;
      if constexpr (kGates > 2) {
        const float o = sigmoid(value(u, 2, v)), through = total * o;
        d[2][v] = through * (1.0f - o) * c[u + 1][v];
        total = through;
      }
      r[v] += total;
      if constexpr (kGates == 4) {
        d[0][v] = r[v] * i[u][v] * fmaf(-z[u][v], z[u][v], 1.0f);
        d[1][v] = -r[v] * before * (write * (1.0f - f[u][v]));
        d[3][v] = r[v] * z[u][v] * (i[u][v] * (1.0f - i[u][v]));
      } else {
        d[0][v] = r[v] * write * fmaf(-z[u][v], z[u][v], 1.0f);
        d[1][v] = r[v] * (z[u][v] - before) * (write * (1.0f - f[u][v]));
      }
      r[v] = fmaf(-write, r[v], r[v]);
    }
#pragma unroll
    for (int k = 0; k < kGates; ++k) store_pack<V>(out + k * a.hidden, d[k]);
  }
}

template <typename T, int kGates, int V>
__global__ void __launch_bounds__(kThreads) qrnn_pool_bwd_kernel(const __grid_constant__ QrnnPool<T> a) {
  auto* groups = reinterpret_cast<BackwardGroup<T, kGates, V>*>(ptx::shared_memory());
  const int64_t j = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (j >= a.hidden) return;
  const uint64_t key = a.seed != nullptr ? uint64_t(*a.seed) : 0;
  for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
    const Place place(a, b, j);
    float r[V];
    load_state<T>(a.dc_n, a.wide, place.n, r);
    const int64_t chunks = (a.steps + kEvery - 1) / kEvery;
    pipeline<2>(
        chunks,
        [&](int slot, int64_t back) {
          const int64_t step = (chunks - 1 - back) * kEvery;
          if (step + kEvery <= a.steps) {
            fetch_group<true>(a, place, step, groups[slot]);
          } else {
            fetch_group<false>(a, place, step, groups[slot]);
          }
        },
        [&](int slot, int64_t back) {
          const int64_t step = (chunks - 1 - back) * kEvery;
          if (step + kEvery <= a.steps) {
            backward<true>(a, place, key, step, groups[slot], r);
          } else {
            backward<false>(a, place, key, step, groups[slot], r);
          }
        });
    store_pack<V>(a.dc0 + place.n, r);
  }
}

// Calls start(kernel, blocks, bytes of shared memory); `busy` blocks are wanted.
template <typename T, int kGates, int V, typename Start>
void launch(const QrnnPool<T>& a, bool forward, Start start) {
  constexpr int64_t kWidth = kThreads * V;
  const dim3 blocks(unsigned((a.hidden + kWidth - 1) / kWidth), unsigned(a.batch < 65535 ? a.batch : 65535));
  if (forward) {
    start(qrnn_pool_fwd_kernel<T, kGates, V>, blocks, kGroups<T, V> * sizeof(ForwardGroup<T, kGates, V>));
  } else if constexpr (V <= kMostBackward) {
    start(qrnn_pool_bwd_kernel<T, kGates, V>, blocks, 2 * sizeof(BackwardGroup<T, kGates, V>));
  }
}

template <typename T, int kGates, typename Start>
void launch(const QrnnPool<T>& a, bool forward, int64_t busy, Start start) {
  // A block of the mask generator serves four neighbours, which is worth more than a busy GPU.
  int channels = neighbours(a.hidden, forward ? kMostForward : kMostBackward,
                            {element(a.gates), element(a.dh), element(a.h), element(a.dgates), element(a.kept)});
  if (a.seed == nullptr) channels = fewer<T>(channels, a.batch, a.hidden, busy);
  if (channels == 4) {
    launch<T, kGates, 4>(a, forward, start);
  } else if (channels == 2) {
    launch<T, kGates, 2>(a, forward, start);
  } else {
    launch<T, kGates, 1>(a, forward, start);
  }
}

template <typename T, typename Start>
void launch(const QrnnPool<T>& a, int gates, bool forward, int64_t busy, Start start) {
  if (gates == 2) {
    launch<T, 2>(a, forward, busy, start);
  } else if (gates == 3) {
    launch<T, 3>(a, forward, busy, start);
  } else {
    launch<T, 4>(a, forward, busy, start);
  }
}

// A threshold of 0 keeps all, as no mask does.
template <typename T>
void set_zoneout(QrnnPool<T>& a, const int64_t* seed, double zoneout) {
  const uint64_t threshold = philox_threshold(zoneout);
  a.seed = threshold > 0 ? seed : nullptr;
  a.last_dropped = uint32_t(threshold - 1);
  a.scale = seed != nullptr ? 1.0f : float(1.0 - zoneout);
}

}  // namespace
}  // namespace fastlm

#ifndef FASTLM_EMULATED
#include <string>

namespace fastlm {
namespace {

int gates_of(const std::string& pooling) {
  const int gates = pooling == "f" ? 2 : pooling == "fo" ? 3 : pooling == "ifo" ? 4 : 0;
  STD_TORCH_CHECK(gates != 0, "pooling must be f, fo or ifo, got ", pooling);
  return gates;
}

void check(const Tensor& gates, int count, const std::optional<Tensor>& state, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(gates.dim() == 3 && gates.size(2) % count == 0, "gates must have shape [T, B, k H]");
  STD_TORCH_CHECK(!state.has_value() ||
                      (state->dim() == 2 && state->size(0) == gates.size(1) && state->size(1) == gates.size(2) / count),
                  "the state must have shape [B, H]");
  STD_TORCH_CHECK(
      !state.has_value() || state->scalar_type() == gates.scalar_type() || state->scalar_type() == ScalarType::Float,
      "the state must have the dtype of gates or float32");
  STD_TORCH_CHECK(!seed.has_value() || (seed->numel() == 1 && seed->scalar_type() == ScalarType::Long),
                  "seed must be an int64 scalar tensor");
}

// What both directions share.
template <typename T>
QrnnPool<T> arguments(const Tensor& gates, int count, const std::optional<Tensor>& state,
                      const std::optional<Tensor>& seed, double zoneout, bool reverse) {
  QrnnPool<T> a{};
  a.gates = static_cast<const T*>(gates.const_data_ptr());
  a.steps = gates.size(0), a.batch = gates.size(1), a.hidden = gates.size(2) / count;
  set_zoneout(a, static_cast<const int64_t*>(data(seed)), zoneout);
  a.wide = state.has_value() && state->scalar_type() == ScalarType::Float;
  a.reverse = reverse;
  return a;
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& gates_, const std::optional<Tensor>& c0_,
                                       const std::optional<Tensor>& seed, const std::string& pooling, double zoneout,
                                       bool reverse, bool keep) {
  const int count = gates_of(pooling);
  check(gates_, count, c0_, seed);
  const torch::stable::accelerator::DeviceGuard guard(gates_.get_device_index());
  const Tensor gates = contiguous(gates_);
  const std::optional<Tensor> c0 = contiguous(c0_);
  const int64_t steps = gates.size(0), batch = gates.size(1), hidden = gates.size(2) / count;
  Tensor h = torch::stable::new_empty(gates, {steps, batch, hidden});
  Tensor c_n = torch::stable::new_empty(c0.has_value() ? *c0 : gates, {batch, hidden});
  const int64_t chunks = keep ? (steps + kEvery - 1) / kEvery : 0;
  Tensor kept = torch::stable::new_empty(gates, {chunks, batch, hidden}, ScalarType::Float);
  if (c_n.numel() == 0) return {h, c_n, kept};
  FASTLM_CUDA_DISPATCH(dtype_of(gates, "gates"), {
    QrnnPool<scalar_t> a = arguments<scalar_t>(gates, count, c0, seed, zoneout, reverse);
    a.c0 = data(c0);
    a.h = static_cast<scalar_t*>(h.mutable_data_ptr());
    a.c_n = c_n.mutable_data_ptr();
    a.kept = keep ? static_cast<float*>(kept.mutable_data_ptr()) : nullptr;
    launch(a, count, true, kBusy, [&](auto kernel, dim3 blocks, size_t shared) {
      kernel<<<blocks, kThreads, shared, current_stream(gates)>>>(a);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {h, c_n, kept};
}

std::tuple<Tensor, Tensor> bwd(const std::optional<Tensor>& dh_, const std::optional<Tensor>& dc_n_,
                               const Tensor& gates_, const Tensor& kept_, const std::optional<Tensor>& seed,
                               const std::string& pooling, double zoneout, bool reverse) {
  const int count = gates_of(pooling);
  check(gates_, count, dc_n_, seed);
  const torch::stable::accelerator::DeviceGuard guard(gates_.get_device_index());
  const Tensor gates = contiguous(gates_), kept = contiguous(kept_);
  const std::optional<Tensor> dh = contiguous(dh_), dc_n = contiguous(dc_n_);
  const int64_t steps = gates.size(0), batch = gates.size(1), hidden = gates.size(2) / count;
  STD_TORCH_CHECK(kept.dim() == 3 && kept.size(0) == (steps + kEvery - 1) / kEvery && kept.size(1) == batch &&
                      kept.size(2) == hidden && kept.scalar_type() == ScalarType::Float,
                  "kept must be what qrnn_pool_fwd(keep=True) returned");
  STD_TORCH_CHECK(
      !dh.has_value() || (dh->numel() == steps * batch * hidden && dh->scalar_type() == gates.scalar_type()),
      "dh must have shape [T, B, H] and the dtype of gates");
  Tensor dgates = torch::stable::empty_like(gates);
  Tensor dc0 = torch::stable::new_empty(kept, {batch, hidden});
  if (dc0.numel() == 0) return {dgates, dc0};
  FASTLM_CUDA_DISPATCH(dtype_of(gates, "gates"), {
    QrnnPool<scalar_t> a = arguments<scalar_t>(gates, count, dc_n, seed, zoneout, reverse);
    a.dh = static_cast<const scalar_t*>(data(dh));
    a.dc_n = data(dc_n);
    a.kept = static_cast<float*>(const_cast<void*>(kept.const_data_ptr()));  // read only in this direction
    a.dgates = static_cast<scalar_t*>(dgates.mutable_data_ptr());
    a.dc0 = static_cast<float*>(dc0.mutable_data_ptr());
    launch(a, count, false, kBusy, [&](auto kernel, dim3 blocks, size_t shared) {
      kernel<<<blocks, kThreads, shared, current_stream(gates)>>>(a);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {dgates, dc0};
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) {
  m.impl("qrnn_pool_fwd", TORCH_BOX(&fastlm::fwd));
  m.impl("qrnn_pool_bwd", TORCH_BOX(&fastlm::bwd));
}
#endif
