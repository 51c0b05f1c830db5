// The recurrence of an LSTM layer on the CPU, from projected inputs [T, B, 4H] to y [T, B, H], and its adjoint. All
// threads go through the steps together: an item of a step is a panel of hidden units and some rows of the batch, its
// product with the recurrent weight is made in a tile that the pointwise part finds in the first-level cache. The
// weight is masked while it is packed, once a call, into panels that stay in the caches for the whole sequence.
#include "dtype.h"
#include "team.h"

namespace fastlm {

struct LstmArgs {
  const void *projected, *weight, *h0, *c0;  // [T, B, 4H], [4H, H], [B, H] twice
  const void *dy, *dh, *dc;                  // backward only, null: zeros
  void *y, *h_n, *c_n;                       // forward only
  void* gates;   // [T, B, 4H], activated: over projected forward unless null; backward their gradients come over them
  float* cells;  // [T, B, H]; written forward unless null
  float *dh0, *dc0;         // backward only
  void *panels, *exchange;  // scratch: the packed weight; left operands, two steps of them
  float* carry;             // scratch [B, H]: c forward, its gradient backward
  Team packing, steps;
  int64_t time, batch, hidden;
  uint64_t seed;
  int64_t threshold;   // the mask keeps lanes >= threshold; negative: no mask
  float scale;         // of a kept weight
  DType dtype, state;  // of projected, weight, y, gates, da and dy; of h0, c0, h_n, c_n, dh and dc
  bool reverse;
};

struct LstmSizes {
  int64_t panels, exchange;  // bytes
  int64_t packing, step;     // items
};

constexpr int64_t kPackRows = 8;  // of the weight, in one item of packing backward

}  // namespace fastlm

#ifdef FASTLM_ISA
#include "channels.h"
#include "panel.h"
#include "philox.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kRun = kDraw - 4;  // weights masked at a time: with what comes before a multiple of 4, one draw
constexpr int64_t kMaxRows = 128;    // of one tile

FASTLM_INLINE int64_t time_of(const LstmArgs& a, int64_t step) { return a.reverse ? a.time - 1 - step : step; }

// Elements of a row of the left operand, whole words.
template <typename E>
FASTLM_INLINE int64_t row_length(int64_t elements) {
  return words<E>(elements) * kPair<E>;
}

// `count` <= kRun masked weights from row-major index `first` on.
template <typename T, typename E>
FASTLM_INLINE void masked_weights(const LstmArgs& a, int64_t first, int64_t count, E* out) {
  alignas(64) uint32_t lanes[kDraw + kWidth];
  const int64_t lead = first & 3;
  const uvec last_dropped = uvec{} + uint32_t(a.threshold - 1);  // the threshold itself may be 2^32
  if (a.threshold >= 0) draw_lanes(a.seed, uint64_t(first - lead), kWeightStream, lanes);
  for_each_vector(count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    vec weight = load(static_cast<const T*>(a.weight) + first + j, n);
    if (a.threshold >= 0) {
      uvec drawn;
      std::memcpy(&drawn, lanes + lead + j, sizeof drawn);
      weight = select(drawn > last_dropped, weight * a.scale, vec{});
    }
    store(out + j, weight);
  });
}

// The panel of units unit .. unit + kWidth - 1 forward: their rows of W, gate by gate, become columns.
template <typename T, typename E>
void pack_units(const LstmArgs& a, int64_t unit, E* panel) {
  const int64_t hidden = a.hidden, length = row_length<E>(hidden);
  alignas(64) E run[kRun + kWidth];
  for (int64_t k = 0; k < length; k += kRun)
    for (int64_t column = 0; column < kCols; ++column) {
      const int64_t u = unit + column % kWidth, count = u < hidden ? lesser(kRun, hidden - k) : 0;
      if (count > 0) masked_weights<T>(a, (column / kWidth * hidden + u) * hidden + k, count, run);
      for (int64_t i = count; i < lesser(kRun, length - k); ++i) run[i] = E{};
      E* to = panel + k * kCols + column * kPair<E>;
      for (int64_t i = 0; i < lesser(kRun, length - k); i += kPair<E>) std::memcpy(to + i * kCols, run + i, 4);
    }
}

// Step `word` of all panels backward: kPair rows of W, column by column.
template <typename T, typename E>
void pack_step(const LstmArgs& a, int64_t word, int64_t panel_length, E* panels) {
  const int64_t hidden = a.hidden, across = (hidden + kCols - 1) / kCols * kCols;
  alignas(64) E run[kPair<E>][kRun + kWidth];
  for (int64_t column = 0; column < across; column += kRun) {
    const int64_t count = greater(lesser(kRun, hidden - column), 0);
    for (int64_t row = 0; row < kPair<E>; ++row) {
      if (count > 0) masked_weights<T>(a, (word * kPair<E> + row) * hidden + column, count, run[row]);
      for (int64_t i = count; i < kRun; ++i) run[row][i] = E{};
    }
    for (int64_t i = 0; i < lesser(kRun, across - column); ++i) {
      E* to = panels + (column + i) / kCols * panel_length + (word * kCols + (column + i) % kCols) * kPair<E>;
      for (int64_t row = 0; row < kPair<E>; ++row) to[row] = run[row][i];
    }
  }
}

// Rows of a state as fp32 into the carry, zeros when there is none.
void load_carry(const LstmArgs& a, const void* state, int64_t b) {
  for (int64_t j = 0; j < a.hidden; j += kWidth) {
    const int64_t n = lesser(kWidth, a.hidden - j), at = b * a.hidden + j;
    vec v{};
    if (state != nullptr) FASTLM_DISPATCH(a.state, v = load(static_cast<const scalar_t*>(state) + at, n));
    store(a.carry + at, v, n);
  }
}

FASTLM_INLINE void store_state(const LstmArgs& a, void* state, int64_t at, vec v, int64_t n) {
  FASTLM_DISPATCH(a.state, store(static_cast<scalar_t*>(state) + at, v, n));
}

// Rows cut into blocks of at most kTile, of sizes within one of each other.
struct RowBlocks {
  int64_t rows, blocks;
  explicit RowBlocks(int64_t rows) : rows(rows), blocks((rows + kTile - 1) / kTile) {}
  int64_t at(int64_t block) const { return rows * block / blocks; }
};

// tile[i] = row of x times the panel, for the rows of blocks begin .. end - 1; `vectors` of the panel's columns in use.
template <typename E>
void multiply_panel(const E* x, int64_t stride, const E* panel, int64_t steps, int64_t vectors, const RowBlocks& blocks,
                    int64_t begin, int64_t end, float* tile) {
  for (int64_t step = 0; step < steps; step += kBlock)
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = blocks.at(block), rows = blocks.at(block + 1) - row, count = lesser(kBlock, steps - step);
      const E* part = panel + step * kCols * kPair<E>;
      const char* ahead =
          reinterpret_cast<const char*>(part + count * kCols * kPair<E>) + (block - begin) % 4 * count * 64;
      const RowMajor<E> left{x + row * stride + step * kPair<E>, stride};
      multiply_tile(left, rows, part, count, vectors, ahead, tile + (row - blocks.at(begin)) * kCols, step > 0);
    }
}

template <typename T, typename E>
struct Forward {
  const LstmArgs& a;
  const RowBlocks blocks{a.batch};
  const int64_t length = row_length<E>(a.hidden), panel_length = length * kCols;

  E* left(int64_t step) const { return static_cast<E*>(a.exchange) + (step & 1) * a.batch * length; }

  void pack(int64_t item) const {
    const int64_t panels = (a.hidden + kWidth - 1) / kWidth;
    if (item < panels) return pack_units<T>(a, item * kWidth, static_cast<E*>(a.panels) + item * panel_length);
    const int64_t b = item - panels;
    load_carry(a, a.c0, b);
    for (int64_t j = 0; j < length; j += kWidth) {
      const int64_t n = lesser(kWidth, length - j), there = lesser(n, a.hidden - j);
      vec h{};
      FASTLM_DISPATCH(a.state, h = load(static_cast<const scalar_t*>(a.h0) + b * a.hidden + j, there));
      store(left(0) + b * length + j, h, n);
      store(left(1) + b * length + j, vec{}, n);  // the end of the last word meets no NaN
    }
  }

  void step(int64_t step, int64_t panel, int64_t begin, int64_t end, float* tile) const {
    const int64_t hidden = a.hidden, t = time_of(a, step), unit = panel * kWidth, n = lesser(kWidth, hidden - unit);
    for (int64_t b = blocks.at(begin); b < blocks.at(end); ++b)
      for (int64_t gate = 0; gate < 4; ++gate)  // the last lane's line: the first one came with the panel before
        prefetch(static_cast<const T*>(a.projected) + ((t * a.batch + b) * 4 + gate) * hidden + unit + n - 1);
    multiply_panel(left(step), length, static_cast<const E*>(a.panels) + panel * panel_length, words<E>(hidden),
                   kVectors, blocks, begin, end, tile);
    for (int64_t b = blocks.at(begin); b < blocks.at(end); ++b) {
      const float* sums = tile + (b - blocks.at(begin)) * kCols;
      const int64_t at = b * hidden + unit, row = t * a.batch * hidden + at;
      const T* projected = static_cast<const T*>(a.projected) + (t * a.batch + b) * 4 * hidden + unit;
      const vec i = sigmoid(load(sums) + load(projected, n));
      const vec f = sigmoid(load(sums + kWidth) + load(projected + hidden, n));
      const vec g = tanh(load(sums + 2 * kWidth) + load(projected + 2 * hidden, n));
      const vec o = sigmoid(load(sums + 3 * kWidth) + load(projected + 3 * hidden, n));
      const vec c = f * load(a.carry + at, n) + i * g, h = o * tanh(c);
      store(a.carry + at, c, n);
      store(static_cast<T*>(a.y) + row, h, n);
      store(left(step + 1) + b * length + unit, h, n);
      if (a.gates != nullptr) {
        T* gates = static_cast<T*>(a.gates) + (t * a.batch + b) * 4 * hidden + unit;
        store(gates, i, n), store(gates + hidden, f, n), store(gates + 2 * hidden, g, n),
            store(gates + 3 * hidden, o, n);
        store(a.cells + row, c, n);
      }
      if (step == a.time - 1) {
        store_state(a, a.h_n, at, h, n);
        store_state(a, a.c_n, at, c, n);
      }
    }
  }
};

template <typename T, typename E>
struct Backward {
  const LstmArgs& a;
  const RowBlocks blocks{a.batch};
  const int64_t panel_length = row_length<E>(4 * a.hidden) * kCols;

  // Gradients of the pre-activations of a step, as the left operand of the step before it.
  E* left(int64_t step) const {
    if (sizeof(E) == sizeof(T)) return static_cast<E*>(a.gates) + time_of(a, step) * a.batch * 4 * a.hidden;
    return static_cast<E*>(a.exchange) + (step & 1) * a.batch * 4 * a.hidden;
  }

  void pack(int64_t item) const {
    const int64_t all = words<E>(4 * a.hidden), items = (all + kPackRows - 1) / kPackRows;
    if (item >= items) return load_carry(a, a.dc, item - items);
    for (int64_t word = item * kPackRows; word < lesser(all, (item + 1) * kPackRows); ++word)
      pack_step<T>(a, word, panel_length, static_cast<E*>(a.panels));
  }

  // Phase 0 is the last step; the phase after the first step hands out dh0 and dc0.
  void step(int64_t phase, int64_t panel, int64_t begin, int64_t end, float* tile) const {
    const int64_t hidden = a.hidden, step = a.time - 1 - phase, t = time_of(a, step), first = panel * kCols;
    const int64_t vectors = lesser(kVectors, (hidden - first + kWidth - 1) / kWidth);
    const int64_t row_begin = blocks.at(begin), row_end = blocks.at(end);
    if (step >= 0) prefetch_step(step, first, vectors, row_begin, row_end);
    if (phase > 0)
      multiply_panel(left(step + 1), 4 * hidden, static_cast<const E*>(a.panels) + panel * panel_length,
                     words<E>(4 * hidden), vectors, blocks, begin, end, tile);
    for (int64_t b = row_begin; b < row_end; ++b)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t unit = first + v * kWidth, n = lesser(kWidth, hidden - unit), at = b * hidden + unit;
        vec dh{};
        if (phase > 0)
          dh = load(tile + (b - row_begin) * kCols + v * kWidth);
        else if (a.dh != nullptr)
          FASTLM_DISPATCH(a.state, dh = load(static_cast<const scalar_t*>(a.dh) + at, n));
        if (step >= 0) {
          cell(step, t, b, unit, n, dh);
        } else {
          store(a.dh0 + at, dh, n);
          store(a.dc0 + at, load(a.carry + at, n), n);
        }
      }
  }

  void cell(int64_t step, int64_t t, int64_t b, int64_t unit, int64_t n, vec dh) const {
    const int64_t hidden = a.hidden, at = b * hidden + unit, row = t * a.batch * hidden + at;
    if (a.dy != nullptr) dh += load(static_cast<const T*>(a.dy) + row, n);
    T* gates = static_cast<T*>(a.gates) + (t * a.batch + b) * 4 * hidden + unit;
    const vec i = load(gates, n), f = load(gates + hidden, n), g = load(gates + 2 * hidden, n),
              o = load(gates + 3 * hidden, n);
    const vec squashed = tanh(load(a.cells + row, n));
    vec before{};
    if (step > 0)
      before = load(a.cells + (time_of(a, step - 1) * a.batch + b) * hidden + unit, n);
    else
      FASTLM_DISPATCH(a.state, before = load(static_cast<const scalar_t*>(a.c0) + at, n));
    const vec dc = load(a.carry + at, n) + dh * o * (1.0f - squashed * squashed);
    const vec da[4] = {dc * g * i * (1.0f - i), dc * before * f * (1.0f - f), dc * i * (1.0f - g * g),
                       dh * squashed * o * (1.0f - o)};
    store(a.carry + at, dc * f, n);
    for (int64_t gate = 0; gate < 4; ++gate) {
      store(gates + gate * hidden, da[gate], n);
      if (sizeof(E) != sizeof(T)) store(left(step) + (b * 4 + gate) * hidden + unit, da[gate], n);
    }
  }

  // What the pointwise part reads was last touched in the forward pass: it comes while the product is made.
  void prefetch_step(int64_t step, int64_t first, int64_t vectors, int64_t row_begin, int64_t row_end) const {
    const int64_t t = time_of(a, step), before = time_of(a, greater(step - 1, 0));
    for (int64_t b = row_begin; b < row_end; ++b)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t unit = first + v * kWidth, row = (t * a.batch + b) * a.hidden + unit;
        for (int64_t gate = 0; gate < 4; ++gate)
          prefetch(static_cast<const T*>(a.gates) + ((t * a.batch + b) * 4 + gate) * a.hidden + unit + kWidth - 1);
        prefetch(a.cells + (before * a.batch + b) * a.hidden + unit + kWidth - 1);
        if (a.dy != nullptr) prefetch(static_cast<const T*>(a.dy) + row + kWidth - 1);
      }
  }
};

template <template <typename, typename> class Direction, typename T>
void work(const LstmArgs& a, int64_t slot, int64_t phases) {
  const Direction<T, typename Operand<T>::type> direction{a};
  // A few claims for each worker: the last panel may be narrow, and one that had its core taken away be late.
  const int64_t blocks = direction.blocks.blocks, share = a.steps.items / (8 * a.steps.slots);
  const int64_t most = lesser(greater(share, 1), kMaxRows / kTile);
  alignas(64) float tile[kMaxRows * kCols];
  run_phase(a.packing, slot, 0, 1, 1, [&](int64_t item, int64_t) { direction.pack(item); });
  for (int64_t phase = 0; phase < phases; ++phase)
    run_phase(a.steps, slot, phase, blocks, most, [&](int64_t begin, int64_t end) {
      const int64_t panel = begin / blocks;
      direction.step(phase, panel, begin - panel * blocks, end - panel * blocks, tile);
    });
}

}  // namespace

LstmSizes lstm_sizes(const LstmArgs& a, bool backward) {
  LstmSizes sizes{};
  FASTLM_DISPATCH(a.dtype, {
    using E = typename Operand<scalar_t>::type;
    const int64_t inner = row_length<E>(backward ? 4 * a.hidden : a.hidden), unit = backward ? kCols : kWidth;
    const int64_t panels = (a.hidden + unit - 1) / unit;
    sizes.panels = panels * inner * kCols * sizeof(E);
    sizes.exchange = backward && sizeof(E) == sizeof(scalar_t) ? 0 : 2 * a.batch * inner * sizeof(E);
    sizes.packing = a.batch + (backward ? (words<E>(4 * a.hidden) + kPackRows - 1) / kPackRows : panels);
    sizes.step = panels * RowBlocks(a.batch).blocks;
  });
  return sizes;
}

void lstm_fwd(const LstmArgs& a, int64_t slot) { FASTLM_DISPATCH(a.dtype, work<Forward, scalar_t>(a, slot, a.time)); }

void lstm_bwd(const LstmArgs& a, int64_t slot) {
  FASTLM_DISPATCH(a.dtype, work<Backward, scalar_t>(a, slot, a.time + 1));
}

}  // namespace fastlm::FASTLM_ISA

#else
#include <vector>

#include "common.h"
#include "philox.h"

FASTLM_KERNEL(lstm_sizes, LstmSizes, const LstmArgs&, bool)
FASTLM_KERNEL(lstm_fwd, void, const LstmArgs&, int64_t)
FASTLM_KERNEL(lstm_bwd, void, const LstmArgs&, int64_t)

namespace fastlm {
namespace {

// What both directions share. `like` is [T, B, 4H].
LstmArgs arguments(const std::vector<int64_t>& shape, DType dtype, const Tensor& weight, const Tensor& c0,
                   const std::optional<Tensor>& seed, double p, bool reverse) {
  LstmArgs args{};
  args.time = shape[0], args.batch = shape[1], args.hidden = shape[2];
  args.dtype = dtype;
  args.state = dtype_of(c0, "c0");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == 4 * args.hidden && weight.size(1) == args.hidden &&
                      dtype_of(weight, "w_hh") == dtype,
                  "w_hh must have shape [4H, H] and the dtype of the input");
  STD_TORCH_CHECK(c0.dim() == 2 && c0.size(0) == args.batch && c0.size(1) == args.hidden, "c0 must have shape [B, H]");
  args.weight = weight.const_data_ptr();
  args.c0 = c0.const_data_ptr();
  const bool masked = seed.has_value() && philox_threshold(p) > 0;
  args.seed = masked ? read_seed(*seed) : 0;
  args.threshold = masked ? int64_t(philox_threshold(p)) : -1;
  args.scale = masked ? philox_scale(p) : 1.0f;
  args.reverse = reverse;
  return args;
}

void launch(void (*kernel)(const LstmArgs&, int64_t), LstmArgs& args, const Tensor& like, bool backward) {
  const LstmSizes sizes = lstm_sizes_kernel(args, backward);
  Tensor panels = torch::stable::new_empty(like, {sizes.panels}, ScalarType::Byte);
  Tensor exchange = torch::stable::new_empty(like, {sizes.exchange}, ScalarType::Byte);
  Tensor carry = torch::stable::new_empty(like, {args.batch, args.hidden}, ScalarType::Float);
  prefer_huge_pages(panels);
  args.panels = panels.mutable_data_ptr();
  args.exchange = exchange.mutable_data_ptr();
  args.carry = static_cast<float*>(carry.mutable_data_ptr());
  // A step has to be worth meeting at its end: some microseconds of products for each thread.
  const int64_t worth = 1 + args.batch * args.hidden * args.hidden / 16384;
  const int64_t threads = torch::stable::get_num_threads(), slots = threads < worth ? threads : worth;
  std::vector<TeamCounter> next(2 * slots);
  TeamCounter done[2];
  args.packing = {next.data(), &done[0], slots, sizes.packing};
  args.steps = {next.data() + slots, &done[1], slots, sizes.step};
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t) { kernel(args, begin); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fwd(const Tensor& projected, const Tensor& w_hh, const Tensor& h0_,
                                               const Tensor& c0_, const std::optional<Tensor>& seed, double p,
                                               bool reverse, bool keep, bool) {
  const Tensor weight = contiguous(w_hh), h0 = contiguous(h0_), c0 = contiguous(c0_);
  STD_TORCH_CHECK(projected.dim() == 3 && projected.size(2) % 4 == 0 && projected.is_contiguous(),
                  "projected must have shape [T, B, 4H] and be contiguous");
  const int64_t time = projected.size(0), batch = projected.size(1), hidden = projected.size(2) / 4;
  LstmArgs args = arguments({time, batch, hidden}, dtype_of(projected, "projected"), weight, c0, seed, p, reverse);
  STD_TORCH_CHECK(h0.dim() == 2 && h0.size(0) == batch && h0.size(1) == hidden && dtype_of(h0, "h0") == args.state,
                  "h0 must have the shape and dtype of c0");
  Tensor y = torch::stable::new_empty(projected, {time, batch, hidden});
  Tensor cells = torch::stable::new_empty(projected, {keep ? time : 0, batch, hidden}, ScalarType::Float);
  if (y.numel() == 0) return {y, torch::stable::clone(h0), torch::stable::clone(c0), cells};
  Tensor h_n = torch::stable::empty_like(h0), c_n = torch::stable::empty_like(c0);
  for (const Tensor* x : {&y, &cells}) prefer_huge_pages(*x);
  args.projected = projected.const_data_ptr();
  args.h0 = h0.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.h_n = h_n.mutable_data_ptr();
  args.c_n = c_n.mutable_data_ptr();
  args.gates = keep ? projected.mutable_data_ptr() : nullptr;
  args.cells = keep ? static_cast<float*>(cells.mutable_data_ptr()) : nullptr;
  launch(lstm_fwd_kernel, args, projected, false);
  return {y, h_n, c_n, cells};
}

std::tuple<Tensor, Tensor> bwd(const std::optional<Tensor>& dy_, const std::optional<Tensor>& dh_,
                               const std::optional<Tensor>& dc_, const Tensor& gates, const Tensor& cells_,
                               const Tensor& c0_, const Tensor& w_hh, const std::optional<Tensor>& seed, double p,
                               bool reverse, bool) {
  const Tensor cells = contiguous(cells_), c0 = contiguous(c0_), weight = contiguous(w_hh);
  const std::optional<Tensor> dy = contiguous(dy_), dh = contiguous(dh_), dc = contiguous(dc_);
  STD_TORCH_CHECK(cells.dim() == 3 && cells.scalar_type() == ScalarType::Float, "cells must be float32 [T, B, H]");
  const int64_t time = cells.size(0), batch = cells.size(1), hidden = cells.size(2);
  LstmArgs args = arguments({time, batch, hidden}, dtype_of(gates, "gates"), weight, c0, seed, p, reverse);
  STD_TORCH_CHECK(gates.numel() == 4 * cells.numel() && gates.is_contiguous(),
                  "gates must be what lstm_fwd(keep=True) left in projected");
  STD_TORCH_CHECK(!dy.has_value() || (dy->numel() == cells.numel() && dtype_of(*dy, "dy") == args.dtype),
                  "dy must have shape [T, B, H] and the dtype of the input");
  for (const std::optional<Tensor>* x : {&dh, &dc})
    STD_TORCH_CHECK(!x->has_value() || ((*x)->numel() == batch * hidden && dtype_of(**x, "dh, dc") == args.state),
                    "dh and dc must have the shape and dtype of c0");
  Tensor dh0 = torch::stable::new_empty(cells, {batch, hidden}), dc0 = torch::stable::empty_like(dh0);
  if (dh0.numel() == 0) return {dh0, dc0};
  args.dy = data(dy);
  args.dh = data(dh);
  args.dc = data(dc);
  args.gates = gates.mutable_data_ptr();
  args.cells = static_cast<float*>(const_cast<void*>(cells.const_data_ptr()));
  args.dh0 = static_cast<float*>(dh0.mutable_data_ptr());
  args.dc0 = static_cast<float*>(dc0.mutable_data_ptr());
  launch(lstm_bwd_kernel, args, gates, true);
  return {dh0, dc0};
}

}  // namespace
}  // namespace fastlm

// The last argument of both, TF32, is for GPUs: vectors multiply all of a float32.
STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("lstm_fwd", TORCH_BOX(&fastlm::fwd));
  m.impl("lstm_bwd", TORCH_BOX(&fastlm::bwd));
}
#endif
