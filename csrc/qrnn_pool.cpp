// QRNN pooling on the CPU: from pre-activations [T, B, kH] to h [T, B, H], and the adjoint. A work item walks a run of
// channels of one batch row through time, its state in the first-level cache: one pass over memory. The backward pass
// goes through time in chunks of kEvery steps from the back and recomputes each from the state kept before it.
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

constexpr int64_t kPart = 128;  // channels of a chunk in the backward pass: its tape stays in the first-level cache

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
  const auto [batch, hidden, run, runs] = a.channels;
  alignas(64) float state[kChannels], buffer[kChannels + kDraw + 3];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / runs, channel = item % runs * run, count = lesser(run, hidden - channel);
    load_state(a.c0, a.state, b * hidden + channel, count, state);
    for (int64_t step = 0; step < a.steps; ++step) {
      const int64_t row = row_of(a, step, b);
      if (a.kept != nullptr && step % kEvery == 0)
        store_state(a.kept, DType::f32, (step / kEvery * batch + b) * hidden + channel, count, state);
      const float* factors = draw_factors(a, row * hidden + channel, count, buffer);
      const T *gz = at<T>(a.gates, row * kGates * hidden + channel), *gf = gz + hidden, *go = gf + hidden,
              *gi = go + hidden;
      T* h = static_cast<T*>(a.h) + row * hidden + channel;
      for_each_vector(count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        const vec factor = factors == nullptr ? splat(a.scale) : load(factors + j);
        const vec i = kGates == 4 ? sigmoid(load(gi + j, n)) : splat(0.0f);
        const vec c = next_cell<kGates>(load(state + j), tanh(load(gz + j, n)), factor * sigmoid(load(gf + j, n)), i);
        store(state + j, c);
        store(h + j, kGates == 2 ? c : sigmoid(load(go + j, n)) * c, n);
      });
    }
    store_state(a.c_n, a.state, b * hidden + channel, count, state);
  }
}

// What the forward half of a chunk leaves for its backward half; c[u] is the state before step u of the chunk.
struct Tape {
  alignas(64) float c[kEvery + 1][kPart], z[kEvery][kPart], f[kEvery][kPart], write[kEvery][kPart], i[kEvery][kPart];
};

// Steps first .. first + steps - 1 of channels channel .. channel + count - 1 of batch row b.
struct Chunk {
  int64_t first, steps, b, channel, count;
};

template <typename T, int kGates>
void recompute(const QrnnPoolArgs& a, const Chunk& chunk, Tape& tape) {
  const auto [batch, hidden, run, runs] = a.channels;
  alignas(64) float buffer[kPart + kDraw + 3];
  const int64_t kept = (chunk.first / kEvery * batch + chunk.b) * hidden + chunk.channel;
  load_state(a.kept, DType::f32, kept, chunk.count, tape.c[0]);
  for (int64_t u = 0; u < chunk.steps; ++u) {
    const int64_t row = row_of(a, chunk.first + u, chunk.b);
    const float* factors = draw_factors(a, row * hidden + chunk.channel, chunk.count, buffer);
    const T *gz = at<T>(a.gates, row * kGates * hidden + chunk.channel), *gf = gz + hidden, *gi = gf + 2 * hidden;
    for_each_vector(chunk.count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      const vec z = tanh(load(gz + j, n)), f = sigmoid(load(gf + j, n));
      const vec write = f * (factors == nullptr ? splat(a.scale) : load(factors + j));
      const vec i = kGates == 4 ? sigmoid(load(gi + j, n)) : splat(0.0f);
      store(tape.c[u + 1] + j, next_cell<kGates>(load(tape.c[u] + j), z, write, i));
      store(tape.z[u] + j, z);
      store(tape.f[u] + j, f);
      store(tape.write[u] + j, write);
      if (kGates == 4) store(tape.i[u] + j, i);
    });
  }
}

// The adjoint of a chunk; `sum` is dL/dc of its channels, of the state after the chunk on entry and before it on exit.
template <typename T, int kGates>
void chunk_backward(const QrnnPoolArgs& a, const Chunk& chunk, const Tape& tape, float* sum) {
  const int64_t hidden = a.channels.hidden;
  for (int64_t u = chunk.steps - 1; u >= 0; --u) {
    const int64_t row = row_of(a, chunk.first + u, chunk.b);
    const T* go = at<T>(a.gates, (row * kGates + 2) * hidden + chunk.channel);
    const T* dh = at<T>(a.dh, row * hidden + chunk.channel);
    T *dz = static_cast<T*>(a.dgates) + row * kGates * hidden + chunk.channel, *df = dz + hidden, *dout = df + hidden,
      *di = dout + hidden;
    for_each_vector(chunk.count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      const vec z = load(tape.z[u] + j), f = load(tape.f[u] + j), write = load(tape.write[u] + j);
      const vec before = load(tape.c[u] + j);
      vec total = dh == nullptr ? splat(0.0f) : load(dh + j, n);
      if (kGates > 2) {
        const vec o = sigmoid(load(go + j, n));
        store(dout + j, total * load(tape.c[u + 1] + j) * o * (1.0f - o), n);
        total *= o;
      }
      total += load(sum + j);
      const vec i = kGates == 4 ? load(tape.i[u] + j) : write;
      store(dz + j, total * i * (1.0f - z * z), n);
      store(df + j, total * (kGates == 4 ? -before : z - before) * write * (1.0f - f), n);
      if (kGates == 4) store(di + j, total * z * i * (1.0f - i), n);
      store(sum + j, total - write * total);
    });
  }
}

template <typename T, int kGates>
void backward(const QrnnPoolArgs& a, int64_t begin, int64_t end) {
  const auto [batch, hidden, run, runs] = a.channels;
  alignas(64) float sum[kChannels];
  Tape tape;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / runs, channel = item % runs * run, count = lesser(run, hidden - channel);
    load_state(a.dc_n, a.state, b * hidden + channel, count, sum);
    for (int64_t first = (a.steps + kEvery - 1) / kEvery * kEvery - kEvery; first >= 0; first -= kEvery) {
      for (int64_t part = 0; part < count; part += kPart) {
        const Chunk chunk{first, lesser(kEvery, a.steps - first), b, channel + part, lesser(kPart, count - part)};
        recompute<T, kGates>(a, chunk, tape);
        chunk_backward<T, kGates>(a, chunk, tape, sum + part);
      }
    }
    store_state(a.dc0, DType::f32, b * hidden + channel, count, sum);
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
  args.channels = split_channels(gates.size(1), gates.size(2) / args.gates_per_cell, torch::stable::get_num_threads());
  args.dtype = args.state = dtype_of(gates, "gates");
  args.reverse = reverse;
  const bool masked = seed.has_value() && philox_threshold(zoneout) > 0;
  args.seed = masked ? read_seed(*seed) : 0;
  args.threshold = masked ? int64_t(philox_threshold(zoneout)) : -1;
  args.scale = seed.has_value() ? 1.0f : float(1.0 - zoneout);
  return args;
}

void launch(void (*kernel)(const QrnnPoolArgs&, int64_t, int64_t), const QrnnPoolArgs& args) {
  const Channels& channels = args.channels;
  const int64_t grain = 1 + 16384 / (channels.run * (args.steps + 1));  // items worth a thread
  torch::stable::parallel_for(0, channels.batch * channels.runs, grain,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& gates_, const std::optional<Tensor>& c0_,
                                       const std::optional<Tensor>& seed, const std::string& pooling, double zoneout,
                                       bool reverse, bool keep) {
  const Tensor gates = contiguous(gates_);
  QrnnPoolArgs args = arguments(gates, seed, pooling, zoneout, reverse);
  const auto [batch, hidden, run, runs] = args.channels;
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
  const auto [batch, hidden, run, runs] = args.channels;
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
