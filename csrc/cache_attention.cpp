// Continuous cache on the CPU: banded causal scores hidden . key, reduced as they are made. One work item is a block of
// kRows rows: it walks the panels of keys that its windows reach, oldest first, and multiplies strips of kStrip rows
// with each panel in registers. Keys are packed into panels of kCols columns, feature by feature, in a ring as long as
// the widest window. The windows, sorted, cut the past of a row into bands; a row sums exp(theta (score - top)) band by
// band, for every theta, and the bands add up to the windows at the end.
#include "dtype.h"

namespace fastlm {

struct CacheAttentionArgs {
  const void *hidden, *memory;  // [rows, width], [past, width]
  const int32_t* ids;           // [past + rows]: next words of memory and rows
  const int64_t* start;         // [rows] oldest position to see, or null
  const double* theta;
  const int64_t* window;       // ascending
  float *log_mass, *log_norm;  // [windows, thetas, rows]
  int64_t rows, past, width, thetas, windows;
  DType dtype;
};

constexpr int64_t kCacheAttentionRows = 96;  // rows of one work item; a multiple of every strip

}  // namespace fastlm

#ifdef FASTLM_ISA
#include <math.h>

#include <new>

#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kRows = kCacheAttentionRows, kCols = 2 * kWidth;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kStrip = 12;  // 24 accumulators of 32 registers
#else
constexpr int64_t kStrip = 6;  // 12 of 16
#endif

constexpr int64_t kFlush = 256;  // panels after which the float32 lanes go to doubles, however wide the window

template <typename T>
struct Array {
  T* p;
  explicit Array(int64_t count) : p(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64)))) {}
  ~Array() { ::operator delete(p, std::align_val_t(64)); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T& operator[](int64_t i) { return p[i]; }
};

// Sums of exp(theta (score - top)), one per theta: of a row's present band in lanes, of its finished bands in doubles.
struct Sums {
  Array<float> top, band_top;
  Array<vec> lanes;
  Array<double> band;
  const CacheAttentionArgs& a;
  const float* theta;

  Sums(const CacheAttentionArgs& args, const float* thetas)
      : top(kRows),
        band_top(kRows * args.windows),
        lanes(kRows * args.thetas),
        band(kRows * args.windows * args.thetas),
        a(args),
        theta(thetas) {}

  void clear() {
    for (int64_t i = 0; i < kRows; ++i) top[i] = -INFINITY;
    for (int64_t i = 0; i < kRows * a.windows; ++i) band_top[i] = -INFINITY;
    for (int64_t i = 0; i < kRows * a.thetas; ++i) lanes[i] = vec{};
    for (int64_t i = 0; i < kRows * a.windows * a.thetas; ++i) band[i] = 0.0;
  }

  // Makes `best` the top of a row's lanes.
  void raise(int64_t row, float best) {
    if (best <= top[row]) return;
    if (top[row] != -INFINITY)
      for (int64_t k = 0; k < a.thetas; ++k) lanes[row * a.thetas + k] *= exp(splat(theta[k] * (top[row] - best)));
    top[row] = best;
  }

  // Adds a row's scores, none of them NaN, in the lanes of the masks.
  void add(int64_t row, vec s0, vec s1, ivec m0, ivec m1) {
    const float best = max(max(select(m0, s0, splat(-INFINITY)), select(m1, s1, splat(-INFINITY))));
    if (best == -INFINITY) return;
    raise(row, best);
    vec* sums = &lanes[row * a.thetas];
    s0 -= top[row], s1 -= top[row];
    for (int64_t k = 0; k < a.thetas; ++k)
      sums[k] += select(m0, exp(s0 * theta[k]), vec{}) + select(m1, exp(s1 * theta[k]), vec{});
  }

  // Adds all of a row's scores, none above its top.
  void add_below_top(int64_t row, vec s0, vec s1) {
    vec* sums = &lanes[row * a.thetas];
    s0 -= top[row], s1 -= top[row];
    for (int64_t k = 0; k < a.thetas; ++k) sums[k] += exp(s0 * theta[k]) + exp(s1 * theta[k]);
  }

  // Adds sums with a top of their own to a band, for one theta.
  void join(int64_t to, float other_top, int64_t k, double other) {
    const float both = band_top[to] > other_top ? band_top[to] : other_top;
    double& mine = band[to * a.thetas + k];
    if (band_top[to] != -INFINITY && band_top[to] != both) mine *= ::exp(a.theta[k] * double(band_top[to] - both));
    mine += other_top == both ? other : other * ::exp(a.theta[k] * double(other_top - both));
  }

  // Moves what the lanes hold into a band, and empties them.
  void flush(int64_t row, int64_t j) {
    if (top[row] == -INFINITY) return;
    const int64_t to = row * a.windows + j;
    for (int64_t k = 0; k < a.thetas; ++k) {
      vec& mine = lanes[row * a.thetas + k];
      join(to, top[row], k, double(sum(mine)));
      mine = vec{};
    }
    band_top[to] = band_top[to] > top[row] ? band_top[to] : top[row];
    top[row] = -INFINITY;
  }

  // Adds up the bands from the nearest outwards and writes log sum exp of every window.
  void write(int64_t row, int64_t t, float* out) {
    for (int64_t j = 0; j < a.windows; ++j) {
      const int64_t to = row * a.windows + j;
      if (j > 0 && band_top[to - 1] != -INFINITY) {
        for (int64_t k = 0; k < a.thetas; ++k) join(to, band_top[to - 1], k, band[(to - 1) * a.thetas + k]);
        band_top[to] = band_top[to] > band_top[to - 1] ? band_top[to] : band_top[to - 1];
      }
      for (int64_t k = 0; k < a.thetas; ++k) {
        const double log_sum = a.theta[k] * double(band_top[to]) + ::log(band[to * a.thetas + k]);
        out[(j * a.thetas + k) * a.rows + t] = band_top[to] == -INFINITY ? -INFINITY : float(log_sum);
      }
    }
  }
};

FASTLM_INLINE ivec load_ids(const int32_t* p) {
  ivec v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Strips and panels hold words: a float32 number, or two bfloat16 ones where an instruction multiplies pairs.
template <typename T>
constexpr bool kPairs = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool kPairs<bf16> = true;
#endif

template <typename T>
FASTLM_INLINE vec multiply_add(vec sum, vec x, vec y) {
#if defined(__AVX512BF16__)
  if (kPairs<T>) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#endif
  return sum + x * y;
}

// acc[i][c] = scores of row i of a strip with vector c of a panel, both packed word by word.
template <typename T>
FASTLM_INLINE void multiply(const float* q, const float* panel, int64_t words, vec (&acc)[kStrip][2]) {
  vec sums[kStrip][2] = {};
  for (int64_t d = 0; d < words; ++d) {
    const vec k0 = load(panel + d * kCols), k1 = load(panel + d * kCols + kWidth);
#pragma GCC unroll 12
    for (int64_t i = 0; i < kStrip; ++i) {
      const vec x = broadcast(q + d * kStrip + i);
      sums[i][0] = multiply_add<T>(sums[i][0], x, k0);
      sums[i][1] = multiply_add<T>(sums[i][1], x, k1);
    }
  }
#pragma GCC unroll 12
  for (int64_t i = 0; i < kStrip; ++i) acc[i][0] = sums[i][0], acc[i][1] = sums[i][1];
}

// Word d of a row of `width` numbers; what is missing of the last pair is 0.
template <typename T>
FASTLM_INLINE float word(const T* x, int64_t d, int64_t width) {
  if constexpr (kPairs<T>) {
    const uint32_t low = x[2 * d].bits, high = 2 * d + 1 < width ? x[2 * d + 1].bits : 0, bits = low | high << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
  } else {
    return to_float(x[d]);
  }
}

// Transposes rows first .. first + count of the stream (memory, then hidden) into tiles of `across` columns.
template <typename T>
void pack(const CacheAttentionArgs& a, int64_t first, int64_t count, int64_t across, float* out) {
  const int64_t words = kPairs<T> ? (a.width + 1) / 2 : a.width;
  for (int64_t i = 0; i < across; ++i) {
    const int64_t at = first + i;
    const T* x = at < a.past ? static_cast<const T*>(a.memory) + at * a.width
                             : static_cast<const T*>(a.hidden) + (at - a.past) * a.width;
    for (int64_t d = 0; d < words; ++d) out[d * across + i] = i < count ? word(x, d, a.width) : 0.0f;
  }
}

template <typename T>
struct Walk {
  const CacheAttentionArgs& a;
  const int64_t keys, words, widest, ring;
  Array<float> panels, queries, theta;
  Array<int32_t> panel_ids;
  Sums norm, mass;
  int64_t first_row, count;  // of the work item at hand; rows are numbered like keys: memory first
  int64_t oldest[kRows];     // first key that a row sees
  int64_t band[kRows];       // band that a row is in
  int64_t band_end[kRows];   // key where it ends, and the next nearer one begins

  explicit Walk(const CacheAttentionArgs& args)
      : a(args),
        keys(a.past + a.rows),
        words(kPairs<T> ? (a.width + 1) / 2 : a.width),
        widest(lesser(a.window[a.windows - 1], keys)),
        ring(lesser((keys + kCols - 1) / kCols, (widest + kRows) / kCols + 2)),
        panels(ring * kCols * words),
        queries(kRows * words),
        theta(a.thetas),
        panel_ids(ring * kCols),
        norm(a, theta.p),
        mass(a, theta.p) {
    for (int64_t k = 0; k < a.thetas; ++k) theta[k] = float(a.theta[k]);
  }

  void pack_panel(int64_t panel) {
    const int64_t first = panel * kCols, count = lesser(kCols, keys - first), slot = panel % ring;
    pack<T>(a, first, count, kCols, &panels[slot * kCols * words]);
    for (int64_t i = 0; i < kCols; ++i) panel_ids[slot * kCols + i] = i < count ? a.ids[first + i] : 0;
  }

  void start(int64_t item) {
    first_row = a.past + item * kRows;
    count = lesser(kRows, keys - first_row);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t t = first_row + row;
      oldest[row] = greater(t - widest, 0);
      if (a.start != nullptr) {
        const int64_t start = lesser(greater(a.start[t - a.past], -a.past), a.rows);
        oldest[row] = greater(oldest[row], a.past + start);
      }
      enter(row, a.windows - 1);
    }
    for (int64_t row = 0; row < count; row += kStrip)
      pack<T>(a, first_row + row, lesser(kStrip, count - row), kStrip, &queries[row * words]);
    norm.clear();
    mass.clear();
  }

  void enter(int64_t row, int64_t j) {
    band[row] = j;
    band_end[row] = j > 0 ? first_row + row - a.window[j - 1] : first_row + row;
  }

  // Takes in a row's scores with one panel.
  void reduce(int64_t row, int64_t panel, vec s0, vec s1) {
    const int64_t left = panel * kCols;
    const int32_t* ids = &panel_ids[panel % ring * kCols];
    const vec top = splat(norm.top[row]);
    const bool below = !any(~((s0 <= top) & (s1 <= top)));  // nor is any NaN
    if (!below || left < oldest[row] || left + kCols > band_end[row]) return reduce_bands(row, panel, s0, s1);
    norm.add_below_top(row, s0, s1);
    const ivec id = isplat(a.ids[first_row + row]), m0 = load_ids(ids) == id, m1 = load_ids(ids + kWidth) == id;
    if (any(m0 | m1)) mass.add(row, s0, s1, m0, m1);
  }

  // The same a band at a time, with whatever scores.
  __attribute__((noinline)) void reduce_bands(int64_t row, int64_t panel, vec s0, vec s1) {
    const int64_t t = first_row + row, left = panel * kCols, stop = lesser(left + kCols, t);
    const int32_t* ids = &panel_ids[panel % ring * kCols];
    s0 = select(s0 == s0, s0, splat(INFINITY));  // a NaN must not lose against any maximum; it comes back as inf - inf
    s1 = select(s1 == s1, s1, splat(INFINITY));
    for (int64_t first = greater(left, oldest[row]); first < stop;) {
      for (; band[row] > 0 && first >= band_end[row]; enter(row, band[row] - 1)) flush(row);
      const int64_t end = lesser(stop, band_end[row]);
      const ivec lane0 = lane_index() + isplat(int32_t(left - first)), lane1 = lane0 + int32_t(kWidth);
      const ivec length = isplat(int32_t(end - first)), id = isplat(a.ids[t]);
      const ivec m0 = (lane0 >= 0) & (lane0 < length), m1 = (lane1 >= 0) & (lane1 < length);
      norm.add(row, s0, s1, m0, m1);
      mass.add(row, s0, s1, m0 & (load_ids(ids) == id), m1 & (load_ids(ids + kWidth) == id));
      first = end;
    }
  }

  void flush(int64_t row) {
    norm.flush(row, band[row]);
    mass.flush(row, band[row]);
  }

  bool seen(int64_t begin, int64_t end, int64_t panel) const {
    for (int64_t row = begin; row < end; ++row)
      if (oldest[row] < (panel + 1) * kCols && panel * kCols < first_row + row) return true;
    return false;
  }

  void run(int64_t begin, int64_t end) {
    int64_t packed = -1;  // last panel in the ring
    for (int64_t item = begin; item < end; ++item) {
      start(item);
      const int64_t first_panel = greater(first_row - widest, 0) / kCols;
      const int64_t last_panel = (first_row + count - 2) / kCols;  // the last row does not see itself
      for (int64_t panel = first_panel; panel <= last_panel; ++panel) {
        if (panel > packed) pack_panel(packed = panel);
        for (int64_t strip = 0; strip < count; strip += kStrip) {
          const int64_t strip_end = lesser(strip + kStrip, count);
          if (!seen(strip, strip_end, panel)) continue;
          vec scores[kStrip][2];
          multiply<T>(&queries[strip * words], &panels[panel % ring * kCols * words], words, scores);
          for (int64_t row = strip; row < strip_end; ++row)
            reduce(row, panel, scores[row - strip][0], scores[row - strip][1]);
        }
        if ((panel - first_panel) % kFlush == kFlush - 1)
          for (int64_t row = 0; row < count; ++row) flush(row);
      }
      for (int64_t row = 0; row < count; ++row) {
        flush(row);
        norm.write(row, first_row + row - a.past, a.log_norm);
        mass.write(row, first_row + row - a.past, a.log_mass);
      }
    }
  }
};

}  // namespace

void cache_attention(const CacheAttentionArgs& a, int64_t begin, int64_t end) {
  FASTLM_DISPATCH(a.dtype, Walk<scalar_t>(a).run(begin, end));
}

}  // namespace fastlm::FASTLM_ISA

#else
#include "common.h"

FASTLM_KERNEL(cache_attention, void, const CacheAttentionArgs&, int64_t, int64_t)

namespace fastlm {
namespace {

void narrow(const Tensor& ids, int32_t* out) {
  const Tensor x = contiguous(ids);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long, "ids must be int64");
  const int64_t* id = static_cast<const int64_t*>(x.const_data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) {
    out[i] = int32_t(id[i]);
    STD_TORCH_CHECK(out[i] == id[i], "ids must fit in 32 bits, got ", id[i]);
  }
}

std::tuple<Tensor, Tensor> cache_attention(const Tensor& hidden_, const Tensor& next_ids,
                                           const std::optional<Tensor>& memory_,
                                           const std::optional<Tensor>& memory_ids, const std::optional<Tensor>& start_,
                                           const std::vector<double>& theta, const std::vector<int64_t>& window) {
  const Tensor hidden = contiguous(hidden_);
  const std::optional<Tensor> memory = contiguous(memory_), start = contiguous(start_);
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden must have shape [N, D]");
  const int64_t rows = hidden.size(0), width = hidden.size(1), past = memory ? memory->size(0) : 0;
  STD_TORCH_CHECK(next_ids.numel() == rows, "next_ids must have shape [N]");
  STD_TORCH_CHECK(bool(memory) == bool(memory_ids), "memory and memory_ids come together");
  STD_TORCH_CHECK(!memory || (memory->dim() == 2 && memory->size(1) == width && memory_ids->numel() == past &&
                              memory->scalar_type() == hidden.scalar_type()),
                  "memory must have shape [M, D] and the dtype of hidden, memory_ids [M]");
  STD_TORCH_CHECK(!start || (start->scalar_type() == ScalarType::Long && start->numel() == rows),
                  "start must be int64 [N]");
  for (size_t j = 0; j < window.size(); ++j)
    STD_TORCH_CHECK(window[j] > (j == 0 ? 0 : window[j - 1]), "window must be positive and ascending");

  const std::vector<int64_t> shape{int64_t(window.size()), int64_t(theta.size()), rows};
  Tensor log_mass = torch::stable::new_empty(hidden, shape, ScalarType::Float);
  Tensor log_norm = torch::stable::new_empty(hidden, shape, ScalarType::Float);
  if (log_mass.numel() == 0) return {log_mass, log_norm};

  std::vector<int32_t> ids(past + rows);
  if (memory) narrow(*memory_ids, ids.data());
  narrow(next_ids, ids.data() + past);
  const CacheAttentionArgs args{hidden.const_data_ptr(),
                                data(memory),
                                ids.data(),
                                static_cast<const int64_t*>(data(start)),
                                theta.data(),
                                window.data(),
                                static_cast<float*>(log_mass.mutable_data_ptr()),
                                static_cast<float*>(log_norm.mutable_data_ptr()),
                                rows,
                                past,
                                width,
                                int64_t(theta.size()),
                                int64_t(window.size()),
                                dtype_of(hidden, "hidden")};
  const int64_t items = (rows + kCacheAttentionRows - 1) / kCacheAttentionRows;
  torch::stable::parallel_for(0, items, 1,
                              [&](int64_t begin, int64_t end) { cache_attention_kernel(args, begin, end); });
  return {log_mass, log_norm};
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) { m.impl("cache_attention", TORCH_BOX(&fastlm::cache_attention)); }
#endif
