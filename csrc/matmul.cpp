// C [M, N] = A^T B on the CPU in float32, with A [K, M] and B [K, N]: the gradient of a weight from those of its
// outputs, and with a mask that of a weight that was dropped. All threads pack B into panels for some steps of K, then
// make blocks of rows of C with them, and go on to the next steps. fastlm/ops/_matmul.py says when it is used.
#include <cstdint>

#include "team.h"

namespace fastlm {

struct MatmulArgs {
  const float *a, *b;
  float *c, *panels, *blocks;  // the last two are scratch: B packed; for each slot, rows of A^T packed
  Team packing, rows;
  int64_t m, n, k;
  int64_t steps, block;  // of K at a time, and rows of C in an item
  uint64_t seed;
  int64_t threshold;  // the mask keeps lanes >= threshold; negative: no mask
  float scale;        // of what it keeps
};

struct MatmulSizes {
  int64_t steps, block, panels, blocks;  // the scratch in floats, of `blocks` for one slot
  int64_t packing, rows;                 // items
};

}  // namespace fastlm

#ifdef FASTLM_ISA
#include "panel.h"
#include "philox.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kMostSteps = 1536;       // B's panels for them stay in the last-level cache
constexpr int64_t kBlockFloats = 1 << 17;  // of A, half of a second-level cache
constexpr int64_t kPackSteps = 8;          // in one item of packing
constexpr int64_t kMostTiles = 12;         // in one block

FASTLM_INLINE int64_t panels_of(int64_t n) { return (n + kCols - 1) / kCols; }

// Steps begin .. end - 1 of B, counted from `first` of K, into all panels.
void pack_steps(const MatmulArgs& a, int64_t first, int64_t begin, int64_t end) {
  for (int64_t step = begin; step < end; ++step)
    for (int64_t column = 0; column < panels_of(a.n) * kCols; column += kWidth) {
      float* to = a.panels + (column / kCols * a.steps + step) * kCols + column % kCols;
      store(to, column < a.n ? load(a.b + (first + step) * a.n + column, a.n - column) : vec{});
    }
}

// Columns row .. row + rows - 1 of A, which are rows of A^T, tile by tile with the rows of a tile side by side.
void pack_block(const MatmulArgs& a, int64_t first, int64_t steps, int64_t row, int64_t rows, float* block) {
  for (int64_t step = 0; step < steps; ++step) {
    const float* from = a.a + (first + step) * a.m + row;
    for (int64_t tile = 0; tile < rows; tile += kTile)
      std::memcpy(block + tile * steps + step * kTile, from + tile, lesser(kTile, rows - tile) * sizeof(float));
  }
}

// One row of a tile into C, added to what earlier steps left there, masked after the last ones.
void put_row(const MatmulArgs& a, int64_t row, int64_t column, const float* sums, bool add, bool last) {
  const int64_t first = row * a.n + column, count = lesser(kCols, a.n - column), lead = first & 3;
  const bool masked = last && a.threshold >= 0;
  alignas(64) uint32_t lanes[2 * kDraw + kWidth];
  if (masked) {
    draw_lanes(a.seed, uint64_t(first - lead), kWeightStream, lanes);
    if (lead + count > kDraw) draw_lanes(a.seed, uint64_t(first - lead + kDraw), kWeightStream, lanes + kDraw);
  }
  const uvec last_dropped = uvec{} + uint32_t(a.threshold - 1);  // the threshold itself may be 2^32
  for_each_vector(count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    vec sum = load(sums + j);
    if (add) sum += load(a.c + first + j, n);
    if (masked) {
      uvec drawn;
      std::memcpy(&drawn, lanes + lead + j, sizeof drawn);
      sum = select(drawn > last_dropped, sum * a.scale, vec{});
    }
    store(a.c + first + j, sum, n);
  });
}

}  // namespace

MatmulSizes matmul_sizes(const MatmulArgs& a) {
  const int64_t passes = (a.k + kMostSteps - 1) / kMostSteps;
  MatmulSizes sizes{};
  sizes.steps = (a.k + passes - 1) / passes;
  sizes.block = greater(2, lesser(kMostTiles, kBlockFloats / (sizes.steps * kTile))) * kTile;
  sizes.panels = panels_of(a.n) * sizes.steps * kCols;
  sizes.blocks = (sizes.block * sizes.steps + 15) / 16 * 16;
  sizes.packing = (sizes.steps + kPackSteps - 1) / kPackSteps;
  sizes.rows = (a.m + sizes.block - 1) / sizes.block;
  return sizes;
}

void matmul_tn(const MatmulArgs& a, int64_t slot) {
  alignas(64) float tile[kMostTiles * kTile * kCols];
  float* block = a.blocks + slot * ((a.block * a.steps + 15) / 16 * 16);
  for (int64_t first = 0, pass = 0; first < a.k; first += a.steps, ++pass) {
    const int64_t steps = lesser(a.steps, a.k - first);
    run_phase(a.packing, slot, pass, 1, 1, [&](int64_t begin, int64_t end) {
      pack_steps(a, first, begin * kPackSteps, lesser(end * kPackSteps, steps));
    });
    run_phase(a.rows, slot, pass, 1, 1, [&](int64_t begin, int64_t) {
      const int64_t row = begin * a.block, rows = lesser(a.block, a.m - row);
      pack_block(a, first, steps, row, rows, block);
      for (int64_t column = 0; column < a.n; column += kCols) {
        const float* panel = a.panels + column * a.steps;
        const int64_t vectors = lesser(kVectors, (a.n - column + kWidth - 1) / kWidth);
        for (int64_t step = 0; step < steps; step += kBlock)
          for (int64_t i = 0; i < rows; i += kTile) {
            const int64_t count = lesser(kBlock, steps - step);
            const char* ahead =
                reinterpret_cast<const char*>(panel + (step + count) * kCols) + i / kTile % 4 * count * 64;
            multiply_tile(Interleaved<float>{block + i * steps + step * kTile}, lesser(kTile, rows - i),
                          panel + step * kCols, count, vectors, ahead, tile + i * kCols, step > 0);
          }
        for (int64_t i = 0; i < rows; ++i)
          put_row(a, row + i, column, tile + i * kCols, pass > 0, first + steps == a.k);
      }
    });
  }
}

}  // namespace fastlm::FASTLM_ISA

#else
#include <vector>

#include "common.h"
#include "philox.h"

FASTLM_KERNEL(matmul_sizes, MatmulSizes, const MatmulArgs&)
FASTLM_KERNEL(matmul_tn, void, const MatmulArgs&, int64_t)

namespace fastlm {
namespace {

Tensor matmul_tn(const Tensor& a_, const Tensor& b_, const std::optional<Tensor>& seed, double p) {
  const Tensor a = contiguous(a_), b = contiguous(b_);
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0), "a and b must have shape [K, M] and [K, N]");
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float && b.scalar_type() == ScalarType::Float,
                  "a and b must be float32");
  MatmulArgs args{};
  args.m = a.size(1), args.n = b.size(1), args.k = a.size(0);
  Tensor c = torch::stable::new_empty(a, {args.m, args.n});
  if (c.numel() == 0) return c;
  if (args.k == 0) return torch::stable::fill_(c, 0.0);
  const bool masked = seed.has_value() && philox_threshold(p) > 0;
  args.seed = masked ? read_seed(*seed) : 0;
  args.threshold = masked ? int64_t(philox_threshold(p)) : -1;
  args.scale = masked ? philox_scale(p) : 1.0f;
  const MatmulSizes sizes = matmul_sizes_kernel(args);
  const int64_t threads = torch::stable::get_num_threads(), slots = threads < sizes.rows ? threads : sizes.rows;
  Tensor panels = torch::stable::new_empty(a, {sizes.panels}),
         blocks = torch::stable::new_empty(a, {slots, sizes.blocks});
  for (const Tensor* x : {&c, &panels}) prefer_huge_pages(*x);
  std::vector<TeamCounter> next(2 * slots);
  TeamCounter done[2];
  args.packing = {next.data(), &done[0], slots, sizes.packing};
  args.rows = {next.data() + slots, &done[1], slots, sizes.rows};
  args.steps = sizes.steps, args.block = sizes.block;
  args.a = static_cast<const float*>(a.const_data_ptr());
  args.b = static_cast<const float*>(b.const_data_ptr());
  args.c = static_cast<float*>(c.mutable_data_ptr());
  args.panels = static_cast<float*>(panels.mutable_data_ptr());
  args.blocks = static_cast<float*>(blocks.mutable_data_ptr());
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t) { matmul_tn_kernel(args, begin); });
  return c;
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) { m.impl("matmul_tn", TORCH_BOX(&fastlm::matmul_tn)); }
#endif
