// The recurrence of an LSTM layer on CUDA, from projected inputs [T, B, 4H] to y [T, B, H], and its adjoint: which way
// a call goes, and the way that every device and size has. There a step is a product of the vendor's library with the
// weight, masked once for a pass, and a kernel for all that is element by element: forward it leaves the activated
// gates in the place of `projected`, which backward turns into the gradients of their pre-activations.
#include "common.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 128;  // at B = 20 and H = 1150 that is 180 blocks: they wait for latency, not for bytes

// One step. The state is in the dtype of the input or, if wide, in float32.
struct ForwardStep {
  const float *product, *before;  // [B, 4H], of h_{t-1} and the weight; c_{t-1} [B, H]
  void* gates;                    // [B, 4H], those of the input; activated in place if kept
  float* after;                   // c_t
  void *y, *h_n, *c_n;            // [B, H]; the last two at the last step, else null
  int64_t batch, hidden;
  bool keep, wide;
};

struct BackwardStep {
  void* gates;                  // [B, 4H], activated; their gradients come over them
  const float *cells, *before;  // [B, H], c_t and c_{t-1}
  const void* dy;               // [B, H] or null, zeros
  const float *given,
      *product;      // [B, H] or null, zeros: what a later state asks for of h_t, by the caller, by a product
  const float* dc;   // the same of c_t
  float* dc_before;  // of c_{t-1}; may be dc itself
  int64_t batch, hidden;
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename T>
__device__ __forceinline__ void store_state(void* state, bool wide, int64_t at, float x) {
  if (wide) {
    static_cast<float*>(state)[at] = x;
  } else {
    static_cast<T*>(state)[at] = from_float<T>(x);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) lstm_forward_step_kernel(ForwardStep a) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= a.hidden) return;
  for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
    const int64_t at = b * a.hidden + j, row = 4 * b * a.hidden + j;
    T* gates = static_cast<T*>(a.gates) + row;
    const float* product = a.product + row;
    const float i = sigmoid(to_float(gates[0]) + product[0]);
    const float f = sigmoid(to_float(gates[a.hidden]) + product[a.hidden]);
    const float g = tanhf(to_float(gates[2 * a.hidden]) + product[2 * a.hidden]);
    const float o = sigmoid(to_float(gates[3 * a.hidden]) + product[3 * a.hidden]);
    const float c = f * a.before[at] + i * g, h = o * tanhf(c);
    static_cast<T*>(a.y)[at] = from_float<T>(h);
    a.after[at] = c;
    if (a.keep) {
      gates[0] = from_float<T>(i);
      gates[a.hidden] = from_float<T>(f);
      gates[2 * a.hidden] = from_float<T>(g);
      gates[3 * a.hidden] = from_float<T>(o);
    }
    if (a.h_n != nullptr) {
      store_state<T>(a.h_n, a.wide, at, h);
      store_state<T>(a.c_n, a.wide, at, c);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) lstm_backward_step_kernel(BackwardStep a) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= a.hidden) return;
  for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
    const int64_t at = b * a.hidden + j;
    T* gates = static_cast<T*>(a.gates) + 4 * b * a.hidden + j;
    const float i = to_float(gates[0]), f = to_float(gates[a.hidden]);
    const float g = to_float(gates[2 * a.hidden]), o = to_float(gates[3 * a.hidden]);
    const float squashed = tanhf(a.cells[at]);
    float dh = a.dy == nullptr ? 0.0f : to_float(static_cast<const T*>(a.dy)[at]);
    if (a.given != nullptr) dh += a.given[at];
    if (a.product != nullptr) dh += a.product[at];
    const float dc = (a.dc == nullptr ? 0.0f : a.dc[at]) + dh * o * (1.0f - squashed * squashed);
    gates[0] = from_float<T>(dc * g * i * (1.0f - i));
    gates[a.hidden] = from_float<T>(dc * a.before[at] * f * (1.0f - f));
    gates[2 * a.hidden] = from_float<T>(dc * i * (1.0f - g * g));
    gates[3 * a.hidden] = from_float<T>(dh * squashed * o * (1.0f - o));
    a.dc_before[at] = dc * f;
  }
}

}  // namespace
}  // namespace fastlm

#ifndef FASTLM_EMULATED
#include <string_view>

#include "lstm_args.h"

namespace fastlm {
namespace {

constexpr int64_t kFewestSteps = 8;  // below, loading the weights of a persistent kernel costs more than it saves

// What a forward pass reads and writes, all contiguous and none of it empty.
struct Forward {
  const Tensor &projected, &weight, &h0, &c0;
  const std::optional<Tensor>& seed;  // none: no mask
  double p;
  bool reverse, keep, tf32;
  Tensor y, h_n, c_n, cells;
  int64_t time() const { return y.size(0); }
};

struct Backward {
  const std::optional<Tensor>&dy, &dh, &dc;
  const Tensor &gates, &cells, &c0, &weight;
  const std::optional<Tensor>& seed;
  double p;
  bool reverse, tf32;
  Tensor dh0, dc0;
  int64_t time() const { return cells.size(0); }
};

float* cells_at(const Tensor& cells, int64_t step) {
  return static_cast<float*>(cells.mutable_data_ptr()) + step * cells.size(1) * cells.size(2);
}

std::optional<Tensor> in_float(const std::optional<Tensor>& x) {
  return x.has_value() ? std::optional<Tensor>(torch::stable::to(*x, ScalarType::Float)) : std::nullopt;
}

// The way of h between blocks that FASTLM_CUDA_EXCHANGE names, for tests; else none.
std::optional<lstm::Exchange> wanted_exchange() {
  constexpr std::pair<const char*, lstm::Exchange> kNames[] = {{"data", lstm::Exchange::data},
                                                               {"flags", lstm::Exchange::flags},
                                                               {"grid", lstm::Exchange::grid},
                                                               {"multicast", lstm::Exchange::multicast},
                                                               {"cluster", lstm::Exchange::cluster}};
  const char* name = std::getenv("FASTLM_CUDA_EXCHANGE");
  for (const auto& [known, exchange] : kNames)
    if (name != nullptr && std::string_view(name) == known) return exchange;
  return std::nullopt;
}

// What a plan may use of a device. Clusters are counted for blocks that have a multiprocessor each.
lstm::Device budget_of(const Device& device) {
  lstm::Device budget{device.multiprocessors, device.shared_memory, {}};
  lstm::Plan probe{};
  probe.tiling = lstm::kMulticast[0];
  probe.exchange = lstm::Exchange::multicast;
  probe.slices = probe.replicas = 1;
  probe.shared = device.shared_memory;
  for (int i = 0; i < 5 && device.capability >= 90; ++i) {
    probe.cluster = probe.groups = 1 << i;
    budget.clusters[i] = lstm::resident_forward(probe) / probe.cluster;
  }
  return budget;
}

// The quickest plan by estimate; its time is 0 where there is none.
template <bool BACKWARD>
lstm::Plan quickest(int64_t H, int64_t B, bool split, std::optional<lstm::Exchange> wanted,
                    const lstm::Device& budget) {
  using lstm::Exchange;
  lstm::Plan best{};
  const auto take = [&](const lstm::Plan& p) {
    if (p.nanoseconds > 0 && lstm::better(p, best)) best = p;
  };
  for (const Exchange exchange :
       {Exchange::data, Exchange::flags, Exchange::grid, Exchange::multicast, Exchange::cluster}) {
    // The last two are of Hopper, and of the backward the sums of a group within a cluster, beside words that come.
    const bool clusters = exchange == Exchange::multicast || exchange == Exchange::cluster;
    if (wanted.has_value() ? exchange != *wanted : exchange == Exchange::flags || exchange == Exchange::grid) continue;
    if constexpr (BACKWARD) {
      take(lstm::plan_backward(H, B, split, clusters ? Exchange::data : exchange, clusters, budget));
    } else {
      take(lstm::plan_forward(H, B, split, exchange, budget));
    }
  }
  return best;
}

// The plan of a layer on a device: the quickest one whose blocks the driver runs at once, on fewer multiprocessors
// with more units each where it has no room for as many as there are. Looked for once.
template <bool BACKWARD>
lstm::Plan plan_of(const Device& device, int64_t H, int64_t B, bool split) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int, int64_t, int64_t, bool, int>, lstm::Plan> known;
  const std::optional<lstm::Exchange> wanted = wanted_exchange();
  const std::tuple key(device.index, device.multiprocessors, H, B, split, wanted.has_value() ? int(*wanted) : -1);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  lstm::Device budget = budget_of(device);
  lstm::Plan plan = quickest<BACKWARD>(H, B, split, wanted, budget);
  while (plan.nanoseconds > 0) {
    const int room = BACKWARD ? lstm::resident_backward(plan) : lstm::resident_forward(plan);
    if (room >= plan.blocks()) break;
    budget.multiprocessors = std::min(plan.blocks() - 1, std::max(room, budget.multiprocessors / 2));
    plan = quickest<BACKWARD>(H, B, split, wanted, budget);
  }
  cudaGetLastError();  // what the driver has refused is no error of a kernel to come
  return known[key] = plan;
}

// Whether a persistent kernel may serve: there are steps enough, and all its blocks can be made to run at once.
bool may_persist(const Device& device, int64_t steps, int64_t B, int64_t H) {
  return device.cooperative && steps >= kFewestSteps && std::max({steps, B, H}) < INT32_MAX;
}

// Whether there is a plan, and a quicker one than the other way; a test that names an exchange wants it in any case.
bool worth_while(const lstm::Plan& plan, int64_t H, int64_t B, bool split) {
  if (plan.nanoseconds == 0) return false;
  return wanted_exchange().has_value() || plan.nanoseconds < lstm::alternating_time(H, B, split);
}

// Whether the launch is done; not where others have taken multiprocessors since the plan was made, and not where the
// driver, for reasons of its own, does not launch blocks or clusters in this way.
bool launched(cudaError_t error) {
  constexpr cudaError_t kRefusals[] = {cudaErrorCooperativeLaunchTooLarge, cudaErrorInvalidClusterSize,
                                       cudaErrorInvalidConfiguration, cudaErrorNotSupported,
                                       cudaErrorLaunchOutOfResources};
  for (const cudaError_t refusal : kRefusals)
    if (error == refusal) {
      cudaGetLastError();
      return false;
    }
  STD_CUDA_CHECK(error);
  return true;
}

uint32_t* words(const Tensor& x) { return static_cast<uint32_t*>(x.mutable_data_ptr()); }

// One kernel for all steps, with the weights on the chip; false where no plan fits.
bool persistent_forward(const Device& device, const Forward& call) {
  const int64_t T = call.time(), B = call.y.size(1), H = call.y.size(2);
  if (!may_persist(device, T, B, H)) return false;
  const bool split = call.y.scalar_type() == ScalarType::Float && !call.tf32;
  const lstm::Plan plan = plan_of<false>(device, H, B, split);
  if (!worth_while(plan, H, B, split)) return false;
  const auto space = [&](int64_t words) { return torch::stable::new_empty(call.y, {words}, ScalarType::Int); };
  const Tensor exchange = space(lstm::forward_exchange(plan, T, B, H)), flags = space(lstm::flag_words(plan));
  return launched(lstm::run_forward({.plan = plan,
                                     .T = int(T),
                                     .B = int(B),
                                     .H = int(H),
                                     .dtype = dtype_of(call.y, "projected"),
                                     .state = dtype_of(call.c0, "c0"),
                                     .reverse = call.reverse,
                                     .p = call.p,
                                     .seed = static_cast<const int64_t*>(data(call.seed)),
                                     .weight = call.weight.const_data_ptr(),
                                     .h0 = call.h0.const_data_ptr(),
                                     .c0 = call.c0.const_data_ptr(),
                                     .gates = call.projected.mutable_data_ptr(),
                                     .cells = call.keep ? cells_at(call.cells, 0) : nullptr,
                                     .y = call.y.mutable_data_ptr(),
                                     .h_n = call.h_n.mutable_data_ptr(),
                                     .c_n = call.c_n.mutable_data_ptr(),
                                     .exchange = words(exchange),
                                     .flags = words(flags)},
                                    current_stream(call.y)));
}

bool persistent_backward(const Device& device, const Backward& call) {
  const int64_t T = call.time(), B = call.cells.size(1), H = call.cells.size(2);
  if (!may_persist(device, T, B, H)) return false;
  const bool split = call.gates.scalar_type() == ScalarType::Float && !call.tf32;
  const lstm::Plan plan = plan_of<true>(device, H, B, split);
  if (!worth_while(plan, H, B, split)) return false;
  const auto space = [&](int64_t words) { return torch::stable::new_empty(call.cells, {words}, ScalarType::Int); };
  const Tensor exchange = space(lstm::backward_exchange(plan, T, B)), flags = space(lstm::flag_words(plan));
  const Tensor peaks = torch::stable::new_zeros(call.cells, {T + 1}, ScalarType::Int);  // maxima grow from zero
  const Tensor handed = space(lstm::handed_floats(plan));
  const std::optional<Tensor> dh = in_float(call.dh), dc = in_float(call.dc);
  return launched(lstm::run_backward({.plan = plan,
                                      .T = int(T),
                                      .B = int(B),
                                      .H = int(H),
                                      .dtype = dtype_of(call.gates, "gates"),
                                      .state = dtype_of(call.c0, "c0"),
                                      .reverse = call.reverse,
                                      .p = call.p,
                                      .seed = static_cast<const int64_t*>(data(call.seed)),
                                      .weight = call.weight.const_data_ptr(),
                                      .dy = data(call.dy),
                                      .dh_n = static_cast<const float*>(data(dh)),
                                      .dc_n = static_cast<const float*>(data(dc)),
                                      .c0 = call.c0.const_data_ptr(),
                                      .cells = cells_at(call.cells, 0),
                                      .gates = call.gates.mutable_data_ptr(),
                                      .dh0 = static_cast<float*>(call.dh0.mutable_data_ptr()),
                                      .dc0 = static_cast<float*>(call.dc0.mutable_data_ptr()),
                                      .exchange = words(exchange),
                                      .flags = words(flags),
                                      .peaks = words(peaks),
                                      .handed = reinterpret_cast<float*>(words(handed))},
                                     current_stream(call.cells)));
}

Tensor masked(const Tensor& weight, const std::optional<Tensor>& seed, double p) {
  if (!seed.has_value()) return weight;
  std::array<StableIValue, 3> stack{torch::stable::detail::from(weight), torch::stable::detail::from(p),
                                    torch::stable::detail::from(*seed)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("fastlm::dropconnect_fwd", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// out = a b in float32, of float32 with factors of 11 bits or by PyTorch's setting for matrices.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out, bool tf32) {
  using torch::stable::detail::from;
  const bool whole = a.scalar_type() == ScalarType::Float;
  if (whole && tf32 && multiply_tf32(a, b, out)) return;
  std::array<StableIValue, 4> stack{from(a), from(b), whole ? from(out) : from(ScalarType::Float)};
  if (!whole) stack[3] = from(out);
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", whole ? "out" : "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // `out` once more, to be let go of
}

template <typename Step>
void launch_step(void (*kernel)(Step), const Step& step, const Tensor& x) {
  cudaLaunchConfig_t config{};
  config.gridDim.x = unsigned((step.hidden + kThreads - 1) / kThreads);
  config.gridDim.y = unsigned(step.batch < 65535 ? step.batch : 65535);
  config.blockDim.x = kThreads;
  config.stream = current_stream(x);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, step));
}

template <typename T>
void alternating_forward(const Forward& call) {
  const int64_t steps = call.time(), B = call.y.size(1), H = call.y.size(2);
  const ScalarType kind = call.y.scalar_type();
  const Tensor weight = torch::stable::transpose(masked(call.weight, call.seed, call.p), 0, 1);
  const Tensor product = torch::stable::new_empty(call.y, {B, 4 * H}, ScalarType::Float);
  const Tensor c0 = torch::stable::to(call.c0, ScalarType::Float);
  const Tensor carry = torch::stable::new_empty(call.y, {call.keep ? 0 : B, H}, ScalarType::Float);
  Tensor h = torch::stable::to(call.h0, kind), rows = torch::stable::view(call.y, {steps * B, H});
  ForwardStep step{};
  step.product = static_cast<const float*>(product.const_data_ptr());
  step.before = static_cast<const float*>(c0.const_data_ptr());
  step.batch = B, step.hidden = H;
  step.keep = call.keep, step.wide = call.h0.scalar_type() == ScalarType::Float;
  for (int64_t n = 0; n < steps; ++n) {
    const int64_t t = call.reverse ? steps - 1 - n : n;
    multiply(h, weight, product, call.tf32);
    h = torch::stable::narrow(rows, 0, t * B, B);
    step.gates = static_cast<T*>(call.projected.mutable_data_ptr()) + t * B * 4 * H;
    step.after = call.keep ? cells_at(call.cells, t) : static_cast<float*>(carry.mutable_data_ptr());
    step.y = h.mutable_data_ptr();
    if (n == steps - 1) step.h_n = call.h_n.mutable_data_ptr(), step.c_n = call.c_n.mutable_data_ptr();
    launch_step(lstm_forward_step_kernel<T>, step, call.y);
    step.before = step.after;
  }
}

template <typename T>
void alternating_backward(const Backward& call) {
  const int64_t steps = call.time(), B = call.cells.size(1), H = call.cells.size(2);
  const Tensor weight = masked(call.weight, call.seed, call.p);
  const Tensor c0 = torch::stable::to(call.c0, ScalarType::Float);
  const std::optional<Tensor> given = in_float(call.dh), dc = in_float(call.dc);
  Tensor rows = torch::stable::view(call.gates, {steps * B, 4 * H});
  BackwardStep step{};
  step.given = static_cast<const float*>(data(given));
  step.dc = static_cast<const float*>(data(dc));
  step.dc_before = static_cast<float*>(call.dc0.mutable_data_ptr());
  step.batch = B, step.hidden = H;
  for (int64_t n = steps - 1; n >= 0; --n) {
    const int64_t t = call.reverse ? steps - 1 - n : n, earlier = call.reverse ? t + 1 : t - 1;
    const Tensor gates = torch::stable::narrow(rows, 0, t * B, B);
    step.gates = gates.mutable_data_ptr();
    step.cells = cells_at(call.cells, t);
    step.before = n > 0 ? cells_at(call.cells, earlier) : static_cast<const float*>(c0.const_data_ptr());
    step.dy = call.dy.has_value() ? static_cast<const T*>(call.dy->const_data_ptr()) + t * B * H : nullptr;
    launch_step(lstm_backward_step_kernel<T>, step, call.cells);
    multiply(gates, weight, call.dh0, call.tf32);
    step.given = nullptr;
    step.product = static_cast<const float*>(call.dh0.const_data_ptr());
    step.dc = step.dc_before;
  }
}

// The device of a call, which has to be able to run the kernels.
Device able_device(const Tensor& x) {
  const Device device = device_of(x);
  STD_TORCH_CHECK(device.capability >= 80,
                  "lstm: impl='cuda' needs a GPU of compute capability 8.0 or above, this one has ",
                  device.capability / 10, ".", device.capability % 10, "; use impl='auto'");
  return device;
}

void check(const Tensor& weight, const Tensor& c0, ScalarType kind, const char* name, int64_t batch, int64_t hidden,
           const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(0) == 4 * hidden && weight.size(1) == hidden && weight.scalar_type() == kind,
      "w_hh must have shape [4H, H] and the dtype of ", name);
  STD_TORCH_CHECK(c0.dim() == 2 && c0.size(0) == batch && c0.size(1) == hidden, "c0 must have shape [B, H]");
  STD_TORCH_CHECK(c0.scalar_type() == kind || c0.scalar_type() == ScalarType::Float,
                  "c0 must be float32 or have the dtype of ", name);
  STD_TORCH_CHECK(!seed.has_value() || (seed->numel() == 1 && seed->scalar_type() == ScalarType::Long &&
                                        seed->get_device_index() == weight.get_device_index()),
                  "seed must be an int64 scalar tensor on the device of w_hh");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fwd(const Tensor& projected, const Tensor& w_hh, const Tensor& h0_,
                                               const Tensor& c0_, const std::optional<Tensor>& seed, double p,
                                               bool reverse, bool keep, bool tf32) {
  STD_TORCH_CHECK(projected.dim() == 3 && projected.size(2) % 4 == 0 && projected.is_contiguous(),
                  "projected must have shape [T, B, 4H] and be contiguous");
  const int64_t T = projected.size(0), B = projected.size(1), H = projected.size(2) / 4;
  check(w_hh, c0_, projected.scalar_type(), "projected", B, H, seed);
  STD_TORCH_CHECK(h0_.sizes().equals(c0_.sizes()) && h0_.scalar_type() == c0_.scalar_type(),
                  "h0 must have the shape and dtype of c0");
  const torch::stable::accelerator::DeviceGuard guard(projected.get_device_index());
  const Device device = able_device(projected);
  const Tensor weight = contiguous(w_hh), h0 = contiguous(h0_), c0 = contiguous(c0_);
  Tensor y = torch::stable::new_empty(projected, {T, B, H});
  Tensor cells = torch::stable::new_empty(projected, {keep ? T : 0, B, H}, ScalarType::Float);
  if (y.numel() == 0) return {y, torch::stable::clone(h0), torch::stable::clone(c0), cells};
  const Forward call{projected,
                     weight,
                     h0,
                     c0,
                     seed,
                     p,
                     reverse,
                     keep,
                     tf32,
                     y,
                     torch::stable::empty_like(h0),
                     torch::stable::empty_like(c0),
                     cells};
  if (!persistent_forward(device, call))
    FASTLM_CUDA_DISPATCH(dtype_of(projected, "projected"), alternating_forward<scalar_t>(call));
  return {y, call.h_n, call.c_n, cells};
}

std::tuple<Tensor, Tensor> bwd(const std::optional<Tensor>& dy_, const std::optional<Tensor>& dh_,
                               const std::optional<Tensor>& dc_, const Tensor& gates, const Tensor& cells_,
                               const Tensor& c0_, const Tensor& w_hh, const std::optional<Tensor>& seed, double p,
                               bool reverse, bool tf32) {
  STD_TORCH_CHECK(cells_.dim() == 3 && cells_.scalar_type() == ScalarType::Float, "cells must be float32 [T, B, H]");
  const int64_t B = cells_.size(1), H = cells_.size(2);
  check(w_hh, c0_, gates.scalar_type(), "gates", B, H, seed);
  STD_TORCH_CHECK(gates.numel() == 4 * cells_.numel() && gates.is_contiguous(),
                  "gates must be what lstm_fwd(keep=True) left in projected");
  STD_TORCH_CHECK(
      !dy_.has_value() || (dy_->sizes().equals(cells_.sizes()) && dy_->scalar_type() == gates.scalar_type()),
      "dy must have shape [T, B, H] and the dtype of gates");
  for (const std::optional<Tensor>* x : {&dh_, &dc_})
    STD_TORCH_CHECK(!x->has_value() || ((*x)->sizes().equals(c0_.sizes()) && (*x)->scalar_type() == c0_.scalar_type()),
                    "dh and dc must have the shape and dtype of c0");
  const torch::stable::accelerator::DeviceGuard guard(gates.get_device_index());
  const Device device = able_device(gates);
  const Tensor cells = contiguous(cells_), c0 = contiguous(c0_), weight = contiguous(w_hh);
  const std::optional<Tensor> dy = contiguous(dy_), dh = contiguous(dh_), dc = contiguous(dc_);
  const Backward call{dy,
                      dh,
                      dc,
                      gates,
                      cells,
                      c0,
                      weight,
                      seed,
                      p,
                      reverse,
                      tf32,
                      torch::stable::new_empty(cells, {B, H}),
                      torch::stable::new_empty(cells, {B, H})};
  if (cells.numel() == 0) {  // no step changes what arrives
    Tensor dh0 = call.dh0, dc0 = call.dc0;
    dh.has_value() ? torch::stable::copy_(dh0, *dh) : torch::stable::zero_(dh0);
    dc.has_value() ? torch::stable::copy_(dc0, *dc) : torch::stable::zero_(dc0);
  } else if (!persistent_backward(device, call)) {
    FASTLM_CUDA_DISPATCH(dtype_of(gates, "gates"), alternating_backward<scalar_t>(call));
  }
  return {call.dh0, call.dc0};
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) {
  m.impl("lstm_fwd", TORCH_BOX(&fastlm::fwd));
  m.impl("lstm_bwd", TORCH_BOX(&fastlm::bwd));
}
#endif
