// csrc/cache_attention.cuh under the emulator, with tiles of few threads, and with those of a GPU for one theta.
#include "cache_attention.cuh"

using namespace fastlm;

namespace {

using Small = Tile<1, 1, 16, 1>;
using Wide = Tile<2, 2, 32, 2>;        // two warps of two row tiles
using OneSlot = Tile<1, 1, 16, 1, 1>;  // wrong: a stage is copied to where the one before it is read

template <typename T, typename Tile, int kThetas>
void walk(CacheArgs args, int limit) {
  const Room space = room<Tile>(args.units, limit);
  args.kept = space.kept;
  const unsigned blocks = unsigned((args.rows + Tile::kRows - 1) / Tile::kRows);
  emulator::launch({blocks, Tile::kThreads, size_t(space.bytes)},
                   [&] { cache_attention_kernel<T, Tile, kThetas>(args); });
}

template <typename T>
void walk(int tile, const CacheArgs& args, int limit) {
  if (tile == 0) return args.thetas == 1 ? walk<T, Small, 1>(args, limit) : walk<T, Small, 2>(args, limit);
  if (tile == 1) return walk<T, Wide, 2>(args, limit);
  if (tile == 2) return walk<T, std::conditional_t<kSplit<T>, Square, Tall>, 1>(args, limit);
  walk<T, OneSlot, 1>(args, limit);
}

}  // namespace

extern "C" void cache_attention_split(const float* rows, int64_t count, int64_t width, unsigned char* packed,
                                      int64_t pitch, float* powers, int blocks) {
  emulator::launch({unsigned(blocks), 64},
                   [&] { cache_attention_split_kernel(rows, count, width, packed, pitch, powers); });
}

// `before`: where the first row of the call stands in ids and powers; `limit`: bytes of shared memory.
extern "C" void cache_attention_walk(int dtype, int tile, int limit, const unsigned char* packed, int64_t pitch,
                                     int bytes, int units, const int32_t* ids, const float* powers, int64_t before,
                                     const int64_t* start, int64_t past, int64_t rows, float* log_mass, float* log_norm,
                                     const float* theta, int thetas, const int32_t* window, int windows) {
  CacheArgs args{};
  args.packed = packed, args.pitch = pitch, args.bytes = bytes, args.units = units;
  args.ids = ids + before, args.powers = powers == nullptr ? nullptr : powers + before, args.start = start;
  args.past = past, args.rows = rows, args.stride = rows * thetas;
  args.log_mass = log_mass, args.log_norm = log_norm;
  args.thetas = thetas, args.windows = windows;
  for (int k = 0; k < kMostThetas; ++k) args.factor[k] = factor_of(args.theta[k] = k < thetas ? theta[k] : 0.0f);
  for (int j = 0; j < windows; ++j) args.window[j] = window[j];
  FASTLM_CUDA_DISPATCH(DType(dtype), walk<scalar_t>(tile, args, limit));
}
