// The LSTM forward in one launch: the masked weights stay on the chip for the whole sequence, and so do the cells.
//
// A block owns the four gates of 4 * tiles units, row 4 * unit + gate of its tile. At every step, for each portion of
// the batch, its warps multiply their columns with h of the step before as it comes in and add up in shared memory;
// then a thread has two neighbouring units of one row of the batch: it adds the input's part, moves the cell on, and
// publishes both h in one word. All blocks must run at once: the launch is cooperative.
//
// A word of the exchange says itself that it has come (Exchange::data): nothing else orders the blocks, and as the
// exchange keeps every step nothing is overwritten. Diamos et al., "Persistent RNNs", ICML 2016, had such words first.
#include "lstm_ways.cuh"

namespace fastlm::lstm {
namespace {

// The exchange before the first step: h0, and for all later steps words that are absent, or zero where no unit is.
__global__ void __launch_bounds__(kThreads) lstm_forward_begin_kernel(const Forward a) {
  const int columns = a.plan.tiling.columns, width = words_of(a.plan.tiling.split);
  const int portions = int(portions_of(a.plan, a.B)), words = (a.H + 15) / 16 * columns * 32 * width;
  const int64_t rows = a.plan.exchange == Exchange::cluster ? 0 : (a.T + int64_t{1}) * portions;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y)
    for (int i = blockIdx.x * kThreads + thread(); i < words; i += gridDim.x * kThreads) {
      const int lane = i / width % 32, n = i / (width * 32) % columns, tile = i / (width * 32 * columns);
      const Place at = place_of(int(row % portions), tile, columns, n, lane, i % 2);
      const uint32_t later = at.unit < a.H ? kAbsent : 0;
      a.exchange[row * words + i] = row < portions ? first_word(a, at, i % width >= 2) : later;
    }
  const int64_t id = (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * kThreads + thread();
  for (int64_t i = id; i < flag_words(a.plan); i += int64_t{gridDim.x} * gridDim.y * kThreads) a.flags[i] = 0;
}

template <bool SPLIT, int MT, int KEPT, int WAVE, int NT, template <bool, int, int> typename WAY>
__global__ void __launch_bounds__(kThreads, 1) lstm_forward_kernel(const Forward a) {
  constexpr Tiling TILING{SPLIT, MT, KEPT, WAVE, NT};
  constexpr int PAIRS = pairs(TILING), PITCH = sum_pitch(TILING);
  constexpr float UP = state_up(SPLIT), DOWN = 1 / (UP * weight_up(SPLIT));
  const Plan& plan = a.plan;
  const int H = a.H, replica = blockIdx.x / plan.groups, unit0 = blockIdx.x % plan.groups * 4 * MT;

  unsigned char* shared = ptx::shared_memory() + 128;  // behind the barriers of a cluster
  Weights<SPLIT, MT, KEPT> weights(shared, plan.depth);
  shared += tail_bytes(TILING, plan.depth);
  float* cells = reinterpret_cast<float*>(shared) + thread();  // [pass][pair][unit][thread]
  shared += state_bytes(plan.passes, 2 * PAIRS);
  float* inputs = reinterpret_cast<float*>(shared) + thread();  // [pair][unit][gate][thread]: of the next turn
  shared += state_bytes(1, 8 * PAIRS);
  WAY<SPLIT, MT, NT> way(a, shared);
  float* all_sums = reinterpret_cast<float*>(shared + operands_in_shared(plan) * operand_bytes(TILING, H));

  const auto run = [&](int i, int k) {
    const int row = i / kWarps, unit = unit0 + row / 4, column = 16 * (i % kWarps * plan.depth + k);
    return Run{(int64_t{row % 4} * H + unit) * H + column, unit < H ? min(16, H - column) : 0};
  };
  const auto place = [](int i, int j) { return i / kWarps * kStagePitch + i % kWarps * 16 + j; };
  weights.template load<16 * MT * kWarps, 16>({a.weight, a.dtype, a.seed, a.p}, run, place);

  // Item i of this thread: row of the portion, and first of two units; none where the row is beyond all.
  const auto item = [&](int i) {
    const int id = thread() + i * kThreads, unit = unit0 + id % (2 * MT) * 2;
    return Place{id < 16 * MT * NT && unit < H ? id / (2 * MT) : 8 * NT, unit};
  };
  const int passes = (way.portions - replica + plan.replicas - 1) / plan.replicas;
  for (int pass = 0; pass < passes; ++pass)
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const Place at = item(i);
      const int64_t row = (replica + pass * plan.replicas) * 8 * NT + at.row;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool inside = at.row < 8 * NT && row < a.B && at.unit + j < H;
        cells[((pass * PAIRS + i) * 2 + j) * kThreads] = inside ? load(a.c0, row * H + at.unit + j, a.state) : 0.0f;
      }
    }

  // The input's part of a turn, by way of shared memory: the registers are full while the products run.
  const auto bring = [&](int step, int pass) {
    const int64_t t = a.reverse ? a.T - 1 - step : step;
    const int row0 = (replica + pass * plan.replicas) * 8 * NT, rows = min(8 * NT, a.B - row0);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const Place at = item(i);
      if (at.row >= rows) continue;
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t n = ((t * a.B + row0 + at.row) * 4 + gate) * H + at.unit + j;
          inputs[((i * 2 + j) * 4 + gate) * kThreads] = at.unit + j < H ? load(a.gates, n, a.dtype) : 0.0f;
        }
    }
  };
  bring(0, 0);
  way.begin();

  unsigned sequence = 0;
  for (int step = 0; step < a.T; ++step)
    for (int pass = 0; pass < passes; ++pass, ++sequence) {
      const int portion = replica + pass * plan.replicas;
      const Turn turn{step, pass, portion, min(8 * NT, a.B - portion * 8 * NT), sequence, pass + 1 == passes};

      float sums[MT][NT][4];
      way.template multiply<WAVE>(weights, sums, turn);
      float* partial = all_sums + (plan.sides == 2 ? ptx::side(sequence) * (sum_bytes(TILING) / 4) : 0);
      store_sums(sums, partial);
      ptx::sync_block();

      float gates[PAIRS][2][4], h[PAIRS][2], c[PAIRS][2];
#pragma unroll
      for (int i = 0; i < PAIRS; ++i) {
        const Place at = item(i);
        if (at.row >= turn.rows) continue;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float (&s)[4] = gates[i][j];
#pragma unroll
          for (int gate = 0; gate < 4; ++gate) s[gate] = inputs[((i * 2 + j) * 4 + gate) * kThreads];
#pragma unroll
          for (int w = 0; w < kWarps; ++w) {
            const float* from = partial + (w * 8 * NT + at.row) * PITCH + (at.unit - unit0 + j) * 4;
            const float4 x = *reinterpret_cast<const float4*>(from);
            s[0] += x.x * DOWN, s[1] += x.y * DOWN, s[2] += x.z * DOWN, s[3] += x.w * DOWN;
          }
          s[0] = sigmoid(s[0]), s[1] = sigmoid(s[1]), s[2] = tanh_of(s[2]), s[3] = sigmoid(s[3]);
          float& cell = cells[((pass * PAIRS + i) * 2 + j) * kThreads];
          cell = c[i][j] = s[1] * cell + s[0] * s[2];
          h[i][j] = at.unit + j < H ? s[3] * tanh_of(c[i][j]) : 0.0f;
        }
        float2 left, nothing;
        const uint32_t high = pair_of(h[i][0] * UP, h[i][1] * UP, left),
                       words[2] = {high, pair_of(left.x, left.y, nothing)};
        way.publish(turn, at.row, at.unit, words);
      }
      way.published(turn);

      // What nobody waits for.
      const int64_t row0 = int64_t{a.reverse ? a.T - 1 - step : step} * a.B + portion * 8 * NT;
#pragma unroll
      for (int i = 0; i < PAIRS; ++i) {
        const Place at = item(i);
        if (at.row >= turn.rows) continue;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (at.unit + j >= H) continue;
          const int64_t n = (row0 + at.row) * H + at.unit + j;
          store(a.y, n, a.dtype, h[i][j]);
          if (a.cells != nullptr) {
            a.cells[n] = c[i][j];
#pragma unroll
            for (int gate = 0; gate < 4; ++gate)
              store(a.gates, ((row0 + at.row) * 4 + gate) * H + at.unit + j, a.dtype, gates[i][j][gate]);
          }
          if (step == a.T - 1) {
            const int64_t state = (int64_t{portion} * 8 * NT + at.row) * H + at.unit + j;
            store(a.h_n, state, a.state, h[i][j]);
            store(a.c_n, state, a.state, c[i][j]);
          }
        }
      }
      if (!turn.last) bring(step, pass + 1);
      if (turn.last && step + 1 < a.T) bring(step + 1, 0);
      if (plan.sides == 1) ptx::sync_block();
    }
  way.end();
}

template <Exchange KIND, template <bool, int, int> typename WAY, const auto& TILINGS>
ForwardKernel find(const Tiling& tiling) {
  const auto make = [](auto i) {
    constexpr Tiling t = TILINGS[decltype(i)::value];
    if constexpr (has_kernel(t, KIND)) {
      return lstm_forward_kernel<t.split, t.tiles, t.kept, t.wave, t.columns, WAY>;
    } else {
      return nullptr;
    }
  };
  return find_kernel<ForwardKernel, TILINGS>(tiling, make, std::make_index_sequence<std::size(TILINGS)>{});
}

}  // namespace

ForwardKernel forward_kernel(const Plan& p) {
  if (p.exchange == Exchange::multicast) return find<Exchange::multicast, Multicast, kMulticast>(p.tiling);
  if (p.exchange == Exchange::cluster) return find<Exchange::cluster, Cluster, kCluster>(p.tiling);
  if (p.exchange == Exchange::data) return find<Exchange::data, Polled, kForward>(p.tiling);
  return find<Exchange::flags, Flagged, kForward>(p.tiling);
}

ForwardKernel forward_begin_kernel() { return lstm_forward_begin_kernel; }

#ifndef FASTLM_EMULATED
int resident_forward(const Plan& plan) { return resident(forward_kernel(plan), plan); }

cudaError_t run_forward(const Forward& args, cudaStream_t stream) {
  const int64_t rows =
      args.plan.exchange == Exchange::cluster ? 1 : (args.T + int64_t{1}) * portions_of(args.plan, args.B);
  const dim3 begin(4, unsigned(smaller(rows, 4096)));
  lstm_forward_begin_kernel<<<begin, kThreads, 0, stream>>>(args);
  if (const cudaError_t error = cudaGetLastError()) return error;
  return launch(forward_kernel(args.plan), args.plan, args, stream);
}
#endif

}  // namespace fastlm::lstm
