// ForgetMult on the CPU: h_t = h_{t-1} + f_t (x_t - h_{t-1}) and its adjoint over [T, B, H]. A work item walks a block
// of channels through time, its running state in the caches: one pass over memory.
#include "channels.h"

namespace fastlm {

struct ForgetMultArgs {
  const void *f, *x, *h0;     // h0 null: zeros
  const void *h, *grad;       // backward only
  void *out, *df, *dx, *dh0;  // out forward only, the others backward only
  int64_t steps;
  Channels channels;
  DType dtype, state;  // of f, x, h, grad and their gradients; of h0 and dh0
  bool reverse;
};

}  // namespace fastlm

#ifdef FASTLM_ISA

namespace fastlm::FASTLM_ISA {
namespace {

template <typename T>
void forward(const ForgetMultArgs& a, int64_t begin, int64_t end) {
  const int64_t width = a.channels.count;
  alignas(64) float state[kBlock];
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t count = lesser(kBlock, end - block);
    load_state(a.h0, a.state, block, count, state);
    for (int64_t step = 0; step < a.steps; ++step) {
      const int64_t row = (a.reverse ? a.steps - 1 - step : step) * width + block;
      const T *f = static_cast<const T*>(a.f) + row, *x = static_cast<const T*>(a.x) + row;
      T* out = static_cast<T*>(a.out) + row;
      const int64_t ahead = step + 1 == a.steps ? 0 : a.reverse ? -width : width;
      for_each_vector(count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        prefetch(f + ahead + j), prefetch(x + ahead + j);
        vec h = load(state + j);
        h += load(f + j, n) * (load(x + j, n) - h);
        store(state + j, h);
        store(out + j, h, n);
      });
    }
  }
}

template <typename T>
void backward(const ForgetMultArgs& a, int64_t begin, int64_t end) {
  const int64_t width = a.channels.count, back = a.reverse ? width : -width;
  alignas(64) float start[kBlock], sum[kBlock];
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t count = lesser(kBlock, end - block);
    load_state(a.h0, a.state, block, count, start);
    load_state(nullptr, DType::f32, 0, count, sum);
    for (int64_t step = a.steps - 1; step >= 0; --step) {
      const int64_t row = (a.reverse ? a.steps - 1 - step : step) * width + block;
      const T *f = static_cast<const T*>(a.f) + row, *x = static_cast<const T*>(a.x) + row;
      const T* grad = static_cast<const T*>(a.grad) + row;
      const T* h = step > 0 ? static_cast<const T*>(a.h) + row + back : nullptr;
      T *df = static_cast<T*>(a.df) + row, *dx = static_cast<T*>(a.dx) + row;
      const int64_t ahead = step == 0 ? 0 : back;
      for_each_vector(count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        prefetch(f + ahead + j), prefetch(x + ahead + j), prefetch(grad + ahead + j);
        const vec gate = load(f + j, n), total = load(sum + j) + load(grad + j, n);
        const vec previous = h == nullptr ? load(start + j) : load(h + j, n);
        store(df + j, (load(x + j, n) - previous) * total, n);
        store(dx + j, gate * total, n);
        store(sum + j, total - gate * total);
      });
    }
    store_state(a.dh0, a.state, block, count, sum);
  }
}

}  // namespace

void forget_mult_fwd(const ForgetMultArgs& a, int64_t begin, int64_t end) {
  FASTLM_DISPATCH(a.dtype, forward<scalar_t>(a, begin, end));
}

void forget_mult_bwd(const ForgetMultArgs& a, int64_t begin, int64_t end) {
  FASTLM_DISPATCH(a.dtype, backward<scalar_t>(a, begin, end));
}

}  // namespace fastlm::FASTLM_ISA

#else
#include "common.h"

FASTLM_KERNEL(forget_mult_fwd, void, const ForgetMultArgs&, int64_t, int64_t)
FASTLM_KERNEL(forget_mult_bwd, void, const ForgetMultArgs&, int64_t, int64_t)

namespace fastlm {
namespace {

void check(const Tensor& f, const Tensor& x, const std::optional<Tensor>& h0) {
  STD_TORCH_CHECK(f.dim() == 3 && x.sizes().equals(f.sizes()), "f and x must have one shape [T, B, H]");
  STD_TORCH_CHECK(x.scalar_type() == f.scalar_type(), "x must have the dtype of f");
  STD_TORCH_CHECK(!h0.has_value() || h0->sizes().equals(f.sizes().slice(1)), "h0 must have shape [B, H]");
}

// The pointers that both directions share.
ForgetMultArgs arguments(const Tensor& f, const Tensor& x, const std::optional<Tensor>& h0, bool reverse) {
  ForgetMultArgs args{};
  args.f = f.const_data_ptr();
  args.x = x.const_data_ptr();
  args.h0 = data(h0);
  args.steps = f.size(0);
  args.channels = {f.size(1), f.size(2), f.size(1) * f.size(2)};
  args.dtype = dtype_of(f, "f");
  args.state = dtype_of(h0.has_value() ? *h0 : f, "h0");
  args.reverse = reverse;
  return args;
}

void launch(void (*kernel)(const ForgetMultArgs&, int64_t, int64_t), const ForgetMultArgs& args) {
  split_channels(args.channels, args.steps, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor fwd(const Tensor& f_, const Tensor& x_, const std::optional<Tensor>& h0_, bool reverse) {
  check(f_, x_, h0_);
  const Tensor f = contiguous(f_), x = contiguous(x_);
  const std::optional<Tensor> h0 = contiguous(h0_);
  Tensor out = torch::stable::empty_like(f);
  if (out.numel() == 0) return out;
  ForgetMultArgs args = arguments(f, x, h0, reverse);
  prefer_huge_pages(out);
  args.out = out.mutable_data_ptr();
  launch(forget_mult_fwd_kernel, args);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& grad_, const Tensor& f_, const Tensor& x_,
                                       const std::optional<Tensor>& h0_, const Tensor& h_, bool reverse) {
  check(f_, x_, h0_);
  STD_TORCH_CHECK(grad_.sizes().equals(f_.sizes()) && h_.sizes().equals(f_.sizes()), "grad and h must be like f");
  STD_TORCH_CHECK(grad_.scalar_type() == f_.scalar_type() && h_.scalar_type() == f_.scalar_type(),
                  "grad and h must have the dtype of f");
  const Tensor grad = contiguous(grad_), f = contiguous(f_), x = contiguous(x_), h = contiguous(h_);
  const std::optional<Tensor> h0 = contiguous(h0_);
  Tensor df = torch::stable::empty_like(f), dx = torch::stable::empty_like(f);
  Tensor dh0 = torch::stable::new_empty(h0.has_value() ? *h0 : f, {f.size(1), f.size(2)});
  if (dh0.numel() == 0) return {df, dx, dh0};
  ForgetMultArgs args = arguments(f, x, h0, reverse);
  args.grad = grad.const_data_ptr();
  args.h = h.const_data_ptr();
  prefer_huge_pages(df);
  prefer_huge_pages(dx);
  args.df = df.mutable_data_ptr();
  args.dx = dx.mutable_data_ptr();
  args.dh0 = dh0.mutable_data_ptr();
  launch(forget_mult_bwd_kernel, args);
  return {df, dx, dh0};
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("forget_mult_fwd", TORCH_BOX(&fastlm::fwd));
  m.impl("forget_mult_bwd", TORCH_BOX(&fastlm::bwd));
}
#endif
