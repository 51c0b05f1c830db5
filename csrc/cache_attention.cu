// The continuous cache on CUDA, host side: rows and ids in one buffer, tiles, a launch for some thetas and windows.
#include <algorithm>
#include <vector>

#include "cache_attention.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 256;

template <typename T, typename Tile, int kThetas>
void launch_walk(CacheArgs args, const Room& room, int limit, cudaStream_t stream) {
  args.kept = room.kept;
  const auto kernel = cache_attention_kernel<T, Tile, kThetas>;
  // The device's limit: that of this call could be taken back by another thread's.
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  kernel<<<unsigned((args.rows + Tile::kRows - 1) / Tile::kRows), Tile::kThreads, room.bytes, stream>>>(args);
}

// 256 rows where they stay on the chip and one theta needs few registers, else 128.
template <typename T>
void launch_cache_attention(const CacheArgs& args, int device, cudaStream_t stream) {
  int limit = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if constexpr (!kSplit<T>) {
    const Room tall = room<Tall>(args.units, limit);
    if (tall.kept == args.units && args.thetas == 1) return launch_walk<T, Tall, 1>(args, tall, limit, stream);
  }
  const Room square = room<Square>(args.units, limit);
  if (args.thetas == 1) return launch_walk<T, Square, 1>(args, square, limit, stream);
  if (args.thetas <= 4) return launch_walk<T, Square, 4>(args, square, limit, stream);
  launch_walk<T, Square, kMostThetas>(args, square, limit, stream);
}

int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// The entries of the memory before `at`, those of the call from there on.
void fill(Tensor& out, int64_t at, const std::optional<Tensor>& memory, const Tensor& now) {
  const int64_t past = memory ? memory->size(0) : 0;
  Tensor before = torch::stable::narrow(out, 0, at - past, past);
  Tensor after = torch::stable::narrow(out, 0, at, now.size(0));
  if (memory) torch::stable::copy_(before, *memory);
  torch::stable::copy_(after, now);
}

void launch_split(const Tensor& x, unsigned char* packed, int64_t pitch, float* powers) {
  if (x.size(0) == 0) return;
  cache_attention_split_kernel<<<grid(x.size(0), kThreads / 32), kThreads, 0, current_stream(x)>>>(
      static_cast<const float*>(x.const_data_ptr()), x.size(0), x.size(1), packed, pitch, powers);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> cache_attention(const Tensor& hidden_, const Tensor& next_ids,
                                           const std::optional<Tensor>& memory_,
                                           const std::optional<Tensor>& memory_ids, const std::optional<Tensor>& start_,
                                           const std::vector<double>& theta, const std::vector<int64_t>& window) {
  STD_TORCH_CHECK(hidden_.dim() == 2, "hidden must have shape [N, D]");
  const int64_t rows = hidden_.size(0), width = hidden_.size(1), past = memory_ ? memory_->size(0) : 0;
  STD_TORCH_CHECK(next_ids.numel() == rows && next_ids.scalar_type() == ScalarType::Long, "next_ids must be int64 [N]");
  STD_TORCH_CHECK(bool(memory_) == bool(memory_ids), "memory and memory_ids come together");
  STD_TORCH_CHECK(!memory_ || (memory_->dim() == 2 && memory_->size(1) == width && memory_ids->numel() == past &&
                               memory_->scalar_type() == hidden_.scalar_type()),
                  "memory must have shape [M, D] and the dtype of hidden, memory_ids [M]");
  STD_TORCH_CHECK(!start_ || (start_->scalar_type() == ScalarType::Long && start_->numel() == rows),
                  "start must be int64 [N]");
  for (size_t j = 0; j < window.size(); ++j)
    STD_TORCH_CHECK(window[j] > (j == 0 ? 0 : window[j - 1]), "window must be positive and ascending");
  const DType type = dtype_of(hidden_, "hidden");
  const torch::stable::accelerator::DeviceGuard guard(hidden_.get_device_index());
  const std::vector<int64_t> shape{int64_t(window.size()), int64_t(theta.size()), rows};
  Tensor log_mass = torch::stable::new_empty(hidden_, shape, ScalarType::Float);
  Tensor log_norm = torch::stable::new_empty(hidden_, shape, ScalarType::Float);
  if (log_mass.numel() == 0) return {log_mass, log_norm};

  const Tensor hidden = contiguous(hidden_);
  const std::optional<Tensor> memory = contiguous(memory_), start = contiguous(start_);
  const int64_t before = up(past, kPad);
  Tensor ids = torch::stable::new_zeros(hidden, {before + up(rows, kPad)}, ScalarType::Int), packed = hidden, powers;
  fill(ids, before, memory_ids, next_ids);
  CacheArgs args{};
  args.past = past, args.rows = rows;
  args.ids = static_cast<const int32_t*>(ids.const_data_ptr()) + before;
  args.start = static_cast<const int64_t*>(data(start));
  args.units = int32_t((type == DType::f32 ? 2 : 1) * up(width, 16) / 16);
  args.pitch = int64_t{args.units} * kUnit;
  if (type == DType::f32) {
    packed = torch::stable::new_empty(hidden, {(past + rows) * args.pitch}, ScalarType::Byte);
    powers = torch::stable::new_zeros(hidden, {ids.numel()});
    float* const power = static_cast<float*>(powers.mutable_data_ptr()) + before;
    unsigned char* const out = static_cast<unsigned char*>(packed.mutable_data_ptr());
    if (memory) launch_split(*memory, out, args.pitch, power - past);
    launch_split(hidden, out + past * args.pitch, args.pitch, power);
    args.powers = power;
  } else if (past > 0 || width % 8 != 0 || reinterpret_cast<uintptr_t>(hidden.const_data_ptr()) % 16 != 0) {
    packed = torch::stable::new_zeros(hidden, {past + rows, args.pitch / 2});
    Tensor filled = torch::stable::narrow(packed, 1, 0, width);
    fill(filled, past, memory, hidden);
  } else {
    args.pitch = 2 * width;
  }
  args.packed = static_cast<const unsigned char*>(packed.const_data_ptr());
  args.bytes = int32_t(args.pitch);
  args.stride = int64_t(theta.size()) * rows;
  for (size_t i = 0; i < theta.size(); i += kMostThetas) {
    for (size_t j = 0; j < window.size(); j += kMostWindows) {
      args.thetas = int32_t(std::min<size_t>(kMostThetas, theta.size() - i));
      args.windows = int32_t(std::min<size_t>(kMostWindows, window.size() - j));
      for (int k = 0; k < kMostThetas; ++k) {
        args.theta[k] = k < args.thetas ? float(theta[i + k]) : 0.0f;
        args.factor[k] = factor_of(args.theta[k]);
      }
      for (int k = 0; k < args.windows; ++k) args.window[k] = int32_t(std::min<int64_t>(window[j + k], kFar));
      args.log_mass = static_cast<float*>(log_mass.mutable_data_ptr()) + j * args.stride + i * rows;
      args.log_norm = static_cast<float*>(log_norm.mutable_data_ptr()) + j * args.stride + i * rows;
      FASTLM_CUDA_DISPATCH(type,
                           launch_cache_attention<scalar_t>(args, hidden.get_device_index(), current_stream(hidden)));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  return {log_mass, log_norm};
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) { m.impl("cache_attention", TORCH_BOX(&fastlm::cache_attention)); }
