// The adjoint of the LSTM's steps in one launch, from the last step to the first; the masked weights stay on the chip.
//
//   dh_t = dy_t + da_{t+1} W,   da_t and dc_{t-1} element by element from dh_t, dc_t, the activated gates and the cells
//
// All of da for every block would be four times the forward's exchange, so the product is divided in two dimensions.
// The units form groups of slices * units; rank p of a group owns `units` of them, and the gates of the units that the
// ranks p of all groups own are slice p. Block (p, group) holds W[gates of slice p, units of the group]. At every step,
// for each portion of the batch, it
//   - publishes da of its own units to the blocks of its slice, as 16-bit numbers, and fetches theirs;
//   - multiplies, and hands each rank of its group the part of dh that belongs to that rank's units;
//   - adds what its group handed to it in the order of ranks, which makes the result the same at every run.
// A group is a cluster and hands through its shared memory, or does so through global memory with flags.
//
// float16 holds da times a power of two that the blocks of a slice choose alike: so that the largest of these becomes
// 1, |da| that they fetched at the step before, |dy| of this one, and 2^-9 times what da may become of: the largest dc
// that any of them carried on at the last step but one, and what was largest at the last. So da has room to grow
// 60,000-fold in a step, and 128-fold beyond a dc that gates had kept from it; then it would become infinite, and be
// seen.
#include "lstm.cuh"
#include "lstm_args.h"

namespace fastlm::lstm {
namespace {

// The power of two that takes x to [1, 2), and its inverse; 1 for what is no positive finite number.
struct Scale {
  float up, down;
};

FASTLM_DEVICE Scale scale_for(float x) {
  if (!(x > 0.0f && x < INFINITY)) return {1.0f, 1.0f};
  const uint32_t field = min(max(__float_as_uint(x) >> 23, 1u), 253u);
  return {__uint_as_float((254 - field) << 23), __uint_as_float(field << 23)};
}

// Unit `k` of a slice: rank `slice` of every group has `units` of them.
FASTLM_DEVICE int unit_of(const Plan& p, int slice, int k) {
  return k / p.units * p.slices * p.units + slice * p.units + k % p.units;
}

// The exchange before the first step, and the largest |dy| of each step, |dh_n| and |dc_n| behind the last.
__global__ void __launch_bounds__(kThreads) lstm_backward_begin_kernel(const Backward a) {
  const Plan& p = a.plan;
  const int columns = p.tiling.columns, width = words_of(p.tiling.split);
  const int tiles = int(ceil_div(p.groups * p.units, 4)), words = tiles * columns * 32 * width;
  const int64_t rows = int64_t{a.T} * portions_of(p, a.B) * p.slices;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y)
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < words; i += gridDim.x * kThreads) {
      const int k = i / (width * 32 * columns) * 4 + i / width % 4;
      const bool there = k < p.groups * p.units && unit_of(p, int(row % p.slices), k) < a.H;
      a.exchange[row * words + i] = there ? kAbsent : 0;
    }
  const int64_t id = (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = id; i < rows * p.groups; i += int64_t{gridDim.x} * gridDim.y * kThreads)
    a.exchange[rows * words + i] = kAbsent;
  for (int64_t i = id; i < flag_words(p); i += int64_t{gridDim.x} * gridDim.y * kThreads) a.flags[i] = 0;

  const int64_t count = int64_t{a.B} * a.H;
  for (int t = blockIdx.y; t <= a.T; t += gridDim.y) {
    float largest = 0.0f;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
      if (t < a.T && a.dy != nullptr) largest = fmaxf(largest, fabsf(load(a.dy, t * count + i, a.dtype)));
      if (t == a.T && a.dh_n != nullptr) largest = fmaxf(largest, fabsf(a.dh_n[i]));
      if (t == a.T && a.dc_n != nullptr) largest = fmaxf(largest, fabsf(a.dc_n[i]));
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, ptx::shuffle_xor(largest, lanes));
    if (threadIdx.x % 32 == 0) ptx::atomic_max(a.peaks + t, __float_as_uint(largest));
  }
}

template <bool SPLIT, int MT, int KEPT, int WAVE, int NT, bool POLL, bool CLUSTER>
__global__ void __launch_bounds__(kThreads, 1) lstm_backward_kernel(const Backward a) {
  constexpr Tiling TILING{SPLIT, MT, KEPT, WAVE, NT};
  constexpr int WORDS = words_of(SPLIT), PITCH = sum_pitch(TILING), TILE = NT * 32 * WORDS, ROWS = 8 * NT;
  const Plan& plan = a.plan;
  const int H = a.H, units = plan.units, slices = plan.slices, groups = plan.groups, members = slices * units;
  const int slice = blockIdx.x % slices, group = blockIdx.x / slices % groups;
  const int replica = blockIdx.x / (slices * groups);
  const int tiles = (groups * units + 3) / 4, portions = (a.B + ROWS - 1) / ROWS;

  unsigned char* shared = ptx::shared_memory();
  uint32_t* tops = reinterpret_cast<uint32_t*>(shared);  // [2][warp]: of da that came, of dc that goes on
  shared += 128;
  Weights<SPLIT, MT, KEPT> weights(shared, plan.depth);
  shared += tail_bytes(TILING, plan.depth);
  float* states = reinterpret_cast<float*>(shared) + thread();  // [pass][dc, dh, largest before, largest dc][thread]
  shared += state_bytes(plan.passes, 4);
  float* inputs = reinterpret_cast<float*>(shared) + thread();  // [kInputs][thread]: of the next turn
  shared += state_bytes(1, kInputs);
  float* inbox = reinterpret_cast<float*>(shared);  // [2][rank][row][unit]
  if (CLUSTER) shared += 2 * inbox_bytes(plan);
  float* sums_of_warps = reinterpret_cast<float*>(shared);

  // Row of a tile: unit of the group. Column: gate 4 k + gate of the slice, and so a lane has the gates of one unit.
  const auto run = [&](int i, int k) {
    const int at = 4 * (i / 16 * plan.depth + k) + i % 16 / 4, unit = unit_of(plan, slice, at);
    const bool there = at < groups * units && unit < H;
    const int first = group * members;
    return Run{(int64_t{i % 4} * H + unit) * H + first, there ? min(members, H - first) : 0};
  };
  const auto place = [](int i, int j) { return j * kStagePitch + i; };
  weights.template load<16 * kWarps, 16 * MT>({a.weight, a.dtype, a.seed, a.p}, run, place);

  // This thread's place among the units of a block and the rows of a portion, divided once and remembered where it
  // costs no register; its unit; and its row, beyond all where there is no such unit.
  inputs[8 * kThreads] = __uint_as_float(uint32_t(thread() % units | thread() / units << 16));
  const auto own = [&] { return int(__float_as_uint(inputs[8 * kThreads]) & 0xFFFF); };
  const auto line = [&] { return int(__float_as_uint(inputs[8 * kThreads]) >> 16); };
  const auto unit = [&] { return group * members + slice * units + own(); };
  const auto row = [&] { return unit() < H ? line() : ROWS; };
  const int passes = (portions - replica + plan.replicas - 1) / plan.replicas;
  const auto time_of = [&](int step) { return int64_t{a.reverse ? step : a.T - 1 - step}; };

  const auto bring = [&](int step, int pass) {
    const int b = (replica + pass * plan.replicas) * ROWS + row();
    const int64_t t = time_of(step);
    inputs[7 * kThreads] = __uint_as_float(a.peaks[t]);
    if (row() >= ROWS || b >= a.B) return;
    const int64_t at = (t * a.B + b) * H + unit(), state = int64_t{b} * H + unit();
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      inputs[gate * kThreads] = lstm::load(a.gates, ((t * a.B + b) * 4 + gate) * H + unit(), a.dtype);
    inputs[4 * kThreads] = a.cells[at];
    inputs[5 * kThreads] =
        step + 1 < a.T ? a.cells[(time_of(step + 1) * a.B + b) * H + unit()] : lstm::load(a.c0, state, a.state);
    inputs[6 * kThreads] = a.dy == nullptr ? 0.0f : lstm::load(a.dy, at, a.dtype);
  };

  for (int pass = 0; pass < passes; ++pass) {
    const int b = (replica + pass * plan.replicas) * ROWS + row();
    const bool there = row() < ROWS && b < a.B;
    const int64_t at = int64_t{b} * H + unit();
    states[(4 * pass + 0) * kThreads] = there && a.dc_n != nullptr ? a.dc_n[at] : 0.0f;
    states[(4 * pass + 1) * kThreads] = there && a.dh_n != nullptr ? a.dh_n[at] : 0.0f;
    states[(4 * pass + 2) * kThreads] = __uint_as_float(a.peaks[a.T]);
    states[(4 * pass + 3) * kThreads] = 0.0f;
  }
  bring(0, 0);
  if constexpr (CLUSTER) ptx::cluster_sync();  // nobody hands to a block that has not started, or over its weights

  unsigned sequence = 0;
  for (int step = 0; step < a.T; ++step)
    for (int pass = 0; pass < passes; ++pass, ++sequence) {
      const int portion = replica + pass * plan.replicas, rows = min(ROWS, a.B - portion * ROWS);
      float* state = states + 4 * pass * kThreads;
      const float largest = fmaxf(fmaxf(inputs[7 * kThreads], state[2 * kThreads]), state[3 * kThreads] * 0x1p-9f);
      const Scale scale = scale_for(largest);
      const int64_t turn = (int64_t{step} * portions + portion) * slices + slice;
      uint32_t* carried = a.exchange + int64_t{a.T} * portions * slices * tiles * TILE + turn * groups;
      uint32_t* exchange = a.exchange + turn * tiles * TILE;
      uint32_t* slice_flags = a.flags + ((int64_t{replica} * plan.passes + pass) * slices + slice) * groups;

      // da of the block's own units, first of all to those who wait for it.
      float da[4];
      if (row() < rows) {
        const float i = inputs[0], f = inputs[kThreads], g = inputs[2 * kThreads], o = inputs[3 * kThreads];
        const float before = inputs[5 * kThreads], c = tanh_of(inputs[4 * kThreads]);
        const float dh = inputs[6 * kThreads] + state[kThreads], dc = state[0] + dh * o * (1.0f - c * c);
        da[0] = dc * g * i * (1.0f - i);
        da[1] = dc * before * f * (1.0f - f);
        da[2] = dc * i * (1.0f - g * g);
        da[3] = dh * c * o * (1.0f - o);
        state[0] = dc * f;
        const int k = group * units + own(), lane = row() % 8 * 4 + k % 4;
        uint32_t* to = exchange + k / 4 * TILE + (row() / 8 * 32 + lane) * WORDS;
        float2 left[2], nothing;
        const uint2 high = {pair_of(da[0] * scale.up, da[1] * scale.up, left[0]),
                            pair_of(da[2] * scale.up, da[3] * scale.up, left[1])};
        publish_pair<POLL>(to, high);
        if constexpr (SPLIT) {
          const uint2 low = {pair_of(left[0].x, left[0].y, nothing), pair_of(left[1].x, left[1].y, nothing)};
          publish_pair<POLL>(to + 2, low);
        }
      }
      if constexpr (!POLL) {
        ptx::sync_block();
        if (thread() == 0) ptx::store_release(slice_flags + group, uint32_t(step) + 1);
      }
      if (row() < rows) {
        const int64_t at = (time_of(step) * a.B + portion * ROWS + row()) * 4;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) store(a.gates, (at + gate) * H + unit(), a.dtype, da[gate]);
      }
      if (step > 0) state[3 * kThreads] = largest_of(carried - int64_t{portions} * slices * groups, groups);
      if (pass + 1 < passes) {
        bring(step, pass + 1);
      } else if (step + 1 < a.T) {
        bring(step + 1, 0);
      }

      // The product, and the largest of what came.
      float sums[MT][NT][4];
      uint32_t top = 0;
      const int warp = ptx::uniform(thread() / 32), first = warp * plan.depth, count = min(plan.depth, tiles - first);
      if (count > 0) {
        if (!POLL && plan.exchange == Exchange::flags)
          wait_for(slice_flags, 4 * first / units, (min(4 * (first + count), groups * units) - 1) / units,
                   uint32_t(step) + 1);
        if (!POLL && plan.exchange == Exchange::grid) wait_for(slice_flags, 0, groups - 1, uint32_t(step) + 1);
        const auto see = [&](const Words<SPLIT>& words) {
          top = ptx::max_pairs(top, ptx::max_pairs(words.high[0] & 0x7FFF7FFF, words.high[1] & 0x7FFF7FFF));
        };
        weights.template multiply_exchanged<WAVE, POLL>(sums, exchange + first * TILE, count, rows, see);
      } else {
        clear(sums);
      }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) top = ptx::max_pairs(top, ptx::shuffle_xor(top, lanes));
      float dc = fabsf(state[0]);
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) dc = fmaxf(dc, ptx::shuffle_xor(dc, lanes));
      if (thread() % 32 == 0) tops[warp] = top, tops[kWarps + warp] = __float_as_uint(dc);
      store_sums(sums, sums_of_warps);
      ptx::sync_block();
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        top = ptx::max_pairs(top, tops[w]);
        dc = fmaxf(dc, __uint_as_float(tops[kWarps + w]));
      }
      if (thread() == 0) ptx::store_relaxed(carried + group, __float_as_uint(dc));
      const uint32_t highest = max(top & 0xFFFF, top >> 16);
      const float came = __half2float(__ushort_as_half(static_cast<unsigned short>(highest))) * scale.down;
      state[2 * kThreads] = fmaxf(came, largest * 0x1p-9f);

      // To each rank of the group its part.
      const float down = scale.down / weight_up(SPLIT);
      const unsigned buffer = ptx::side(sequence);
      const int64_t box = int64_t{members} * ROWS;  // floats that one block hands out, and gets
      float* handed = a.handed + ((int64_t{replica} * groups + group) * 2 + buffer) * slices * box;
      for (int rank = 0; rank < slices && line() < rows; ++rank) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += sums_of_warps[(w * ROWS + line()) * PITCH + rank * units + own()];
        const int at = (slice * ROWS + line()) * units + own();
        if constexpr (CLUSTER) {
          ptx::map_rank(inbox, unsigned(rank))[buffer * (inbox_bytes(plan) / 4) + at] = sum * down;
        } else {
          handed[rank * box + at] = sum * down;
        }
      }
      if constexpr (CLUSTER) {
        ptx::cluster_sync();
      } else {
        uint32_t* group_flags =
            a.flags + flag_words(plan) / 2 + ((int64_t{replica} * plan.passes + pass) * groups + group) * slices;
        ptx::sync_block();
        if (thread() == 0) ptx::store_release(group_flags + slice, uint32_t(step) + 1);
        wait_for(group_flags, 0, slices - 1, uint32_t(step) + 1);
      }
      if (row() < rows) {
        float dh = 0.0f;
        for (int p = 0; p < slices; ++p) {
          const int at = (p * ROWS + row()) * units + own();
          if constexpr (CLUSTER) {
            dh += inbox[buffer * (inbox_bytes(plan) / 4) + at];
          } else {
            dh += ptx::load_l2(handed + slice * box + at);
          }
        }
        state[kThreads] = dh;
        if (step == a.T - 1) {
          const int64_t at = (int64_t{portion} * ROWS + row()) * H + unit();
          a.dh0[at] = dh;
          a.dc0[at] = state[0];
        }
      }
    }
}

template <bool POLL, bool CLUSTER>
BackwardKernel find(const Tiling& tiling) {
  const auto make = [](auto i) {
    constexpr Tiling t = kBackward[decltype(i)::value];
    if constexpr (has_kernel(t, POLL ? Exchange::data : Exchange::flags)) {
      return lstm_backward_kernel<t.split, t.tiles, t.kept, t.wave, t.columns, POLL, CLUSTER>;
    } else {
      return nullptr;
    }
  };
  return find_kernel<BackwardKernel, kBackward>(tiling, make, std::make_index_sequence<std::size(kBackward)>{});
}

}  // namespace

BackwardKernel backward_kernel(const Plan& p) {
  if (p.exchange != Exchange::data) return find<false, false>(p.tiling);
  return p.cluster > 1 ? find<true, true>(p.tiling) : find<true, false>(p.tiling);
}

BackwardKernel backward_begin_kernel() { return lstm_backward_begin_kernel; }

#ifndef FASTLM_EMULATED
int resident_backward(const Plan& plan) { return resident(backward_kernel(plan), plan); }

cudaError_t run_backward(const Backward& args, cudaStream_t stream) {
  const int64_t rows = int64_t{args.T} * portions_of(args.plan, args.B) * args.plan.slices;
  const dim3 begin(4, unsigned(smaller(rows, 4096)));
  lstm_backward_begin_kernel<<<begin, kThreads, 0, stream>>>(args);
  if (const cudaError_t error = cudaGetLastError()) return error;
  return launch(backward_kernel(args.plan), args.plan, args, stream);
}
#endif

}  // namespace fastlm::lstm
