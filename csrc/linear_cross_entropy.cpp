// Cross entropy of rows of logits on the CPU, computed in float32: each row gives its loss and, if asked, becomes the
// gradient of scale times it, in place. One work item is a row; the GEMMs around it are PyTorch's
// (fastlm/ops/linear_cross_entropy.py).
#include "dtype.h"

namespace fastlm {

struct LinearCrossEntropyArgs {
  void* logits;           // [rows, classes]
  const int64_t* target;  // [rows]
  const float* scale;     // [rows], or null for 1
  float* loss;            // [rows]
  int64_t classes, ignore_index;
  float label_smoothing;
  bool gradient;
  DType dtype;  // of the logits
};

}  // namespace fastlm

#ifdef FASTLM_ISA
#include <math.h>

#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kRun = 128 * kWidth;  // float32 lanes add up one run, a double the runs: any vocabulary stays exact

template <typename T>
FASTLM_INLINE float row_max(const T* z, int64_t n) {
  vec top = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) top = max(load(z + i), top);
  float m = max(top);
  for (; i < n; ++i) m = to_float(z[i]) > m ? to_float(z[i]) : m;
  return m;
}

// Sum of term(z) over the row.
template <typename T, typename Term>
FASTLM_INLINE double row_sum(const T* z, int64_t n, Term term) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    vec lanes = {};
    for_each_vector(lesser(kRun, n - begin), [&](int64_t j, int64_t count) {
      const vec terms = term(load(z + begin + j, count));
      lanes += count == kWidth ? terms : select(lane_index() < isplat(int32_t(count)), terms, vec{});
    });
    total += sum(lanes);
  }
  return total;
}

// The exponentials of the gradient are made a second time: kept in 16 bits they would be rounded twice.
template <typename T>
void run(const LinearCrossEntropyArgs& a, int64_t begin, int64_t end) {
  const float smoothing = a.label_smoothing;
  for (int64_t row = begin; row < end; ++row) {
    T* z = static_cast<T*>(a.logits) + row * a.classes;
    const int64_t target = a.target[row], n = a.classes;
    if (target == a.ignore_index) {
      a.loss[row] = 0.0f;
      if (a.gradient) memset(z, 0, n * sizeof(T));
      continue;
    }
    const float top = row_max(z, n), at_target = to_float(z[target]);
    const double mean = smoothing != 0.0f ? row_sum(z, n, [](vec v) { return v; }) / double(n) : 0.0;
    const double total = row_sum(z, n, [&](vec v) { return exp(v - top); });
    a.loss[row] = float(::log(total) + double(top) - (1.0 - smoothing) * at_target - smoothing * mean);
    if (!a.gradient) continue;
    const float scale = a.scale == nullptr ? 1.0f : a.scale[row], share = smoothing / float(n);
    const float p_target = float(exp(splat(at_target - top))[0] / total);
    const float factor = float(scale / total), offset = scale * share;
    for_each_vector(
        n, [&](int64_t j, int64_t count) { store(z + j, exp(load(z + j, count) - top) * factor - offset, count); });
    z[target] = from_float<T>(scale * (p_target - (1.0f - smoothing) - share));
  }
}

}  // namespace

void linear_cross_entropy_rows(const LinearCrossEntropyArgs& a, int64_t begin, int64_t end) {
  FASTLM_DISPATCH(a.dtype, run<scalar_t>(a, begin, end));
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
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be a contiguous matrix");
  const DType dtype = dtype_of(logits, "logits");
  const int64_t rows = logits.size(0), classes = logits.size(1);
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.numel() == rows, "target must be int64 [rows]");
  STD_TORCH_CHECK(!scale || (scale->scalar_type() == ScalarType::Float && scale->numel() == rows),
                  "scale must be float32 [rows]");
  const int64_t* ids = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK((ids[i] >= 0 && ids[i] < classes) || ids[i] == ignore_index, "target outside the vocabulary");

  Tensor loss = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  if (rows == 0) return loss;

  const LinearCrossEntropyArgs args{logits.mutable_data_ptr(),
                                    ids,
                                    static_cast<const float*>(data(scale)),
                                    static_cast<float*>(loss.mutable_data_ptr()),
                                    classes,
                                    ignore_index,
                                    float(label_smoothing),
                                    gradient,
                                    dtype};
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
