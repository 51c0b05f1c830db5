// Cross entropy of rows of float32 logits on the CPU: each row gives its loss and, if asked, becomes the gradient of
// scale times it, in place. One work item is a row; the GEMMs around it are the vendor's
// (fastlm/ops/linear_cross_entropy.py).
#include "dtype.h"

namespace fastlm {

struct LinearCrossEntropyArgs {
  float* logits;          // [rows, classes]
  const int64_t* target;  // [rows]
  const float* scale;     // [rows], or null for 1
  float* loss;            // [rows]
  int64_t classes, ignore_index;
  float label_smoothing;
  bool gradient;
};

}  // namespace fastlm

#ifdef FASTLM_ISA
#include <math.h>

#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kRun = 128 * kWidth;  // float32 lanes add up one run, a double the runs: any vocabulary stays exact

FASTLM_INLINE float row_max(const float* z, int64_t n) {
  vec top = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) top = max(load(z + i), top);
  float m = max(top);
  for (; i < n; ++i) m = z[i] > m ? z[i] : m;
  return m;
}

// Sum of exp(z - shift) of one run; keeps the terms in place of z if asked.
template <bool keep>
FASTLM_INLINE float exp_sum(float* z, int64_t n, float shift) {
  vec total = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const vec e = exp(load(z + i) - shift);
    if (keep) store(z + i, e);
    total += e;
  }
  if (i < n) {
    const vec e = exp(load(z + i, n - i) - shift);
    if (keep) store(z + i, e, n - i);
    total += select(lane_index() < isplat(int32_t(n - i)), e, vec{});
  }
  return sum(total);
}

FASTLM_INLINE double plain_sum(const float* z, int64_t n) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = lesser(begin + kRun, n);
    vec lanes = {};
    for (int64_t i = begin; i < end; i += kWidth) lanes += load(z + i, end - i);
    total += sum(lanes);
  }
  return total;
}

FASTLM_INLINE void scale_row(float* z, int64_t n, float factor, float offset) {
  for (int64_t i = 0; i < n; i += kWidth) store(z + i, load(z + i, n - i) * factor - offset, n - i);
}

}  // namespace

void linear_cross_entropy_rows(const LinearCrossEntropyArgs& a, int64_t begin, int64_t end) {
  const float smoothing = a.label_smoothing;
  for (int64_t row = begin; row < end; ++row) {
    float* z = a.logits + row * a.classes;
    const int64_t target = a.target[row], n = a.classes;
    if (target == a.ignore_index) {
      a.loss[row] = 0.0f;
      if (a.gradient) memset(z, 0, n * sizeof(float));
      continue;
    }
    const float top = row_max(z, n), at_target = z[target];
    const double mean = smoothing != 0.0f ? plain_sum(z, n) / double(n) : 0.0;
    double total = 0.0;
    for (int64_t i = 0; i < n; i += kRun)
      total +=
          a.gradient ? exp_sum<true>(z + i, lesser(kRun, n - i), top) : exp_sum<false>(z + i, lesser(kRun, n - i), top);
    a.loss[row] = float(::log(total) + double(top) - (1.0 - smoothing) * at_target - smoothing * mean);
    if (!a.gradient) continue;
    const float scale = a.scale == nullptr ? 1.0f : a.scale[row], share = smoothing / float(n);
    const float target_gradient = scale * (float(z[target] / total) - (1.0f - smoothing) - share);
    scale_row(z, n, float(scale / total), scale * share);
    z[target] = target_gradient;
  }
}

}  // namespace fastlm::FASTLM_ISA

#else
#include "common.h"

FASTLM_KERNEL(linear_cross_entropy_rows, void, const LinearCrossEntropyArgs&, int64_t, int64_t)

namespace fastlm {
namespace {

Tensor linear_cross_entropy_rows_(Tensor logits, const Tensor& target_, const std::optional<Tensor>& scale_,
                                  int64_t ignore_index, double label_smoothing, bool gradient) {
  const Tensor target = contiguous(target_);
  const std::optional<Tensor> scale = contiguous(scale_);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.scalar_type() == ScalarType::Float,
                  "logits must be a contiguous float32 matrix");
  const int64_t rows = logits.size(0), classes = logits.size(1);
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.numel() == rows, "target must be int64 [rows]");
  STD_TORCH_CHECK(!scale || (scale->scalar_type() == ScalarType::Float && scale->numel() == rows),
                  "scale must be float32 [rows]");
  const int64_t* ids = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK((ids[i] >= 0 && ids[i] < classes) || ids[i] == ignore_index, "target outside the vocabulary");

  Tensor loss = torch::stable::new_empty(logits, {rows});
  if (rows == 0) return loss;

  const LinearCrossEntropyArgs args{static_cast<float*>(logits.mutable_data_ptr()),
                                    ids,
                                    static_cast<const float*>(data(scale)),
                                    static_cast<float*>(loss.mutable_data_ptr()),
                                    classes,
                                    ignore_index,
                                    float(label_smoothing),
                                    gradient};
  torch::stable::parallel_for(0, rows, 1 + 32768 / (classes + 1),
                              [&](int64_t begin, int64_t end) { linear_cross_entropy_rows_kernel(args, begin, end); });
  return loss;
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("linear_cross_entropy_rows_", TORCH_BOX(&fastlm::linear_cross_entropy_rows_));
}
#endif
