// fastlm._host: the corpus encoder and the CPU's features, for Python. It never sees a tensor.
//
// Encoding is one pass: the text is cut into one part a thread, every part gets a table of its own words in
// order of first occurrence, and the tables are merged part by part. The merged order is the order of first
// occurrence in the whole text, so the result does not depend on the number of threads. Beside the text, which may be
// a mapped file, memory holds the ids once and the words of each part.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace py = pybind11;

void define_lstm_plans(py::module_& m);

namespace {

static_assert(std::endian::native == std::endian::little, "words are compared as little-endian integers");

constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";

uint64_t load8(const char* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
  return x;
}

// ---- UTF-8 and white space, as Python's decoder and str.split() have them -------------------------------

bool is_space(uint32_t c) {
  if (c < 0x80) return c == ' ' || (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x1F);
  return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 ||
         c == 0x202F || c == 0x205F || c == 0x3000;
}

struct InvalidUtf8 {
  const char* at;
};

struct Character {
  uint32_t code;
  int size;
};

// The character at `p`. Overlong forms, surrogates and codes past U+10FFFF are invalid.
Character decode(const char* p, const char* end) {
  const auto* s = reinterpret_cast<const unsigned char*>(p);
  const unsigned char c = s[0];
  if (c < 0x80) return {c, 1};
  const int size = c < 0xC2 ? 0 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 0;
  if (size == 0 || end - p < size) throw InvalidUtf8{p};
  uint32_t code = c & (0xFFu >> (size + 1));
  for (int i = 1; i < size; ++i) {
    if ((s[i] & 0xC0) != 0x80) throw InvalidUtf8{p};
    code = code << 6 | (s[i] & 0x3Fu);
  }
  const bool valid = size == 2 || (size == 3 && code >= 0x800 && (code < 0xD800 || code > 0xDFFF)) ||
                     (size == 4 && code >= 0x10000 && code <= 0x10FFFF);
  if (!valid) throw InvalidUtf8{p};
  return {code, size};
}

// One bit a byte of the 64 at `p`: set below 0x21 and above 0x7F, where a word may end or a character may be invalid.
uint64_t unusual(const char* p) {
  constexpr uint64_t kOnes = 0x0101010101010101u, kHigh = 0x80 * kOnes;
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    const uint64_t x = load8(p + 8 * i);
    const uint64_t flags = (~((x & ~kHigh) + (0x80 - 0x21) * kOnes) | x) & kHigh;
    bits |= ((flags >> 7) * 0x0102040810204080u >> 56) << 8 * i;  // the product gathers one bit a byte in the last byte
  }
  return bits;
}

// ---- Tables of words and characters ---------------------------------------------------------------------

uint64_t mix(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a ^ 0x9E3779B97F4A7C15u) * (b ^ 0xD1B54A32D192ED03u);
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// A word and two integers. Up to 16 bytes they are the word itself, so that words compare without a look at the text;
// of a longer word, `low` is a hash and `high` the last eight bytes.
struct Word {
  const char* text;
  size_t size;
  uint64_t low = 0, high = 0;

  // `readable_end` is the end of the memory that may be read past the word.
  Word(const char* text, size_t size, const char* readable_end) : text(text), size(size) {
    if (size > 16) {
      for (const char* p = text; p < text + size - 8; p += 8) low = mix(low, load8(p));
      high = load8(text + size - 8);
    } else if (readable_end - text >= 16) {
      static constexpr uint64_t kMask[] = {~uint64_t{0}, ~uint64_t{0}, 0, 0};
      const char* mask = reinterpret_cast<const char*>(kMask) + 16 - size;  // as many ones as the word has bytes
      low = load8(text) & load8(mask);
      high = load8(text + 8) & load8(mask + 8);
    } else {
      char padded[16] = {};
      std::memcpy(padded, text, size);
      low = load8(padded), high = load8(padded + 8);
    }
  }

  uint64_t hash() const { return mix(low, high); }
  bool operator==(const Word& other) const {
    return low == other.low && high == other.high && size == other.size &&
           (size <= 16 || std::memcmp(text, other.text, size) == 0);
  }
};

constexpr char kEosText[] = "<eos>";
const Word kEos(kEosText, 5, kEosText + 5);

// Words and their ids, in order of first occurrence. Open addressing; the words themselves stay in the text.
class WordTable {
 public:
  static constexpr size_t kBatch = 32;  // words at a time, for the reads from a table larger than the cache to overlap
  std::vector<Word> words;

  // The ids of `count` words, `kBatch` at most.
  void number(const Word* batch, size_t count, int32_t* ids) {
    if ((words.size() + count) * 2 > slots_.size()) grow();
    uint64_t hashes[kBatch];
    for (size_t i = 0; i < count; ++i) {
      hashes[i] = batch[i].hash();
      __builtin_prefetch(&slots_[hashes[i] & mask()]);
    }
    for (size_t i = 0; i < count; ++i) {
      const int32_t id = slots_[hashes[i] & mask()].id;
      __builtin_prefetch(words.data() + (id < 0 ? 0 : id));
    }
    for (size_t i = 0; i < count; ++i) ids[i] = id(batch[i], hashes[i]);
  }

 private:
  struct Slot {
    uint32_t tag = 0;  // the upper half of the hash
    int32_t id = -1;
  };
  std::vector<Slot> slots_ = std::vector<Slot>(1 << 12);

  size_t mask() const { return slots_.size() - 1; }

  int32_t id(const Word& word, uint64_t hash) {
    const auto tag = static_cast<uint32_t>(hash >> 32);
    for (size_t i = hash & mask();; i = (i + 1) & mask()) {
      Slot& slot = slots_[i];
      if (slot.id < 0) {
        slot = {tag, static_cast<int32_t>(words.size())};
        words.push_back(word);
        return slot.id;
      }
      if (slot.tag == tag && words[slot.id] == word) return slot.id;
    }
  }

  void grow() {
    if (words.size() > INT32_MAX / 2) throw std::length_error("more than 2^30 different words");
    slots_.assign(slots_.size() * 2, Slot());
    for (size_t n = 0; n < words.size(); ++n) {
      const uint64_t hash = words[n].hash();
      size_t i = hash & mask();
      while (slots_[i].id >= 0) i = (i + 1) & mask();
      slots_[i] = {static_cast<uint32_t>(hash >> 32), static_cast<int32_t>(n)};
    }
  }
};

// The ids of a part, in blocks, which are given back one by one: there are never two copies of them all.
class Ids {
 public:
  size_t size() const { return size_; }

  // Room for `count` more ids: always 1, or always kBatch but for the last time.
  int32_t* append(size_t count) {
    if (size_ % kBlock == 0) blocks_.emplace_back(new int32_t[kBlock]);
    int32_t* ids = &blocks_.back()[size_ % kBlock];
    size_ += count;
    return ids;
  }

  // Moves all to `out`, through `map` unless that is empty.
  void move_to(int32_t* out, const std::vector<int32_t>& map) {
    for (size_t begin = 0; begin < size_; begin += kBlock) {
      std::unique_ptr<int32_t[]> block = std::move(blocks_[begin / kBlock]);
      const size_t count = std::min(kBlock, size_ - begin);
      for (size_t i = 0; i < count; ++i) out[begin + i] = map.empty() ? block[i] : map[block[i]];
#if defined(__linux__)                      // where freed memory may stay with the process
      constexpr uintptr_t kPage = 1 << 16;  // a multiple of the machine's
      const auto first = (reinterpret_cast<uintptr_t>(block.get()) + kPage - 1) / kPage * kPage;
      const auto last = reinterpret_cast<uintptr_t>(block.get() + kBlock) / kPage * kPage;
      madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
#endif
    }
  }

 private:
  static constexpr size_t kBlock = 1 << 18;
  static_assert(kBlock % WordTable::kBatch == 0);
  std::vector<std::unique_ptr<int32_t[]>> blocks_;
  size_t size_ = 0;
};

// One part of the text, encoded with ids of its own. Aligned, so that two threads never write the same line.
struct alignas(128) Part {
  WordTable table;
  Ids ids;
  std::exception_ptr error;
  const char* invalid = nullptr;
};

void encode_words(const char* p, const char* end, bool last, Part& part) {
  std::vector<Word> batch;
  batch.reserve(WordTable::kBatch);
  const auto flush = [&] {
    part.table.number(batch.data(), batch.size(), part.ids.append(batch.size()));
    batch.clear();
  };
  const auto add = [&](const Word& word) {
    batch.push_back(word);
    if (batch.size() == WordTable::kBatch) flush();
  };
  const auto add_text = [&](const char* from, const char* to) {
    if (from < to) add(Word(from, static_cast<size_t>(to - from), end));
  };
  const bool open_line = last && p < end && end[-1] != '\n';
  const char* start = p;  // of the word that is being read
  const char* next = p;   // the end of the last character that was decoded
  for (const char* block = p; block < end; block += 64) {
    uint64_t bits;
    if (end - block >= 64) {
      bits = unusual(block);
    } else {
      char padded[64];
      std::memset(padded, 'x', 64);
      std::memcpy(padded, block, end - block);
      bits = unusual(padded);
    }
    for (; bits != 0; bits &= bits - 1) {
      const char* q = block + std::countr_zero(bits);
      if (q < next) continue;
      const Character c = decode(q, end);
      next = q + c.size;
      if (!is_space(c.code)) continue;
      add_text(start, q);
      if (c.code == '\n') add(kEos);
      start = next;
    }
  }
  add_text(start, end);
  if (open_line) add(kEos);
  if (!batch.empty()) flush();
}

// One id a character; white space at both ends of a line is dropped, as str.strip() does.
void encode_characters(const char* p, const char* end, bool last, Part& part) {
  std::vector<int32_t> table(0x110000 + 1, -1);  // the entry past the last character is `<eos>`
  const auto add = [&](uint32_t code, const Word& word) {
    if (table[code] < 0) part.table.number(&word, 1, &table[code]);
    *part.ids.append(1) = table[code];
  };
  const auto add_between = [&](const char* from, const char* to) {
    while (from < to) {
      const Character c = decode(from, to);
      add(c.code, Word(from, static_cast<size_t>(c.size), to));
      from += c.size;
    }
  };
  const bool open_line = last && p < end && end[-1] != '\n';
  const char* written = nullptr;  // the end of what was written of this line; null before its first character
  while (p < end) {
    const Character c = decode(p, end);
    if (c.code == '\n') {
      add(0x110000, kEos);
      written = nullptr;
    } else if (!is_space(c.code)) {
      add_between(written != nullptr ? written : p, p + c.size);
      written = p + c.size;
    }
    p += c.size;
  }
  if (open_line) add(0x110000, kEos);
}

// ---- The whole text -------------------------------------------------------------------------------------

// Runs `work(0) .. work(n - 1)`, each on a thread of its own, or here where no thread can be had.
template <class Work>
void parallel(size_t n, const Work& work) {
  std::vector<std::thread> threads;
  for (size_t i = 1; i < n; ++i) {
    try {
      threads.emplace_back(work, i);
    } catch (const std::system_error&) {
      work(i);
    }
  }
  if (n > 0) work(0);
  for (std::thread& thread : threads) thread.join();
}

// A part ends behind a line end, or, where `at_spaces`, behind a space: no word and no character is cut.
std::vector<std::string_view> cut(std::string_view text, size_t n, bool at_spaces) {
  std::vector<std::string_view> parts;
  size_t begin = 0;
  for (size_t i = 1; i <= n && begin < text.size(); ++i) {
    size_t stop = i == n ? text.size() : text.size() / n * i;
    if (stop <= begin) continue;
    stop = at_spaces ? text.find_first_of("\n ", stop - 1) : text.find('\n', stop - 1);
    stop = stop == text.npos ? text.size() : stop + 1;
    parts.push_back(text.substr(begin, stop - begin));
    begin = stop;
  }
  return parts;
}

py::tuple encode(const py::buffer& data, size_t threads, bool characters) {
  const py::buffer_info info = data.request();
  if (info.ndim != 1 || info.itemsize != 1 || (info.size > 1 && info.strides[0] != 1))
    throw py::type_error("data must be a contiguous buffer of bytes");
  std::string_view text(static_cast<const char*>(info.ptr), static_cast<size_t>(info.size));
  std::vector<Part> parts;
  std::vector<std::vector<int32_t>> maps;  // ids of a part -> ids of the whole
  std::vector<size_t> starts;
  WordTable table;
  size_t total = 0;
  const char* invalid = nullptr;
  {
    const py::gil_scoped_release release;
    if (text.starts_with(kByteOrderMark)) text.remove_prefix(kByteOrderMark.size());
    const std::vector<std::string_view> texts = cut(text, threads < 1 ? 1 : threads, !characters);
    parts.resize(texts.size());
    parallel(parts.size(), [&](size_t i) {
      const char* begin = texts[i].data();
      try {
        (characters ? encode_characters : encode_words)(begin, begin + texts[i].size(), i + 1 == parts.size(),
                                                        parts[i]);
      } catch (const InvalidUtf8& error) {
        parts[i].invalid = error.at;
      } catch (...) {
        parts[i].error = std::current_exception();
      }
    });
    for (Part& part : parts) {
      if (part.error) std::rethrow_exception(part.error);
      if (invalid == nullptr) invalid = part.invalid;
      starts.push_back(total);
      total += part.ids.size();
      std::vector<int32_t>& map = maps.emplace_back();
      if (maps.size() == 1) {  // the first part's table is that of the whole, and its ids stay
        table = std::move(part.table);
        continue;
      }
      const std::vector<Word>& words = part.table.words;
      map.resize(words.size());
      for (size_t j = 0; j < words.size(); j += WordTable::kBatch)
        table.number(&words[j], std::min(words.size() - j, WordTable::kBatch), &map[j]);
      part.table = WordTable();
    }
  }
  if (invalid != nullptr) {
    const py::tuple arguments = py::make_tuple("invalid UTF-8", invalid - static_cast<const char*>(info.ptr));
    PyErr_SetObject(PyExc_ValueError, arguments.ptr());
    throw py::error_already_set();
  }
  py::array_t<int32_t> ids(static_cast<py::ssize_t>(total));
  int32_t* out = ids.mutable_data();
  {
    const py::gil_scoped_release release;
    parallel(parts.size(), [&](size_t i) { parts[i].ids.move_to(out + starts[i], maps[i]); });
  }
  py::list words(table.words.size());
  for (size_t i = 0; i < table.words.size(); ++i) {
    const Word& word = table.words[i];
    const uint64_t bytes[] = {word.low, word.high};  // of a short word: nearer than the text
    words[i] = py::str(word.size <= 16 ? reinterpret_cast<const char*>(bytes) : word.text, word.size);
  }
  return py::make_tuple(words, ids);
}

// ---- The processor --------------------------------------------------------------------------------------

// Features that both the processor has and the operating system saves; "isa" is the widest set the CPU
// kernels are built for that this machine runs.
py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__) || defined(__i386__)
  unsigned a = 0, b = 0, c = 0, d = 0, b7 = 0, c7 = 0, d7 = 0, a71 = 0, unused = 0;
  __get_cpuid(1, &a, &b, &c, &d);
  __get_cpuid_count(7, 0, &a, &b7, &c7, &d7);
  __get_cpuid_count(7, 1, &a71, &b, &unused, &d);
  unsigned saved = 0;
  if (c >> 27 & 1) asm volatile("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
  const bool ymm = (saved & 0x06) == 0x06, zmm = ymm && (saved & 0xE0) == 0xE0, tiles = (saved >> 17 & 3) == 3;
  const auto set = [&](const char* name, bool usable, unsigned word, int bit) {
    const bool present = usable && (word >> bit & 1) != 0;
    features[name] = present;
    return present;
  };
  const bool avx = set("avx", ymm, c, 28);
  const bool avx2 = set("avx2", ymm, b7, 5) & set("fma", ymm, c, 12) & set("f16c", ymm, c, 29);
  set("avx_vnni", ymm, a71, 4);
  const bool avx512 = set("avx512f", zmm, b7, 16) & set("avx512dq", zmm, b7, 17) & set("avx512bw", zmm, b7, 30) &
                      set("avx512vl", zmm, b7, 31);
  set("avx512_vnni", zmm, c7, 11);
  set("avx512_fp16", zmm, d7, 23);
  const bool bf16 = set("avx512_bf16", zmm, a71, 5);
  set("amx_tile", tiles, d7, 24);
  set("amx_bf16", tiles, d7, 22);
  set("amx_int8", tiles, d7, 25);
  const bool wide = avx && avx2 && avx512;
  features["isa"] = wide && bf16 ? "avx512_bf16" : wide ? "avx512" : avx && avx2 ? "avx2" : "baseline";
#else
#if defined(__ARM_NEON)
  features["neon"] = true;
#endif
  features["isa"] = "baseline";
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "The corpus encoder, the CPU's features, and launch plans of CUDA kernels.";
  m.def(
      "encode_words", [](const py::buffer& data, size_t threads) { return encode(data, threads, false); },
      py::arg("data"), py::arg("threads") = 1,
      "UTF-8 text -> (words in order of first occurrence, int32 ids), `<eos>` behind every line.\n\n"
      "Raises ValueError(\"invalid UTF-8\", byte offset).");
  m.def(
      "encode_characters", [](const py::buffer& data, size_t threads) { return encode(data, threads, true); },
      py::arg("data"), py::arg("threads") = 1,
      "The same, one id a character of the stripped lines, `<eos>` behind every line.");
  m.def("cpu_features", &cpu_features, "{feature: bool, \"isa\": name of the kernels' instruction set}.");
  define_lstm_plans(m);
}
