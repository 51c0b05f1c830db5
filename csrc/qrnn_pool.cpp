// QRNN pooling on the CPU: from pre-activations [T, B, kH] to h [T, B, H], and the adjoint. A thread walks a block of
// channels through time, their state in its caches: one pass over memory. The backward pass goes through time in chunks
// of kEvery steps from the back and recomputes each from the state kept before it.
#include "channels.h"

namespace fastlm {

constexpr int64_t kEvery = 8;  // steps from one kept state to the next; fastlm/ops/qrnn_pool.py has the same

struct QrnnPoolArgs {
  const void *gates, *c0;  // c0 null: zeros
  const void *dh, *dc_n;   // backward only, null: zeros
  void *h, *c_n;           // forward only
  void* dgates;            // backward only
  float *kept, *dc0;       // kept: written forward unless null, read backward; dc0: backward only
  int64_t steps;
  Channels channels;
  uint64_t seed;
  int64_t threshold;   // a mask keeps lanes >= threshold; negative: no mask
  float scale;         // of the write gate when there is no mask
  DType dtype, state;  // of gates, h and their gradients; of c0, c_n and dc_n
  int gates_per_cell;  // 2 "f", 3 "fo", 4 "ifo"
  bool reverse;
};

}  // namespace fastlm

#ifdef FASTLM_ISA
#include "philox.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kRun = 1024;  // channels at a time in the forward pass
constexpr int64_t kPart = 128;  // and in the backward pass: the tape of a chunk stays in the first-level cache

template <typename T>
const T* at(const void* x, int64_t offset) {
  return x == nullptr ? nullptr : static_cast<const T*>(x) + offset;
}

// Row t B + b of step `step`.
FASTLM_INLINE int64_t row_of(const QrnnPoolArgs& a, int64_t step, int64_t b) {
  return (a.reverse ? a.steps - 1 - step : step) * a.channels.batch + b;
}

// Zoneout factors of `count` elements from `first` on, null when there is no mask; `buffer` has kDraw + 3 to spare.
const float* draw_factors(const QrnnPoolArgs& a, int64_t first, int64_t count, float* buffer) {
  if (a.threshold < 0) return nullptr;
  const int64_t lead = first & 3;
  const uint32_t last_dropped = uint32_t(a.threshold - 1);  // the threshold itself may be 2^32
  uint32_t lanes[kDraw];
  for (int64_t done = 0; done < lead + count; done += kDraw) {
    draw_lanes(a.seed, uint64_t(first - lead + done), kZoneoutStream, lanes);
    for (int64_t i = 0; i < kDraw; ++i) buffer[done + i] = lanes[i] > last_dropped ? 1.0f : 0.0f;
  }
  return buffer + lead;
}

template <int kGates>
FASTLM_INLINE vec next_cell(vec c, vec z, vec write, vec i) {
  return kGates == 4 ? c + (i * z - write * c) : c + write * (z - c);
}

template <typename T, int kGates>
void forward(const QrnnPoolArgs& a, int64_t begin, int64_t end) {
  const int64_t hidden = a.channels.hidden;
  alignas(64) float state[kBlock], buffer[kRun + kDraw + 3];
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = lesser(block + kBlock, end), first_b = block / hidden, last_b = (stop - 1) / hidden;
    load_state(a.c0, a.state, block, stop - block, state);
    for (int64_t step = 0; step < a.steps; ++step) {
      if (a.kept != nullptr && step % kEvery == 0)
        store_state(a.kept, DType::f32, step / kEvery * a.channels.count + block, stop - block, state);
      for (int64_t first = block; first < stop;) {
        const Segment s = segment_at(a.channels, first, stop, kRun);
        const int64_t row = row_of(a, step, s.b);
        const int64_t next = s.b < last_b ? row + 1 : row_of(a, lesser(step + 1, a.steps - 1), first_b);
        const float* factors = draw_factors(a, row * hidden + s.channel, s.count, buffer);
        const T *gz = at<T>(a.gates, row * kGates * hidden + s.channel), *gf = gz + hidden, *go = gf + hidden,
                *gi = go + hidden, *ahead = gz + (next - row) * kGates * hidden;
        T* h = static_cast<T*>(a.h) + row * hidden + s.channel;
        float* c = state + (first - block);
        for_each_vector(s.count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
          for (int k = 0; k < kGates; ++k) prefetch(ahead + k * hidden + j);
          const vec factor = factors == nullptr ? splat(a.scale) : load(factors + j, n);
          const vec i = kGates == 4 ? sigmoid(load(gi + j, n)) : splat(0.0f);
          const vec after =
              next_cell<kGates>(load(c + j, n), tanh(load(gz + j, n)), factor * sigmoid(load(gf + j, n)), i);
          store(c + j, after, n);
          store(h + j, kGates == 2 ? after : sigmoid(load(go + j, n)) * after, n);
        });
        first += s.count;
      }
    }
    store_state(a.c_n, a.state, block, stop - block, state);
  }
}

// What the forward half of a chunk leaves for its backward half; c[u] is the state before step u of the chunk. A write
// gate f that zoneout masks is 0.
struct Tape {
  alignas(64) float c[kEvery + 1][kPart], z[kEvery][kPart], f[kEvery][kPart], i[kEvery][kPart];
};

// Steps first .. first + steps - 1 of a segment; and how far it is from there to the part of memory that comes next.
struct Chunk {
  int64_t first, steps;
  Segment segment;
  int64_t rows_ahead, channels_ahead;
};

template <typename T, int kGates>
void recompute(const QrnnPoolArgs& a, const Chunk& chunk, Tape& tape) {
  const int64_t hidden = a.channels.hidden;
  const auto [b, channel, first, count] = chunk.segment;
  const int64_t ahead = chunk.rows_ahead * kGates * hidden + chunk.channels_ahead;
  alignas(64) float buffer[kPart + kDraw + 3];
  load_state(a.kept, DType::f32, chunk.first / kEvery * a.channels.count + first, count, tape.c[0]);
  for (int64_t u = 0; u < chunk.steps; ++u) {
    const int64_t row = row_of(a, chunk.first + u, b);
    const float* factors = draw_factors(a, row * hidden + channel, count, buffer);
    const T *gz = at<T>(a.gates, row * kGates * hidden + channel), *gf = gz + hidden, *gi = gf + 2 * hidden;
    for_each_vector(count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      prefetch(gz + ahead + j), prefetch(gf + ahead + j);
      if (kGates == 4) prefetch(gi + ahead + j);
      const vec z = tanh(load(gz + j, n)), gate = sigmoid(load(gf + j, n));
      const vec f = factors == nullptr ? gate : gate * load(factors + j);
      const vec i = kGates == 4 ? sigmoid(load(gi + j, n)) : splat(0.0f);
      store(tape.c[u + 1] + j, next_cell<kGates>(load(tape.c[u] + j), z, f * a.scale, i));
      store(tape.z[u] + j, z);
      store(tape.f[u] + j, f);
      if (kGates == 4) store(tape.i[u] + j, i);
    });
  }
}

// The adjoint of a chunk; `sum` is dL/dc of its channels, of the state after the chunk on entry and before it on exit.
template <typename T, int kGates>
void chunk_backward(const QrnnPoolArgs& a, const Chunk& chunk, const Tape& tape, float* sum) {
  const int64_t hidden = a.channels.hidden;
  const auto [b, channel, first, count] = chunk.segment;
  const int64_t ahead = chunk.rows_ahead * hidden + chunk.channels_ahead;
  const int64_t gates_ahead = chunk.rows_ahead * kGates * hidden + chunk.channels_ahead;
  for (int64_t u = chunk.steps - 1; u >= 0; --u) {
    const int64_t row = row_of(a, chunk.first + u, b);
    const T* go = at<T>(a.gates, (row * kGates + 2) * hidden + channel);
    const T* dh = at<T>(a.dh, row * hidden + channel);
    T *dz = static_cast<T*>(a.dgates) + row * kGates * hidden + channel, *df = dz + hidden, *dout = df + hidden,
      *di = dout + hidden;
    for_each_vector(count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      const vec z = load(tape.z[u] + j), f = load(tape.f[u] + j), write = f * a.scale, before = load(tape.c[u] + j);
      vec total = dh == nullptr ? splat(0.0f) : load(dh + j, n);
      if (dh != nullptr) prefetch(dh + ahead + j);
      if (kGates > 2) {
        prefetch(go + gates_ahead + j);
        const vec o = sigmoid(load(go + j, n));
        const vec through = total * o;
        store(dout + j, through * (1.0f - o) * load(tape.c[u + 1] + j), n);
        total = through;
      }
      total += load(sum + j, n);
      const vec i = kGates == 4 ? load(tape.i[u] + j) : write;
      store(dz + j, total * i * (1.0f - z * z), n);
      store(df + j, total * (kGates == 4 ? -before : z - before) * (write * (1.0f - f)), n);
      if (kGates == 4) store(di + j, total * z * i * (1.0f - i), n);
      store(sum + j, total - write * total, n);
    });
  }
}

template <typename T, int kGates>
void backward(const QrnnPoolArgs& a, int64_t begin, int64_t end) {
  alignas(64) float sum[kBlock];
  Tape tape;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = lesser(block + kBlock, end);
    load_state(a.dc_n, a.state, block, stop - block, sum);
    for (int64_t first = (a.steps + kEvery - 1) / kEvery * kEvery - kEvery; first >= 0; first -= kEvery) {
      for (int64_t part = block; part < stop;) {
        Chunk chunk{first, lesser(kEvery, a.steps - first), segment_at(a.channels, part, stop, kPart)};
        part += chunk.segment.count;
        const bool more = part < stop;
        const Segment next = segment_at(a.channels, more ? part : block, stop, kPart);
        chunk.rows_ahead =
            row_of(a, more ? first : greater(first - kEvery, 0), next.b) - row_of(a, first, chunk.segment.b);
        chunk.channels_ahead = next.channel - chunk.segment.channel;
        recompute<T, kGates>(a, chunk, tape);
        chunk_backward<T, kGates>(a, chunk, tape, sum + (chunk.segment.first - block));
      }
    }
    store_state(a.dc0, DType::f32, block, stop - block, sum);
  }
}

}  // namespace

void qrnn_pool_fwd(const QrnnPoolArgs& a, int64_t begin, int64_t end) {
  FASTLM_DISPATCH(a.dtype, a.gates_per_cell == 2   ? forward<scalar_t, 2>(a, begin, end)
                           : a.gates_per_cell == 3 ? forward<scalar_t, 3>(a, begin, end)
                                                   : forward<scalar_t, 4>(a, begin, end));
}

void qrnn_pool_bwd(const QrnnPoolArgs& a, int64_t begin, int64_t end) {
  FASTLM_DISPATCH(a.dtype, a.gates_per_cell == 2   ? backward<scalar_t, 2>(a, begin, end)
                           : a.gates_per_cell == 3 ? backward<scalar_t, 3>(a, begin, end)
                                                   : backward<scalar_t, 4>(a, begin, end));
}

}  // namespace fastlm::FASTLM_ISA

#else
#include <string>

#include "common.h"
#include "philox.h"

FASTLM_KERNEL(qrnn_pool_fwd, void, const QrnnPoolArgs&, int64_t, int64_t)
FASTLM_KERNEL(qrnn_pool_bwd, void, const QrnnPoolArgs&, int64_t, int64_t)

namespace fastlm {
namespace {

// What both directions share.
QrnnPoolArgs arguments(const Tensor& gates, const std::optional<Tensor>& seed, const std::string& pooling,
                       double zoneout, bool reverse) {
  QrnnPoolArgs args{};
  args.gates_per_cell = pooling == "f" ? 2 : pooling == "fo" ? 3 : pooling == "ifo" ? 4 : 0;
  STD_TORCH_CHECK(args.gates_per_cell != 0, "pooling must be f, fo or ifo, got ", pooling);
  STD_TORCH_CHECK(gates.dim() == 3 && gates.size(2) % args.gates_per_cell == 0, "gates must have shape [T, B, k H]");
  args.gates = gates.const_data_ptr();
  args.steps = gates.size(0);
  const int64_t batch = gates.size(1), hidden = gates.size(2) / args.gates_per_cell;
  args.channels = {batch, hidden, batch * hidden};
  args.dtype = args.state = dtype_of(gates, "gates");
  args.reverse = reverse;
  const bool masked = seed.has_value() && philox_threshold(zoneout) > 0;
  args.seed = masked ? read_seed(*seed) : 0;
  args.threshold = masked ? int64_t(philox_threshold(zoneout)) : -1;
  args.scale = seed.has_value() ? 1.0f : float(1.0 - zoneout);
  return args;
}

void launch(void (*kernel)(const QrnnPoolArgs&, int64_t, int64_t), const QrnnPoolArgs& args) {
  split_channels(args.channels, args.steps, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& gates_, const std::optional<Tensor>& c0_,
                                       const std::optional<Tensor>& seed, const std::string& pooling, double zoneout,
                                       bool reverse, bool keep) {
  const Tensor gates = contiguous(gates_);
  QrnnPoolArgs args = arguments(gates, seed, pooling, zoneout, reverse);
  const auto [batch, hidden, count] = args.channels;
  STD_TORCH_CHECK(!c0_.has_value() || (c0_->dim() == 2 && c0_->size(0) == batch && c0_->size(1) == hidden),
                  "c0 must have shape [B, H]");
  const std::optional<Tensor> c0 = contiguous(c0_);
  Tensor h = torch::stable::new_empty(gates, {args.steps, batch, hidden});
  Tensor c_n = torch::stable::new_empty(c0.has_value() ? *c0 : gates, {batch, hidden});
  const int64_t chunks = keep ? (args.steps + kEvery - 1) / kEvery : 0;
  Tensor kept = torch::stable::new_empty(gates, {chunks, batch, hidden}, ScalarType::Float);
  if (c_n.numel() == 0) return {h, c_n, kept};
  prefer_huge_pages(h);
  args.c0 = data(c0);
  args.state = dtype_of(c_n, "c0");
  args.h = h.mutable_data_ptr();
  args.c_n = c_n.mutable_data_ptr();
  args.kept = keep ? static_cast<float*>(kept.mutable_data_ptr()) : nullptr;
  launch(qrnn_pool_fwd_kernel, args);
  return {h, c_n, kept};
}

std::tuple<Tensor, Tensor> bwd(const std::optional<Tensor>& dh_, const std::optional<Tensor>& dc_n_,
                               const Tensor& gates_, const Tensor& kept_, const std::optional<Tensor>& seed,
                               const std::string& pooling, double zoneout, bool reverse) {
  const Tensor gates = contiguous(gates_), kept = contiguous(kept_);
  const std::optional<Tensor> dh = contiguous(dh_), dc_n = contiguous(dc_n_);
  QrnnPoolArgs args = arguments(gates, seed, pooling, zoneout, reverse);
  const auto [batch, hidden, count] = args.channels;
  STD_TORCH_CHECK(kept.dim() == 3 && kept.size(0) == (args.steps + kEvery - 1) / kEvery && kept.size(1) == batch &&
                      kept.size(2) == hidden && kept.scalar_type() == ScalarType::Float,
                  "kept must be what qrnn_pool_fwd(keep=True) returned");
  STD_TORCH_CHECK(
      !dh.has_value() || (dh->numel() == args.steps * batch * hidden && dh->scalar_type() == gates.scalar_type()),
      "dh must have shape [T, B, H] and the dtype of gates");
  STD_TORCH_CHECK(!dc_n.has_value() || dc_n->numel() == batch * hidden, "dc_n must have shape [B, H]");
  Tensor dgates = torch::stable::empty_like(gates);
  Tensor dc0 = torch::stable::new_empty(kept, {batch, hidden});
  if (dc0.numel() == 0) return {dgates, dc0};
  prefer_huge_pages(dgates);
  args.dh = data(dh);
  args.dc_n = data(dc_n);
  if (dc_n.has_value()) args.state = dtype_of(*dc_n, "dc_n");
  args.dgates = dgates.mutable_data_ptr();
  args.kept = static_cast<float*>(const_cast<void*>(kept.const_data_ptr()));  // read only in this direction
  args.dc0 = static_cast<float*>(dc0.mutable_data_ptr());
  launch(qrnn_pool_bwd_kernel, args);
  return {dgates, dc0};
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("qrnn_pool_fwd", TORCH_BOX(&fastlm::fwd));
  m.impl("qrnn_pool_bwd", TORCH_BOX(&fastlm::bwd));
}
#endif
