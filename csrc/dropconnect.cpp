// DropConnect on the CPU: y = w keep / (1 - p), and the mask alone. One work item is a run of elements of
// whole Philox blocks, so that a mask does not depend on how the work is split.
#include "dtype.h"
#include "philox.h"

namespace fastlm {

struct DropconnectArgs {
  const void* weight;
  void* out;
  int64_t count;
  double p;
  uint64_t seed;
  uint32_t stream;
  DType dtype;
};

constexpr int64_t kDropconnectRun = 4096;  // elements of one work item

}  // namespace fastlm

#ifdef FASTLM_ISA
#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

// What keeps a lane, in 32 bits: it is above `last`, or nothing is dropped. The threshold itself may be 2^32.
struct Keep {
  uint32_t last;
  int32_t all;

  explicit Keep(uint64_t threshold) : last(uint32_t(threshold - 1)), all(threshold == 0 ? -1 : 0) {}
};

template <typename T>
void run(const DropconnectArgs& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  T* out = static_cast<T*>(a.out);
  const Keep keep(philox_threshold(a.p));
  const vec scale = splat(philox_scale(a.p));
  alignas(64) uint32_t lanes[kDraw];
  for (int64_t e = begin; e < end; e += kDraw) {
    draw_lanes(a.seed, uint64_t(e), a.stream, lanes);
    for_each_vector(lesser(kDraw, end - e), [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      uvec lane;
      std::memcpy(&lane, lanes + i, sizeof lane);
      const ivec kept = (ivec)(lane > keep.last) | keep.all;
      store(out + e + i, select(kept, load(weight + e + i, n) * scale, vec{}), n);
    });
  }
}

}  // namespace

void dropconnect_fwd(const DropconnectArgs& a, int64_t begin, int64_t end) {
  FASTLM_DISPATCH(a.dtype, run<scalar_t>(a, begin, end));
}

void dropconnect_mask(const DropconnectArgs& a, int64_t begin, int64_t end) {
  bool* out = static_cast<bool*>(a.out);
  const Keep keep(philox_threshold(a.p));
  uint32_t lanes[kDraw];
  for (int64_t e = begin; e < end; e += kDraw) {
    draw_lanes(a.seed, uint64_t(e), a.stream, lanes);
    const int64_t count = lesser(kDraw, end - e);
    for (int64_t i = 0; i < count; ++i) out[e + i] = (lanes[i] > keep.last) | (keep.all != 0);
  }
}

}  // namespace fastlm::FASTLM_ISA

#else
#include "common.h"

FASTLM_KERNEL(dropconnect_fwd, void, const DropconnectArgs&, int64_t, int64_t)
FASTLM_KERNEL(dropconnect_mask, void, const DropconnectArgs&, int64_t, int64_t)

namespace fastlm {
namespace {

void launch(void (*kernel)(const DropconnectArgs&, int64_t, int64_t), const DropconnectArgs& args) {
  const int64_t runs = (args.count + kDropconnectRun - 1) / kDropconnectRun;
  torch::stable::parallel_for(0, runs, 8, [&](int64_t begin, int64_t end) {
    kernel(args, begin * kDropconnectRun, end == runs ? args.count : end * kDropconnectRun);
  });
}

Tensor fwd(const Tensor& weight_, double p, const Tensor& seed) {
  const Tensor weight = contiguous(weight_);
  Tensor out = torch::stable::empty_like(weight);
  if (weight.numel() == 0) return out;
  const DropconnectArgs args{weight.const_data_ptr(), out.mutable_data_ptr(),    weight.numel(), p, read_seed(seed),
                             kWeightStream,           dtype_of(weight, "weight")};
  launch(dropconnect_fwd_kernel, args);
  return out;
}

Tensor mask(const Tensor& seed, int64_t count, double p, int64_t stream) {
  Tensor out = torch::stable::new_empty(seed, {count}, ScalarType::Bool);
  if (count == 0) return out;
  const DropconnectArgs args{nullptr, out.mutable_data_ptr(), count, p, read_seed(seed), uint32_t(stream), DType::f32};
  launch(dropconnect_mask_kernel, args);
  return out;
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("dropconnect_fwd", TORCH_BOX(&fastlm::fwd));
  m.impl("dropconnect_mask", TORCH_BOX(&fastlm::mask));
}
#endif
