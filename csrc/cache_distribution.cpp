// The distribution of the continuous cache on the CPU. First the scores, an item being a run of keys of one row; then a
// row an item: softmax in double, weights summed per word as integers, so that the order of the keys does not show.
#include "dtype.h"

namespace fastlm {

struct CacheDistributionArgs {
  const void *query, *keys;    // [rows, width], [rows, window, width]
  const int64_t *ids, *count;  // [rows, window], [rows]
  float *scores, *out;         // [rows, window] scratch, [rows, vocabulary]
  int64_t rows, window, width, vocabulary;
  double theta;
  DType dtype;
};

constexpr int64_t kCacheDistributionRun = 64;  // keys of one item

}  // namespace fastlm

#ifdef FASTLM_ISA
#include <math.h>

#include <new>

#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kRun = kCacheDistributionRun, kSums = 4;
constexpr double kOne = 0x1p60;  // a probability of 1 as an integer: the sum of a row cannot overflow

template <typename T>
float dot(const T* x, const T* y, int64_t count) {
  vec sums[kSums] = {};
  int64_t j = 0;
  for (; j + kSums * kWidth <= count; j += kSums * kWidth)
    for (int64_t i = 0; i < kSums; ++i) sums[i] += load(x + j + i * kWidth) * load(y + j + i * kWidth);
  for (; j < count; j += kWidth) sums[0] += load(x + j, count - j) * load(y + j, count - j);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
void score(const CacheDistributionArgs& a, int64_t begin, int64_t end) {
  const int64_t runs = (a.window + kRun - 1) / kRun;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / runs, first = item % runs * kRun, last = lesser(first + kRun, a.count[row]);
    const T *query = static_cast<const T*>(a.query) + row * a.width, *keys = static_cast<const T*>(a.keys);
    for (int64_t i = row * a.window + first; i < row * a.window + last; ++i)
      a.scores[i] = dot(query, keys + i * a.width, a.width);
  }
}

}  // namespace

void cache_distribution_scores(const CacheDistributionArgs& a, int64_t begin, int64_t end) {
  FASTLM_DISPATCH(a.dtype, score<scalar_t>(a, begin, end));
}

void cache_distribution_rows(const CacheDistributionArgs& a, int64_t begin, int64_t end) {
  const int64_t room = a.vocabulary + a.window;  // a word's weight, then an entry's
  int64_t* sums = static_cast<int64_t*>(::operator new(room * sizeof(int64_t)));
  double* weights = reinterpret_cast<double*>(sums + a.vocabulary);
  for (int64_t row = begin; row < end; ++row) {
    const float* scores = a.scores + row * a.window;
    const int64_t* ids = a.ids + row * a.window;
    float* out = a.out + row * a.vocabulary;
    double top = -INFINITY, total = 0.0;
    bool unknown = false;
    for (int64_t i = 0; i < a.count[row]; ++i) {
      unknown |= !(scores[i] - scores[i] == 0.0f);
      weights[i] = a.theta * double(scores[i]);  // kept: fused with the subtraction below it would be another number
      top = weights[i] > top ? weights[i] : top;
    }
    if (unknown) {
      for (int64_t w = 0; w < a.vocabulary; ++w) out[w] = NAN;
      continue;
    }
    for (int64_t w = 0; w < a.vocabulary; ++w) sums[w] = 0;
    for (int64_t i = 0; i < a.count[row]; ++i) total += weights[i] = ::exp(weights[i] - top);
    for (int64_t i = 0; i < a.count[row]; ++i) sums[ids[i]] += int64_t(weights[i] / total * kOne);
    for (int64_t w = 0; w < a.vocabulary; ++w) out[w] = float(double(sums[w]) / kOne);
  }
  ::operator delete(sums);
}

}  // namespace fastlm::FASTLM_ISA

#else
#include "common.h"

FASTLM_KERNEL(cache_distribution_scores, void, const CacheDistributionArgs&, int64_t, int64_t)
FASTLM_KERNEL(cache_distribution_rows, void, const CacheDistributionArgs&, int64_t, int64_t)

namespace fastlm {
namespace {

Tensor cache_distribution(const Tensor& query_, const Tensor& keys_, const Tensor& ids_, const Tensor& count_,
                          int64_t vocabulary, double theta) {
  const Tensor query = contiguous(query_), keys = contiguous(keys_), ids = contiguous(ids_), count = contiguous(count_);
  STD_TORCH_CHECK(query.dim() == 2 && keys.dim() == 3, "query must have shape [B, D], keys [B, W, D]");
  const int64_t rows = query.size(0), window = keys.size(1), width = query.size(1);
  STD_TORCH_CHECK(keys.size(0) == rows && keys.size(2) == width && keys.scalar_type() == query.scalar_type(),
                  "keys must have shape [B, W, D] and the dtype of query");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.numel() == rows * window, "ids must be int64 [B, W]");
  STD_TORCH_CHECK(count.scalar_type() == ScalarType::Long && count.numel() == rows, "count must be int64 [B]");
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t* valid = static_cast<const int64_t*>(count.const_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(valid[row] >= 0 && valid[row] <= window, "count must lie in [0, W]");
    for (int64_t i = row * window; i < row * window + valid[row]; ++i)
      STD_TORCH_CHECK(id[i] >= 0 && id[i] < vocabulary, "ids must lie in [0, V)");
  }
  Tensor out = torch::stable::new_empty(query, {rows, vocabulary}, ScalarType::Float);
  if (out.numel() == 0) return out;
  Tensor scores = torch::stable::new_empty(query, {rows, window}, ScalarType::Float);
  const CacheDistributionArgs args{query.const_data_ptr(),
                                   keys.const_data_ptr(),
                                   id,
                                   valid,
                                   static_cast<float*>(scores.mutable_data_ptr()),
                                   static_cast<float*>(out.mutable_data_ptr()),
                                   rows,
                                   window,
                                   width,
                                   vocabulary,
                                   theta,
                                   dtype_of(query, "query")};
  const int64_t runs = (window + kCacheDistributionRun - 1) / kCacheDistributionRun;
  torch::stable::parallel_for(0, rows * runs, 4,
                              [&](int64_t begin, int64_t end) { cache_distribution_scores_kernel(args, begin, end); });
  torch::stable::parallel_for(0, rows, 1,
                              [&](int64_t begin, int64_t end) { cache_distribution_rows_kernel(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) { m.impl("cache_distribution", TORCH_BOX(&fastlm::cache_distribution)); }
#endif
