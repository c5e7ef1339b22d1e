// tinyfuse's CPU kernels: plain C ABI, no headers but the compiler's own, built on first use by _native.py.
//
// Every function takes one pointer to a struct of 8-byte fields (the *Args below; _native.py packs them in the
// same order) and returns 0 or an error code. Vectors are the GCC/Clang vector extension, so the same code
// compiles for AVX2, AVX-512 and NEON; intrinsics stand where the compiler has no spelling for an instruction.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include <sched.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

typedef int64_t i64;
typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef int16_t S16 __attribute__((vector_size(32)));
typedef uint16_t U16x8 __attribute__((vector_size(16)));
typedef int16_t S8 __attribute__((vector_size(16)));
typedef int8_t B16 __attribute__((vector_size(16)));
typedef int8_t B8 __attribute__((vector_size(8)));
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

#define INLINE static inline __attribute__((always_inline))

enum DType { F32, BF16, F16, INT8, BOOL };
enum Error { OK, BAD_POSITION, NO_MEMORY, BAD_EXPERT };

// ---------------------------------------------------------------- numbers

template <class V, class T> INLINE V load(const T* p) { V v; std::memcpy(&v, p, sizeof v); return v; }

INLINE F8 load8(const float* p) { return load<F8>(p); }
INLINE F8 load8(const bf16* p) { return (F8)(__builtin_convertvector(load<U16x8>(p), U8) << 16); }
INLINE F8 load8(const int8_t* p) {
#if defined(__AVX2__)
  return (F8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(load<B8>(p), F8);
#endif
}
INLINE float half_to_float(uint16_t h) {
  uint32_t magnitude = h & 0x7fffu, sign = (uint32_t)(h & 0x8000u) << 16, bits;
  float value;
  if (magnitude >= 0x7c00u) bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  else if (magnitude >= 0x400u) bits = (magnitude << 13) + (112u << 23);
  else { value = magnitude * 0x1p-24f; std::memcpy(&bits, &value, 4); }
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}
INLINE F8 load8(const f16* p) {
#if defined(__F16C__)
  return (F8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  F8 v;
  for (int i = 0; i < 8; i++) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

INLINE void store8(float* p, F8 v) { std::memcpy(p, &v, sizeof v); }
INLINE void store8(bf16* p, F8 v) {  // to nearest even; NaN keeps its top bits and stays quiet
  U8 bits = (U8)v;
  U8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, is_nan = (U8)(v != v);
  U8 kept = (rounded & ~is_nan) | (((bits >> 16) | 0x40u) & is_nan);
#if defined(__AVX2__)
  if (!__builtin_expect(_mm256_movemask_ps((__m256)is_nan), 0)) kept = rounded;
  __m128i low = _mm256_castsi256_si128((__m256i)kept), high = _mm256_extracti128_si256((__m256i)kept, 1);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, high));
#else
  U16x8 h = __builtin_convertvector(kept, U16x8);
  std::memcpy(p, &h, sizeof h);
#endif
}
INLINE uint16_t float_to_half(float value) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) {  // subnormal: 0.5f has the spacing 2^-24 that halves have there
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, 4);
    return sign | (bits - 0x3f000000u);
  }
  return sign | (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
}
INLINE void store8(f16* p, F8 v) {
#if defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 8; i++) p[i].bits = float_to_half(v[i]);
#endif
}

// The last n < 8 elements; lanes beyond them are zero.
template <class T> INLINE F8 load_tail(const T* p, i64 n) {
  T lanes[8] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load8(lanes);
}
template <class T> INLINE void store_tail(T* p, F8 v, i64 n) {
  T lanes[8];
  store8(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}
template <class T> INLINE F8 load_some(const T* p, i64 n) { return n >= 8 ? load8(p) : load_tail(p, n); }
template <class T> INLINE void store_some(T* p, F8 v, i64 n) { n >= 8 ? store8(p, v) : store_tail(p, v, n); }
template <class T> INLINE F8 rounded(F8 v) {
  T lanes[8];
  store8(lanes, v);
  return load8(lanes);
}

INLINE F8 splat(float x) { return F8{x, x, x, x, x, x, x, x}; }
INLINE F8 select(I8 mask, F8 yes, F8 no) { return (F8)(((I8)yes & mask) | ((I8)no & ~mask)); }
INLINE F8 max8(F8 a, F8 b) { return select(a < b, b, a); }
INLINE F8 abs8(F8 a) { return (F8)((U8)a & 0x7fffffffu); }
INLINE float sum(F8 v) {
#if defined(__AVX2__)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}
// out[i] = the sum of v[i]'s lanes.
template <int N> INLINE void sum_rows(const F8* v, float* out) {
  int i = 0;
#if defined(__AVX2__)
  for (; i + 4 <= N; i += 4) {
    __m256 low = _mm256_hadd_ps((__m256)v[i], (__m256)v[i + 1]), high = _mm256_hadd_ps((__m256)v[i + 2], (__m256)v[i + 3]);
    __m256 all = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(out + i, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
#endif
  for (; i < N; i++) out[i] = sum(v[i]);
}
INLINE float maximum(F8 v) {
  float m = v[0];
  for (int i = 1; i < 8; i++) m = m < v[i] ? v[i] : m;
  return m;
}

// exp with a relative error of 2 ulp: x = n ln2 + r, degree-6 Taylor-like polynomial of r (Cephes expf).
// Overflows to inf from 88.38 up, is 0 below -87.33, keeps NaN.
INLINE F8 exp8(F8 x) {
  const float low = -87.33f;
  F8 y = select(x < low, splat(low), x);
  y = select(y > 89.0f, splat(89.0f), y);
  F8 shifted = y * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lies in the low mantissa bits
  F8 n = shifted - 12582912.0f;
  F8 r = y - n * 0.693359375f + n * 2.12194440e-4f;
  F8 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  I8 power = ((I8)shifted - 0x4b400000 + 127) << 23;
  return select(x < low, splat(0.0f), p * (F8)power);
}

enum Act { SILU, GELU, GELU_TANH, RELU, RELU_SQUARED, QUICK_GELU, NO_ACT };

// erfc(z) / 2 for z >= 0 within a factor of 1 +- 3e-7 (Numerical Recipes, erfcc), where 1 + erf(-z) would cancel.
// The polynomial is summed in pairs: one after another its ten terms would wait for each other.
INLINE F8 half_erfc8(F8 z) {
  F8 t = 1.0f / (1.0f + 0.5f * z), t2 = t * t, t4 = t2 * t2;
  F8 low = (1.00002368f * t - 1.26551223f) + (0.09678418f * t + 0.37409196f) * t2;
  F8 high = (0.27886807f * t - 0.18628806f) + (1.48851587f * t - 1.13520398f) * t2;
  F8 top = 0.17087277f * t - 0.82215223f;
  return 0.5f * t * exp8(low - z * z + (high + top * t4) * t4);
}

INLINE F8 activate(F8 x, i64 act) {
  if (act == SILU) return x / (1.0f + exp8(-x));
  if (act == QUICK_GELU) return x / (1.0f + exp8(-1.702f * x));
  if (act == RELU || act == RELU_SQUARED) {
    F8 y = select(x < 0.0f, splat(0.0f), x);
    return act == RELU ? y : y * y;
  }
  if (act == GELU_TANH) {  // 0.5 (1 + tanh u) = 1 / (1 + exp(-2u))
    F8 u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp8(-2.0f * u));
  }
  F8 below = half_erfc8(abs8(x) * 0.70710678f);
  return x * select(x < 0.0f, below, 1.0f - below);
}

// ---------------------------------------------------------------- threads

// torch's own OpenMP pool, handed over by tf_init: a second pool on the same cores would fight it.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
Parallel gomp_parallel = nullptr;
int (*omp_thread)() = nullptr;
int (*omp_threads)() = nullptr;

// One turn of waiting for another thread; after a while the core is offered to others.
INLINE void relax(int spins) {
  if (spins > 2000) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Shared {
  alignas(64) std::atomic<i64> next{0};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> phase{0};
};

struct Team {
  int id, size;
  Shared* shared;
  i64 serial = 0;

  i64 claim() { return size == 1 ? serial++ : shared->next.fetch_add(1, std::memory_order_relaxed); }

  // Waits for all; the counter behind claim() starts again at 0.
  void barrier() {
    serial = 0;
    if (size == 1) return;
    int phase = shared->phase.load(std::memory_order_relaxed);
    if (shared->arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      shared->arrived.store(0, std::memory_order_relaxed);
      shared->next.store(0, std::memory_order_relaxed);
      shared->phase.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; shared->phase.load(std::memory_order_acquire) == phase; spins++) relax(spins);
  }
};

// A team that stays together for a whole tf_replay: its leader runs the calls and shares out each parallel body,
// at the price of two spins instead of waking the pool.
struct Crew {
  int size;
  void (*entry)(void*, int, int) = nullptr;
  void* data = nullptr;
  int members = 0;
  alignas(64) std::atomic<int> ticket{0};
  alignas(64) std::atomic<int> working{0};

  void run(void (*body)(void*, int, int), void* region, int threads) {
    entry = body, data = region, members = threads;
    working.store(size - 1, std::memory_order_relaxed);
    ticket.fetch_add(1, std::memory_order_release);
    body(region, 0, threads);
    for (int spins = 0; working.load(std::memory_order_acquire); spins++) relax(spins);
  }
  // The end of the replay is a ticket without a body.
  void dismiss() {
    entry = nullptr;
    ticket.fetch_add(1, std::memory_order_release);
  }
  void follow(int id) {
    for (int seen = 0;; seen++) {
      for (int spins = 0; ticket.load(std::memory_order_acquire) == seen; spins++) relax(spins);
      if (!entry) return;
      if (id < members) entry(data, id, members);
      working.fetch_sub(1, std::memory_order_release);
    }
  }
};
thread_local Crew* crew = nullptr;

template <class Args> struct Region {
  void (*body)(const Args&, Team&);
  const Args* args;
  Shared shared;
};

template <class Args> void region_entry(void* data, int id, int size) {
  auto* region = (Region<Args>*)data;
  Team team{id, size, &region->shared};
  region->body(*region->args, team);
}
template <class Args> void region_in_pool(void* data) { region_entry<Args>(data, omp_thread(), omp_threads()); }

template <class Args> void run_team(i64 threads, void (*body)(const Args&, Team&), const Args& args) {
  if (crew) threads = std::min<i64>(threads, crew->size);
  if (threads > 1 && gomp_parallel) {
    Region<Args> region{body, &args, {}};
    if (crew) crew->run(region_entry<Args>, &region, (int)threads);
    else gomp_parallel(region_in_pool<Args>, &region, (unsigned)threads, 0);
    return;
  }
  Team alone{0, 1, nullptr};
  body(args, alone);
}

// Scratch of the calling thread, kept between calls; 64-byte aligned.
struct Scratch {
  char* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
  char* need(size_t bytes) {
    if (bytes > size || !data) {  // null says that there is no memory, not that none was asked for
      std::free(data);
      size = (bytes + bytes / 4) / 4096 * 4096 + 4096;
      data = (char*)std::aligned_alloc(64, size);
      if (!data) size = 0;
    }
    return data;
  }
};
thread_local Scratch scratch;

INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------- dot products

#if defined(__AVX2__)
INLINE S16 load16s(const int8_t* p) { return (S16)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
INLINE I8 multiply_add(I8 acc, S16 a, S16 b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return (I8)_mm256_dpwssd_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#else
  return acc + (I8)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
#else
INLINE S16 load16s(const int8_t* p) { return __builtin_convertvector(load<B16>(p), S16); }
INLINE I8 multiply_add(I8 acc, S16 a, S16 b) {
  S8 a0, a1, b0, b1;
  std::memcpy(&a0, &a, 16), std::memcpy(&a1, (char*)&a + 16, 16);
  std::memcpy(&b0, &b, 16), std::memcpy(&b1, (char*)&b + 16, 16);
  acc += __builtin_convertvector(a0, I8) * __builtin_convertvector(b0, I8);
  return acc + __builtin_convertvector(a1, I8) * __builtin_convertvector(b1, I8);
}
#endif

// Most rows of a weight between two claims; their bytes aim at CHUNK_BYTES. Two cores read 29 GB/s in runs of 128 KB
// and 20 in runs of 32 KB, where the hardware prefetcher starts anew too often (4096x4096 in int8, one row of x).
constexpr i64 CHUNK = 512;
constexpr i64 CHUNK_BYTES = 131072;

constexpr i64 MOST = 8;  // rows of x that a weight row meets while it is in registers

// A dot product takes x in one of three forms. The rows of x come in blocks of MB = MOST (the last block has fewer),
// and a block holds its rows' vectors of V columns side by side, [padded K / V][MB][V], so that it is read in order.
template <int V> INLINE i64 place(i64 k, i64 m, i64 mb) { return (k / V * mb + m) * V + k % V; }

// int16 digits with one fp32 scale per row and block of DIGITS columns. A lane of the int32 sums takes
// DIGITS / 8 products of at most 128 * 32767: 32 * 4194176 = 134213632 < 2^31.
constexpr i64 DIGITS = 256;
struct Fixed {
  static constexpr int V = 16;
  const int16_t* x;
  i64 padded;
  const float* scales;
  i64 blocks;
};
// fp32 in order.
struct Wide {
  static constexpr int V = 8;
  const float* x;
  i64 padded;
};
// fp32, in each full run of 16 the even columns first: bf16 weights widen in pairs by one shift and one mask.
struct Paired {
  static constexpr int V = 16;
  const float* x;
  i64 padded;
};

INLINE float get(const float* p, i64 i) { return p[i]; }
INLINE float get(const int8_t* p, i64 i) { return p[i]; }
INLINE float get(const bf16* p, i64 i) {
  uint32_t bits = (uint32_t)p[i].bits << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
INLINE float get(const f16* p, i64 i) { return half_to_float(p[i].bits); }

// lanes[m] gets the lanes of x[m0 + m] . w over columns [k, end), of which a tail shorter than a vector is left to
// the caller: returns where it starts. k is a multiple of DIGITS.
// One weight row at a time: memory is then read in order, which the hardware prefetcher follows (four rows side
// by side measured half the bandwidth at K = 576). Few rows of x keep SPLIT sums each, to hide the latency of adding.
template <int MB> constexpr int SPLIT = MB == 1 ? 4 : MB == 2 ? 2 : 1;

template <int MB> INLINE i64 dot(F8 (&lanes)[MB], const Fixed& in, i64 m0, const int8_t* w, i64 k, i64 K) {
  constexpr int S = SPLIT<MB>;
  const int16_t* x = in.x + m0 * in.padded;
  i64 whole = K / 16 * 16;
  while (k < whole) {
    const float* scales = in.scales + m0 * in.blocks + k / DIGITS;
    I8 acc[MB][S] = {};
    i64 end = std::min(k + DIGITS, whole);
    for (; k + 16 * S <= end; k += 16 * S)
      for (int s = 0; s < S; s++) {
        S16 wv = load16s(w + k + 16 * s);
        for (int m = 0; m < MB; m++) acc[m][s] = multiply_add(acc[m][s], load<S16>(x + (k + 16 * s) * MB + m * 16), wv);
      }
    for (; k < end; k += 16) {
      S16 wv = load16s(w + k);
      for (int m = 0; m < MB; m++) acc[m][0] = multiply_add(acc[m][0], load<S16>(x + k * MB + m * 16), wv);
    }
    for (int m = 0; m < MB; m++) {
      for (int s = 1; s < S; s++) acc[m][0] += acc[m][s];
      lanes[m] += __builtin_convertvector(acc[m][0], F8) * scales[m * in.blocks];
    }
  }
  return k;
}

template <int MB, class W> INLINE i64 dot(F8 (&lanes)[MB], const Wide& in, i64 m0, const W* w, i64 k, i64 K) {
  constexpr int S = SPLIT<MB>;
  const float* x = in.x + m0 * in.padded;
  F8 acc[MB][S] = {};
  for (; k + 8 * S <= K; k += 8 * S)
    for (int s = 0; s < S; s++) {
      F8 wv = load8(w + k + 8 * s);
      for (int m = 0; m < MB; m++) acc[m][s] += load8(x + (k + 8 * s) * MB + m * 8) * wv;
    }
  for (; k + 8 <= K; k += 8) {
    F8 wv = load8(w + k);
    for (int m = 0; m < MB; m++) acc[m][0] += load8(x + k * MB + m * 8) * wv;
  }
  for (int m = 0; m < MB; m++) {
    lanes[m] = acc[m][0];
    for (int s = 1; s < S; s++) lanes[m] += acc[m][s];
  }
  return k;
}

template <int MB> INLINE i64 dot(F8 (&lanes)[MB], const Paired& in, i64 m0, const bf16* w, i64 k, i64 K) {
  constexpr int S = MB <= 4 ? 2 : 1;
  const float* x = in.x + m0 * in.padded;
  F8 acc[MB][S] = {};
  for (; k + 16 <= K; k += 16) {
    U8 pairs = load<U8>(w + k);
    F8 even = (F8)(pairs << 16), odd = (F8)(pairs & 0xffff0000u);
    for (int m = 0; m < MB; m++) {
      acc[m][0] += load8(x + k * MB + m * 16) * even;
      acc[m][S - 1] += load8(x + k * MB + m * 16 + 8) * odd;
    }
  }
  for (int m = 0; m < MB; m++) lanes[m] = S == 2 ? acc[m][0] + acc[m][1] : acc[m][0];
  return k;
}

// Column k of row m of a block, its scale included.
template <int MB> INLINE float column(const Fixed& in, i64 m0, i64 m, i64 k) {
  return in.x[m0 * in.padded + place<16>(k, m, MB)] * in.scales[(m0 + m) * in.blocks + k / DIGITS];
}
template <int MB, class In> INLINE float column(const In& in, i64 m0, i64 m, i64 k) {
  return in.x[m0 * in.padded + place<In::V>(k, m, MB)];
}

// Bytes of weights asked for ahead of one row of x, over the ends of pages, where the hardware prefetcher stops: two
// cores read 576x576 to 49152x576 from memory at 44 to 58 GB/s, not 38 to 46, and a step of 30 such layers takes 0.95 of
// the time. 2048 to 8192 measured alike, 16384 too much.
constexpr i64 AHEAD = 4096;

// out[m * ldo + n] = x[m0 + m] . w[n] for MB rows of x and `rows` rows of w. Several rows of x are taken 16 KB of
// columns at a time, which stay in the first-level cache while all weight rows pass; where that cuts the weight rows
// into pieces, the hardware cannot foresee them and two rows ahead are asked for.
template <int MB, class In, class W>
void dot_rows(const In& in, i64 m0, const W* w, i64 ldw, i64 K, i64 rows, float* out, i64 ldo) {
  constexpr i64 BLOCK = 16384 / (MB * sizeof(*in.x)) / DIGITS * DIGITS;
  for (i64 k = 0; k < K; k += BLOCK) {
    i64 end = MB == 1 ? K : std::min(k + BLOCK, K);
    for (i64 n = 0; n < rows; n++) {
      const char* next = MB > 1 ? (const char*)(w + (n + 2) * ldw + k) : (const char*)(w + n * ldw) + AHEAD;
      for (const char* stop = next + (end - k) * sizeof(W); next < stop; next += 64) __builtin_prefetch(next);
      F8 lanes[MB] = {};
      i64 done = dot<MB>(lanes, in, m0, w + n * ldw, k, end);
      float sums[MB];
      sum_rows<MB>(lanes, sums);
      for (i64 i = done; i < end; i++)
        for (int m = 0; m < MB; m++) sums[m] += column<MB>(in, m0, m, i) * get(w + n * ldw, i);
      for (int m = 0; m < MB; m++) out[m * ldo + n] = k == 0 ? sums[m] : out[m * ldo + n] + sums[m];
    }
    if (MB == 1) break;
  }
}

// sums[m * lds + n] += factor[m] . (ROWS rows of w)[n + lane], lanes from `some` on left out of w.
template <int MB, int ROWS, class W>
INLINE void add_rows(const W* w, i64 ldw, i64 some, const float (&factor)[MB][4], float* sums, i64 lds) {
  F8 row[ROWS];
  for (int j = 0; j < ROWS; j++) row[j] = load_some(w + j * ldw, some);
  if (MB == 1)  // over the ends of pages, where the hardware stops: 1600x6400 in fp32 takes 1.86 ms, not 2.06
    for (int j = 0; j < ROWS; j++) __builtin_prefetch((const char*)(w + j * ldw) + 512);
  for (int m = 0; m < MB; m++) {
    F8 sum = row[0] * factor[m][0];
    for (int j = 1; j < ROWS; j++) sum += row[j] * factor[m][j];
    store8(sums + m * lds, load8(sums + m * lds) + sum);
  }
}

// out[m * ldo + n] = x[m0 + m] . w[:, n] for MB rows of x and `columns` columns of w [K, ldw]. Four rows of w at a time,
// in long runs, which the hardware prefetcher follows; SPAN rows are summed by themselves, since the rounding of a sum
// grows with its terms.
template <int MB, class W>
void dot_columns(const Wide& in, i64 m0, const W* w, i64 ldw, i64 K, i64 columns, float* out, i64 ldo) {
  constexpr i64 SPAN = 128;
  alignas(32) float sums[MOST * CHUNK];
  const float* x = in.x + m0 * in.padded;
  i64 whole = columns / 8 * 8;
  for (i64 first = 0; first < K; first += SPAN) {
    i64 end = std::min(first + SPAN, K);
    for (int m = 0; m < MB; m++) std::memset(sums + m * ldo, 0, (columns + 7) / 8 * 8 * sizeof(float));
    for (i64 k = first; k < end; k += 4) {
      bool four = end - k >= 4;
      float factor[MB][4] = {};
      for (int m = 0; m < MB; m++)
        for (i64 j = 0; j < 4 && k + j < end; j++) factor[m][j] = x[place<8>(k + j, m, MB)];
      for (i64 n = 0; four && n < whole; n += 8) add_rows<MB, 4>(w + k * ldw + n, ldw, 8, factor, sums + n, ldo);
      if (four && whole < columns)
        add_rows<MB, 4>(w + k * ldw + whole, ldw, columns - whole, factor, sums + whole, ldo);
      for (i64 j = 0; !four && k + j < end; j++) {
        for (int m = 0; m < MB; m++) factor[m][0] = factor[m][j];
        for (i64 n = 0; n < columns; n += 8)
          add_rows<MB, 1>(w + (k + j) * ldw + n, ldw, columns - n, factor, sums + n, ldo);
      }
    }
    for (int m = 0; m < MB; m++)
      for (i64 n = 0; n < columns; n += 8) {
        F8 before = first ? load8(out + m * ldo + n) : F8{};
        store8(out + m * ldo + n, before + load8(sums + m * ldo + n));
      }
  }
}

template <int MB, class In, class W>
void dot_one(const In& in, i64 m0, const W* w, i64 ldw, i64 K, i64 n0, i64 rows, bool by_columns, float* out, i64 ldo) {
  if constexpr (std::is_same<In, Wide>::value && !std::is_same<W, int8_t>::value)
    if (by_columns) return dot_columns<MB>(in, m0, w + n0, ldw, K, rows, out, ldo);
  dot_rows<MB>(in, m0, w + n0 * ldw, ldw, K, rows, out, ldo);
}

template <class In, class W>
void dot_block(
    const In& in, i64 m0, i64 mb, const W* w, i64 ldw, i64 K, i64 n0, i64 rows, bool by_columns, float* out, i64 ldo) {
  switch (mb) {
    case 1: return dot_one<1>(in, m0, w, ldw, K, n0, rows, by_columns, out, ldo);
    case 2: return dot_one<2>(in, m0, w, ldw, K, n0, rows, by_columns, out, ldo);
    case 3: return dot_one<3>(in, m0, w, ldw, K, n0, rows, by_columns, out, ldo);
    case 4: return dot_one<4>(in, m0, w, ldw, K, n0, rows, by_columns, out, ldo);
    case 5: return dot_one<5>(in, m0, w, ldw, K, n0, rows, by_columns, out, ldo);
    case 6: return dot_one<6>(in, m0, w, ldw, K, n0, rows, by_columns, out, ldo);
    case 7: return dot_one<7>(in, m0, w, ldw, K, n0, rows, by_columns, out, ldo);
    default: return dot_one<8>(in, m0, w, ldw, K, n0, rows, by_columns, out, ldo);
  }
}

// ---------------------------------------------------------------- linear

struct Part {
  const void* weight;   // [N, K], row stride ldw; by columns [K, N], row stride ldw
  const float* scale;   // [N] for int8, else null
  const void* bias;     // [N] in x's dtype, or null
  const void* residual; // [M, N] in x's dtype, or null
  void* y;              // [M, N] in x's dtype
  i64 N, ldw;
};

// act == NO_ACT: every part is a linear of its own. Otherwise one result, in parts[0].y: act(first part), times the
// second part if there is one.
struct LinearArgs {
  const void* x;  // [M, K] contiguous
  i64 M, K, xtype, wtype, by_columns, act, threads, count;
  Part parts[1];  // `count` of them
};

// Rows [first, end) of x meet weight `index` of a stack.
struct Group { i64 index, first, end; };

struct LinearWork {
  const LinearArgs* args;
  const Group* groups;
  i64 group_count, most;          // most: rows of the largest group
  i64 weight_step, scale_step;    // elements from one weight of a stack to the next
  int16_t* digits;
  float *scales, *wide;
  i64 padded, blocks;
  std::atomic<int>* unfit;  // a row that digits cannot carry (Inf, NaN, a magnitude without an inverse)
};

// Row m of x into its block of fp32, in order (V = 8) or with the even columns of 16 first (V = 16).
template <int V, class X> void widen_row(const X* x, i64 K, float* block, i64 m, i64 mb) {
  i64 k = 0;
  for (; V == 16 && k + 16 <= K; k += 16) {
    U8 pairs = load<U8>(x + k);
    store8(block + place<V>(k, m, mb), (F8)(pairs << 16));
    store8(block + place<V>(k, m, mb) + 8, (F8)(pairs & 0xffff0000u));
  }
  for (; k + 8 <= K; k += 8) store8(block + place<V>(k, m, mb), load8(x + k));
  if (k < K) store_tail(block + place<V>(k, m, mb), load_tail(x + k, K - k), K - k);
}

// Row m of x into its block of digits; false where digits cannot carry it (Inf, NaN, a scale without an inverse).
template <class X> bool digits_row(const X* x, i64 K, int16_t* block, float* scales, i64 m, i64 mb) {
  for (i64 k0 = 0; k0 < K; k0 += DIGITS, scales++) {
    i64 end = std::min(k0 + DIGITS, K);
    I8 top = {};  // magnitudes order as their bits do, NaN above all
    for (i64 k = k0; k < end; k += 8) {
      I8 v = (I8)abs8(load_some(x + k, end - k));
      top = (v & (v > top)) | (top & ~(v > top));
    }
    int32_t bits = top[0];
    for (int i = 1; i < 8; i++) bits = std::max(bits, (int32_t)top[i]);
    float largest;
    std::memcpy(&largest, &bits, 4);
    if (!(largest < 3e38f) || (largest > 0.0f && largest < 1e-33f)) return false;
    *scales = largest / 32767.0f;
    float inverse = largest > 0.0f ? 32767.0f / largest : 0.0f;
    for (i64 k = k0; k < end; k += 8) {
      F8 shifted = load_some(x + k, end - k) * inverse + 12582912.0f;
      S8 d = __builtin_convertvector((I8)shifted - 0x4b400000, S8);
      std::memcpy(block + place<16>(k, m, mb), &d, sizeof d);
    }
  }
  return true;
}

template <class X> void finish_row(const Part& p, i64 m, i64 n0, i64 rows, float* out, const float* up, const Part* pu, i64 act) {
  X* y = (X*)p.y + m * p.N + n0;
  const X* residual = p.residual ? (const X*)p.residual + m * p.N + n0 : nullptr;
  for (i64 n = 0; n < rows; n += 8) {
    i64 some = rows - n;
    F8 v = load8(out + n);
    if (p.scale) v *= load_some(p.scale + n0 + n, some);
    if (p.bias) v += load_some((const X*)p.bias + n0 + n, some);
    if (pu) {
      F8 u = load8(up + n);
      if (pu->scale) u *= load_some(pu->scale + n0 + n, some);
      if (pu->bias) u += load_some((const X*)pu->bias + n0 + n, some);
      v = activate(v, act) * u;
    } else if (act != NO_ACT) {
      v = activate(v, act);
    }
    if (residual) v += load_some(residual + n, some);
    store_some(y + n, v, some);
  }
}

template <class In, class W>
void linear_chunk(const LinearArgs& a, const In& in, const Group& g, const Part& p, const Part* up, i64 n0, i64 rows) {
  alignas(32) float out[MOST * CHUNK], out_up[MOST * CHUNK];
  for (i64 m0 = g.first; m0 < g.end; m0 += MOST) {
    i64 mb = std::min(MOST, g.end - m0);
    dot_block(in, m0, mb, (const W*)p.weight, p.ldw, a.K, n0, rows, a.by_columns, out, CHUNK);
    if (up) dot_block(in, m0, mb, (const W*)up->weight, up->ldw, a.K, n0, rows, a.by_columns, out_up, CHUNK);
    for (i64 m = 0; m < mb; m++) {
      float *o = out + m * CHUNK, *u = out_up + m * CHUNK;
      if (a.xtype == BF16) finish_row<bf16>(p, m0 + m, n0, rows, o, u, up, a.act);
      else if (a.xtype == F16) finish_row<f16>(p, m0 + m, n0, rows, o, u, up, a.act);
      else finish_row<float>(p, m0 + m, n0, rows, o, u, up, a.act);
    }
  }
}

// Part `p` of weight `index` of a stack.
template <class W> Part part_of(const LinearWork& w, Part p, i64 index) {
  p.weight = (const W*)p.weight + index * w.weight_step;
  if (p.scale) p.scale += index * w.scale_step;
  return p;
}

template <class In, class W> void linear_chunks(const LinearWork& w, const In& in, Team& team) {
  const LinearArgs& a = *w.args;
  i64 joined = a.act != NO_ACT ? a.count : 1;  // parts that make one result
  i64 parts = a.count / joined, units = parts * w.group_count;  // a unit: a part for the rows of a group
  i64 row_bytes = a.K * (i64)sizeof(W) * joined;
  i64 fewest = w.most == 1 ? 4 : 32;
  i64 rows = 0;
  for (i64 i = 0; i < parts; i++) rows += a.parts[i].N * w.group_count;
  i64 share = std::min(CHUNK_BYTES / row_bytes, rows / (2 * team.size)) / 4 * 4;
  i64 most = CHUNK;
  if (a.by_columns) {  // a chunk is a run within each of K rows, the longer the better; one row of x has the room of all
    share = rows / team.size / 16 * 16;
    if (w.most == 1) most *= MOST;
  }
  i64 step = std::max(fewest, std::min(most, share));
  auto chunks = [&](i64 unit) { return ceil_div(a.parts[unit % parts].N, step); };
  i64 unit = 0, first = 0;  // `first`: the number of the unit's first chunk
  for (i64 chunk = team.claim(); unit < units; chunk = team.claim()) {
    while (unit < units && chunk - first >= chunks(unit)) first += chunks(unit++);
    if (unit == units) return;
    const Group& g = w.groups[unit / parts];
    Part p = part_of<W>(w, a.parts[unit % parts], g.index);
    Part up = joined == 2 ? part_of<W>(w, a.parts[1], g.index) : p;
    i64 n0 = (chunk - first) * step;
    linear_chunk<In, W>(a, in, g, p, joined == 2 ? &up : nullptr, n0, std::min(step, p.N - n0));
  }
}

// body(row, first row of its block, rows of the block) for this thread's share of the rows.
template <class Body> INLINE void each_row(const LinearWork& w, Team& team, Body body) {
  for (i64 i = 0; i < w.group_count; i++) {
    const Group& g = w.groups[i];
    for (i64 m = g.first + (team.id + team.size - g.first % team.size) % team.size; m < g.end; m += team.size) {
      i64 m0 = g.first + (m - g.first) / MOST * MOST;
      body(m, m0, std::min(MOST, g.end - m0));
    }
  }
}

template <class X> void linear_prepare(const LinearWork& w, Team& team) {
  const LinearArgs& a = *w.args;
  const X* x = (const X*)a.x;
  if (w.digits) {
    each_row(w, team, [&](i64 m, i64 m0, i64 mb) {
      if (!digits_row(x + m * a.K, a.K, w.digits + m0 * w.padded, w.scales + m * w.blocks, m - m0, mb))
        w.unfit->store(1, std::memory_order_relaxed);
    });
    team.barrier();
    if (!w.unfit->load(std::memory_order_relaxed)) return;
  }
  each_row(w, team, [&](i64 m, i64 m0, i64 mb) {
    float* block = w.wide + m0 * w.padded;
    if (sizeof(X) == 2 && a.wtype == BF16 && !a.by_columns) widen_row<sizeof(X) == 2 ? 16 : 8>(x + m * a.K, a.K, block, m - m0, mb);
    else widen_row<8>(x + m * a.K, a.K, block, m - m0, mb);
  });
  team.barrier();
}

void linear_body(const LinearWork& w, Team& team) {
  const LinearArgs& a = *w.args;
  if (a.xtype == BF16) linear_prepare<bf16>(w, team);
  else if (a.xtype == F16) linear_prepare<f16>(w, team);
  else if (w.wide) linear_prepare<float>(w, team);
  Wide wide{w.wide ? w.wide : (const float*)a.x, w.padded};
  if (a.wtype == INT8) {
    if (w.digits && !w.unfit->load(std::memory_order_relaxed))
      linear_chunks<Fixed, int8_t>(w, Fixed{w.digits, w.padded, w.scales, w.blocks}, team);
    else linear_chunks<Wide, int8_t>(w, wide, team);
  } else if (a.wtype == BF16 && a.by_columns) linear_chunks<Wide, bf16>(w, wide, team);
  else if (a.wtype == BF16) linear_chunks<Paired, bf16>(w, Paired{w.wide, w.padded}, team);
  else if (a.wtype == F16) linear_chunks<Wide, f16>(w, wide, team);
  else linear_chunks<Wide, float>(w, wide, team);
}

i64 element_size(i64 type) { return type == F32 ? 4 : type == BF16 || type == F16 ? 2 : 1; }

int run_linear(const LinearArgs* a, const Group* groups, i64 count, i64 most, i64 weight_step, i64 scale_step) {
  std::atomic<int> unfit{0};
  LinearWork w{a, groups, count, most, weight_step, scale_step};
  w.padded = ceil_div(a->K, 16) * 16, w.blocks = ceil_div(a->K, DIGITS), w.unfit = &unfit;
  bool fixed = a->wtype == INT8 && a->xtype != F32;
  if (a->xtype != F32 || a->M > 1) {
    size_t digits = fixed ? (size_t)(a->M * w.padded * 2 + 63) / 64 * 64 : 0;
    size_t scales = fixed ? (size_t)(a->M * w.blocks * 4 + 63) / 64 * 64 : 0;
    char* data = scratch.need(digits + scales + (size_t)(a->M * w.padded) * 4);
    if (!data) return NO_MEMORY;
    w.wide = (float*)(data + digits + scales);
    if (fixed) w.digits = (int16_t*)data, w.scales = (float*)(data + digits);
  }
  i64 bytes = 0;
  for (i64 i = 0; i < a->count; i++) bytes += a->parts[i].N * a->K * element_size(a->wtype);
  // Waking the team costs about as much as reading 64 KB.
  run_team<LinearWork>(bytes * a->M < 65536 ? 1 : a->threads, linear_body, w);
  return OK;
}

// A stack of `experts` weights, the first of which is parts[0] (under an activation also parts[1]). Row m of x meets
// weight ids[m]; or, sorted by expert, those before ends[0] weight 0, those from there before ends[1] weight 1, and
// those from the last end on get zeros.
struct ExpertsArgs {
  const int32_t* ends;  // [experts] or null
  const i64* ids;       // [M] or null
  i64 experts, weight_step, scale_step;
  LinearArgs linear;
};

// The runs of rows that meet one weight, into `groups` (at most M); their number, or -1 for an id out of range.
i64 find_groups(const ExpertsArgs& e, Group* groups, i64* most, i64* done) {
  i64 count = 0, M = e.linear.M, first = 0;
  auto add = [&](i64 index, i64 end) {
    groups[count++] = {index, first, end};
    *most = std::max(*most, end - first);
    first = end;
  };
  if (e.ends) {
    for (i64 i = 0; i < e.experts; i++)
      if (std::min<i64>(e.ends[i], M) > first) add(i, std::min<i64>(e.ends[i], M));
  } else {
    while (first < M) {
      i64 id = e.ids[first], end = first + 1;
      if (id < -e.experts || id >= e.experts) return -1;
      while (end < M && e.ids[end] == id) end++;
      add(id < 0 ? id + e.experts : id, end);
    }
  }
  *done = first;
  return count;
}

}  // namespace

extern "C" int tf_linear(const LinearArgs* a) {
  Group all{0, 0, a->M};
  return run_linear(a, &all, 1, a->M, 0, 0);
}

extern "C" int tf_experts(const ExpertsArgs* e) {
  const LinearArgs& a = e->linear;
  thread_local Scratch kept;  // not `scratch`, in which the activations are laid out meanwhile
  auto* groups = (Group*)kept.need((a.M + 1) * sizeof(Group));
  if (!groups) return NO_MEMORY;
  i64 most = 0, done = 0, count = find_groups(*e, groups, &most, &done);
  if (count < 0) return BAD_EXPERT;
  i64 row = a.parts[0].N * element_size(a.xtype);
  std::memset((char*)a.parts[0].y + done * row, 0, (a.M - done) * row);
  return count ? run_linear(&a, groups, count, most, e->weight_step, e->scale_step) : OK;
}

// ---------------------------------------------------------------- norms

struct NormArgs {
  const void *x, *residual, *weight, *bias;  // residual, weight, bias may be null
  void *total, *y;                           // total: x + residual, when there is one
  i64 rows, N, type, weight_type, bias_type;
  i64 center, unit_offset, cast_first, threads;
  double eps;
};

namespace {

struct NormWork { const NormArgs* args; const float *gain, *bias; float* rows; };

// x, or the sum of x and the residual as it is kept in `total`, of 8 or fewer elements.
template <class X, bool RESIDUAL> INLINE F8 norm_input(const X* x, const X* residual, X* total, i64 some) {
  if (!RESIDUAL) return load_some(x, some);
  F8 v = load_some(x, some) + load_some(residual, some);
  store_some(total, v, some);
  return sizeof(X) == 4 ? v : load_some(total, some);
}

// Four sums side by side: one would wait for itself.
template <class X, bool RESIDUAL, bool CENTER>
void norm_row(const NormArgs& a, const float* gain, const float* bias, float* buffer, i64 row) {
  const i64 first = row * a.N, N = a.N, whole = N / 32 * 32, round = a.cast_first;
  const X *x = (const X*)a.x + first, *residual = (const X*)a.residual + first;
  X *sum_kept = (X*)a.total + first, *y = (X*)a.y + first;
  F8 sums[4] = {}, squares[4] = {};
  auto take = [&](i64 n, i64 some, int j) {
    F8 v = norm_input<X, RESIDUAL>(x + n, residual + n, sum_kept + n, some);
    store8(buffer + n, v);
    sums[j] += CENTER ? v : v * v;
  };
  for (i64 n = 0; n < whole; n += 32)
    for (int j = 0; j < 4; j++) take(n + 8 * j, 8, j);
  for (i64 n = whole; n < N; n += 8) take(n, N - n, 0);
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / N, mean = 0.0f;
  if (CENTER) {
    mean = total;
    for (i64 n = 0; n < whole; n += 32)
      for (int j = 0; j < 4; j++) {
        F8 v = load8(buffer + n + 8 * j) - mean;
        squares[j] += v * v;
      }
    for (i64 n = whole; n < N; n += 8) {
      F8 v = load8(buffer + n) - mean;
      if (N - n < 8) for (i64 i = N - n; i < 8; i++) v[i] = 0.0f;
      squares[0] += v * v;
    }
    total = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / N;
  }
  float factor = 1.0f / std::sqrt(total + (float)a.eps);
  auto put = [&](i64 n, i64 some) {
    F8 v = (load8(buffer + n) - mean) * factor;
    if (round) v = rounded<X>(v);
    if (gain) v *= load8(gain + n);
    if (bias) v += load8(bias + n);
    store_some(y + n, v, some);
  };
  i64 n = 0;
  for (; n + 8 <= N; n += 8) put(n, 8);
  if (n < N) put(n, N - n);
}

template <class X> void norm_rows(const NormWork& w, float* buffer, i64 row, i64 last) {
  const NormArgs& a = *w.args;
  auto run = a.residual ? (a.center ? norm_row<X, true, true> : norm_row<X, true, false>)
                        : (a.center ? norm_row<X, false, true> : norm_row<X, false, false>);
  for (; row < last; row++) run(a, w.gain, w.bias, buffer, row);
}

void norm_body(const NormWork& w, Team& team) {
  const NormArgs& a = *w.args;
  float* buffer = w.rows + team.id * ceil_div(a.N, 16) * 16;
  i64 first = a.rows * team.id / team.size, last = a.rows * (team.id + 1) / team.size;
  if (a.type == BF16) norm_rows<bf16>(w, buffer, first, last);
  else if (a.type == F16) norm_rows<f16>(w, buffer, first, last);
  else norm_rows<float>(w, buffer, first, last);
}

template <class W> void widen_gain(const void* weight, i64 N, bool add_one, bool round_sum, float* gain) {
  for (i64 n = 0; n < N; n += 8) {
    F8 g = load_some((const W*)weight + n, N - n);
    if (add_one) g = round_sum ? rounded<W>(1.0f + g) : 1.0f + g;
    store8(gain + n, g);
  }
}
void widen_gain(i64 type, const void* weight, i64 N, bool add_one, bool round_sum, float* gain) {
  if (type == BF16) widen_gain<bf16>(weight, N, add_one, round_sum, gain);
  else if (type == F16) widen_gain<f16>(weight, N, add_one, round_sum, gain);
  else widen_gain<float>(weight, N, add_one, round_sum, gain);
}

}  // namespace

extern "C" int tf_norm(const NormArgs* a) {
  i64 padded = ceil_div(a->N, 16) * 16;
  i64 threads = a->rows * a->N < 32768 ? 1 : std::min(a->threads, a->rows);
  float* data = (float*)scratch.need((size_t)padded * 4 * (2 + threads));
  if (!data) return NO_MEMORY;
  NormWork w{a, nullptr, nullptr, data + 2 * padded};
  if (a->weight) {
    widen_gain(a->weight_type, a->weight, a->N, a->unit_offset, a->cast_first, data);
    w.gain = data;
  }
  if (a->bias) {
    widen_gain(a->bias_type, a->bias, a->N, false, false, data + padded);
    w.bias = data + padded;
  }
  run_team<NormWork>(threads, norm_body, w);
  return OK;
}

// ---------------------------------------------------------------- gated activation

struct GatedActArgs {
  const void *gate, *up;
  void* y;  // [rows, N] contiguous
  i64 rows, N, gate_stride, up_stride, type, act, threads;
};

namespace {

template <class X> void gated_row(const GatedActArgs& a, i64 row) {
  const X *gate = (const X*)a.gate + row * a.gate_stride, *up = (const X*)a.up + row * a.up_stride;
  X* y = (X*)a.y + row * a.N;
  for (i64 n = 0; n < a.N; n += 8) {
    i64 some = a.N - n;
    store_some(y + n, rounded<X>(activate(load_some(gate + n, some), a.act)) * load_some(up + n, some), some);
  }
}

void gated_body(const GatedActArgs& a, Team& team) {
  i64 first = a.rows * team.id / team.size, last = a.rows * (team.id + 1) / team.size;
  for (i64 row = first; row < last; row++) {
    if (a.type == BF16) gated_row<bf16>(a, row);
    else if (a.type == F16) gated_row<f16>(a, row);
    else gated_row<float>(a, row);
  }
}

}  // namespace

extern "C" int tf_gated_act(const GatedActArgs* a) {
  run_team<GatedActArgs>(a->rows * a->N < 16384 ? 1 : a->threads, gated_body, *a);
  return OK;
}

// ---------------------------------------------------------------- int8 weights as floats

struct DequantizeArgs {
  const int8_t* weight;  // [rows, N], row stride ldw
  const float* scale;    // [rows]
  void* out;             // [rows, N] contiguous
  i64 rows, N, ldw, type, threads;
};

namespace {

template <class X> void dequantize_row(const DequantizeArgs& a, i64 row) {
  const int8_t* weight = a.weight + row * a.ldw;
  X* out = (X*)a.out + row * a.N;
  i64 n = 0;
#if defined(__AVX512BF16__)
  // The instruction takes numbers below 2^-126 for 0, which a product with a larger scale never is.
  if (std::is_same<X, bf16>::value && a.scale[row] >= 0x1p-126f) {
    __m512 scale = _mm512_set1_ps(a.scale[row]);
    auto some = [&](i64 at) {
      __m128i bytes = _mm_loadu_si128((const __m128i*)(weight + at));
      return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale);
    };
    for (; n + 32 <= a.N; n += 32) {
      __m512bh both = _mm512_cvtne2ps_pbh(some(n + 16), some(n));
      std::memcpy(out + n, &both, sizeof both);
    }
  }
#endif
  for (; n < a.N; n += 8) store_some(out + n, load_some(weight + n, a.N - n) * a.scale[row], a.N - n);
}

void dequantize_body(const DequantizeArgs& a, Team& team) {
  i64 first = a.rows * team.id / team.size, last = a.rows * (team.id + 1) / team.size;
  for (i64 row = first; row < last; row++) {
    if (a.type == BF16) dequantize_row<bf16>(a, row);
    else if (a.type == F16) dequantize_row<f16>(a, row);
    else dequantize_row<float>(a, row);
  }
}

}  // namespace

extern "C" int tf_dequantize(const DequantizeArgs* a) {
  run_team<DequantizeArgs>(a->rows * a->N < 16384 ? 1 : a->threads, dequantize_body, *a);
  return OK;
}

// ---------------------------------------------------------------- a step's positions

struct CountersArgs {
  i64* positions;  // [count]
  i64 count;
  struct { i64 *counter, ring; } layers[1];  // `count` of them
};

extern "C" int tf_step_counters(const CountersArgs* a) {
  for (i64 i = 0; i < a->count; i++) {
    i64 value = (*a->layers[i].counter)++, ring = a->layers[i].ring;
    a->positions[i] = ring ? value % ring : value;
  }
  return OK;
}

struct TablesArgs {
  const void* positions;     // [B, S] of int64, or of int32 where `narrow`
  const float* frequencies;  // [half]
  void *cos, *sin;           // [B, S, 2 half]
  i64 B, S, stride_b, stride_s, narrow, half, type;
  double scale;
};

namespace {

template <class X> void tables_row(const TablesArgs& a, float position, X* cos, X* sin) {
  for (i64 i = 0; i < a.half; i += 8) {
    alignas(32) float c[8] = {}, n[8] = {};
    i64 left = std::min<i64>(8, a.half - i);
    for (i64 j = 0; j < left; j++) {
      float angle = position * a.frequencies[i + j];
      c[j] = std::cos(angle) * (float)a.scale, n[j] = std::sin(angle) * (float)a.scale;
    }
    for (i64 at : {i, a.half + i}) {
      store_some(cos + at, load8(c), left);
      store_some(sin + at, load8(n), left);
    }
  }
}

template <class X> void tables(const TablesArgs& a) {
  for (i64 token = 0; token < a.B * a.S; token++) {
    i64 at = token / a.S * a.stride_b + token % a.S * a.stride_s, row = token * 2 * a.half;
    float position = a.narrow ? (float)((const int32_t*)a.positions)[at] : (float)((const i64*)a.positions)[at];
    tables_row<X>(a, position, (X*)a.cos + row, (X*)a.sin + row);
  }
}

}  // namespace

extern "C" int tf_rope_tables(const TablesArgs* a) {
  if (a->type == BF16) tables<bf16>(*a);
  else if (a->type == F16) tables<f16>(*a);
  else tables<float>(*a);
  return OK;
}

// ---------------------------------------------------------------- rope and the cache

struct View4 {  // [B, H, S, D], the last stride 1
  void* data;
  i64 b, h, s;
};

struct RopeArgs {
  View4 q, k, v;        // k.data null: q alone is rotated; q.data null: k and v are only appended
  View4 out;            // rotated q
  View4 keys, values;
  const i64* pos;       // [S]
  const void *cos, *sin;
  i64 cos_b, cos_s, sin_b, sin_s, R, rotary_type;
  i64 B, H, Hkv, S, D, Dv, L, type, interleaved, threads;
};

namespace {

// a * cos + b * sin with the roundings that eager code makes in dtype P.
template <class P> INLINE F8 turn(F8 a, F8 b, F8 cos, F8 sin) {
  return rounded<P>(rounded<P>(a * cos) + rounded<P>(b * sin));
}

template <class X, class C, class P>
void rope_row(const X* x, const C* cos, const C* sin, X* y, i64 D, i64 R, bool interleaved) {
  if (interleaved) {
    for (i64 i = 0; i < R; i += 2) {
      float a = get(x, i), b = get(x, i + 1);
      F8 even = turn<P>(splat(a), splat(-b), splat(get(cos, i)), splat(get(sin, i)));
      F8 odd = turn<P>(splat(b), splat(a), splat(get(cos, i + 1)), splat(get(sin, i + 1)));
      store_tail(y + i, even, 1);
      store_tail(y + i + 1, odd, 1);
    }
  } else {
    i64 half = R / 2;
    for (i64 i = 0; i < half; i += 8) {
      i64 some = half - i;
      F8 a = load_some(x + i, some), b = load_some(x + half + i, some);
      store_some(y + i, turn<P>(a, -b, load_some(cos + i, some), load_some(sin + i, some)), some);
      store_some(y + half + i, turn<P>(b, a, load_some(cos + half + i, some), load_some(sin + half + i, some)), some);
    }
  }
  if (R < D) std::memcpy(y + R, x + R, (D - R) * sizeof(X));
}

template <class X, class C, class P> void rope_rows(const RopeArgs& a, i64 first, i64 last) {
  const C *cos = (const C*)a.cos, *sin = (const C*)a.sin;
  for (i64 row = first; row < last; row++) {
    i64 b = row / a.S, s = row % a.S;
    const C *c = cos + b * a.cos_b + s * a.cos_s, *n = sin + b * a.sin_b + s * a.sin_s;
    if (a.q.data)
      for (i64 h = 0; h < a.H; h++)
        rope_row<X, C, P>((const X*)a.q.data + b * a.q.b + h * a.q.h + s * a.q.s, c, n,
                          (X*)a.out.data + b * a.out.b + h * a.out.h + s * a.out.s, a.D, a.R, a.interleaved);
    if (!a.k.data) continue;
    for (i64 h = 0; h < a.Hkv; h++) {
      const X* k = (const X*)a.k.data + b * a.k.b + h * a.k.h + s * a.k.s;
      X* key = (X*)a.keys.data + b * a.keys.b + h * a.keys.h + a.pos[s] * a.keys.s;
      if (a.cos) rope_row<X, C, P>(k, c, n, key, a.D, a.R, a.interleaved);
      else std::memcpy(key, k, a.D * sizeof(X));
      std::memcpy((X*)a.values.data + b * a.values.b + h * a.values.h + a.pos[s] * a.values.s,
                  (const X*)a.v.data + b * a.v.b + h * a.v.h + s * a.v.s, a.Dv * sizeof(X));
    }
  }
}

void rope_body(const RopeArgs& a, Team& team) {
  i64 rows = a.B * a.S, first = rows * team.id / team.size, last = rows * (team.id + 1) / team.size;
  if (a.type == F32) {
    if (a.rotary_type == BF16) rope_rows<float, bf16, float>(a, first, last);
    else if (a.rotary_type == F16) rope_rows<float, f16, float>(a, first, last);
    else rope_rows<float, float, float>(a, first, last);
  } else if (a.type == BF16) {
    if (a.rotary_type == BF16) rope_rows<bf16, bf16, bf16>(a, first, last);
    else rope_rows<bf16, float, float>(a, first, last);
  } else {
    if (a.rotary_type == F16) rope_rows<f16, f16, f16>(a, first, last);
    else rope_rows<f16, float, float>(a, first, last);
  }
}

}  // namespace

extern "C" int tf_rope(const RopeArgs* a) {
  if (a->k.data)
    for (i64 s = 0; s < a->S; s++)
      if (a->pos[s] < 0 || a->pos[s] >= a->L) return BAD_POSITION;
  i64 elements = a->B * a->S * ((a->q.data ? a->H * a->D : 0) + (a->k.data ? a->Hkv * (a->D + a->Dv) : 0));
  run_team<RopeArgs>(elements < 32768 ? 1 : a->threads, rope_body, *a);
  return OK;
}

// ---------------------------------------------------------------- attention

struct AttentionArgs {
  View4 q, k, v, out;
  const void* mask;  // null, bool (1: attend) or floating (added)
  i64 mask_b, mask_h, mask_q, mask_k, mask_type;
  i64 B, H, Hkv, Sq, Skv, D, Dv, type, causal, threads;
  const i64 *rows, *columns;  // null, or the positions of queries and keys, of which the mask's keys are
  i64 held, window;           // keys of the mask; 0: none
  double scale, softcap;      // 0: none
  i64 first_key() const { return columns ? columns[0] : 0; }
  // The last key that a query attends, and the first.
  i64 reach(i64 s) const { return rows ? s + rows[0] - columns[0] : s; }
  i64 begin(i64 s) const { return window ? std::max<i64>(0, reach(s) - window + 1) : 0; }
};

namespace {

constexpr i64 KEYS = 64;  // keys scored at a time
constexpr i64 TILE = 16;  // query rows (heads of a group times queries) that share one pass over the keys

// One pass of a tile over a range of keys leaves, per row: the largest score, the sum of exponentials and
// the weighted sum of values, both relative to that score (Milakov and Gimelshein, 2018).
struct AttentionWork {
  const AttentionArgs* args;
  float* partial;             // [unit][TILE][2 + Dv]
  const i64 *first, *last;    // [B]: the keys that any query of the batch row may attend
  i64 tiles, splits;
  i64 stride() const { return 2 + ceil_div(args->Dv, 8) * 8; }
};

INLINE float mask_value(const AttentionArgs& a, i64 b, i64 h, i64 s, i64 j) {
  i64 at = b * a.mask_b + h * a.mask_h + s * a.mask_q + (j + a.first_key()) * a.mask_k;
  if (a.mask_type == BOOL) return ((const uint8_t*)a.mask)[at] ? 0.0f : -INFINITY;
  if (a.mask_type == BF16) return get((const bf16*)a.mask, at);
  if (a.mask_type == F16) return get((const f16*)a.mask, at);
  return ((const float*)a.mask)[at];
}

// Adds the mask to one row of scores and shrinks [*low, *high) to the keys that some row so far attends.
INLINE void mask_row(const AttentionArgs& a, i64 b, i64 h, i64 s, i64 j0, i64 count, float* added, i64* low, i64* high) {
  i64 begin = a.begin(s), reach = a.causal ? a.reach(s) : a.Skv;
  for (i64 j = 0; j < count; j++) {
    float m = a.mask ? mask_value(a, b, h, s, j0 + j) : 0.0f;
    if (j0 + j < begin || j0 + j > reach) m = -INFINITY;
    added[j] = m;
    if (m != -INFINITY) *low = std::min(*low, j), *high = std::max(*high, j + 1);
  }
}

template <class T> INLINE float dot_row(const float* q, const T* k, i64 D) {
  F8 acc = {};
  for (i64 d = 0; d < D; d += 8) acc += load8(q + d) * load_some(k + d, D - d);
  return sum(acc);
}

// scores[r][j] = q[r] . k[j]: each key is read and widened once for up to four rows.
template <int R, class T>
void score_rows(const float* q, i64 ldq, const T* k, i64 ldk, i64 D, i64 low, i64 high, float* scores) {
  for (i64 j = low; j < high; j++) {
    F8 acc[R] = {};
    const T* key = k + j * ldk;
    i64 d = 0;
    for (; d + 8 <= D; d += 8) {
      F8 kv = load8(key + d);
      for (int r = 0; r < R; r++) acc[r] += load8(q + r * ldq + d) * kv;
    }
    if (d < D) {
      F8 kv = load_tail(key + d, D - d);
      for (int r = 0; r < R; r++) acc[r] += load8(q + r * ldq + d) * kv;
    }
    for (int r = 0; r < R; r++) scores[r * KEYS + j] = sum(acc[r]);
  }
}

// acc[r][:] = acc[r][:] * shrink[r] + sum_j p[r][j] v[j][:], eight or sixteen columns of four rows in registers.
template <int R, class T>
void weigh_rows(const float* p, const float* shrink, const T* v, i64 ldv, i64 Dv, i64 low, i64 high, float* acc, i64 lda) {
  i64 d = 0;
  for (; d + 16 <= Dv; d += 16) {
    F8 a0[R], a1[R];
    for (int r = 0; r < R; r++) {
      a0[r] = load8(acc + r * lda + d) * shrink[r];
      a1[r] = load8(acc + r * lda + d + 8) * shrink[r];
    }
    for (i64 j = low; j < high; j++) {
      F8 v0 = load8(v + j * ldv + d), v1 = load8(v + j * ldv + d + 8);
      for (int r = 0; r < R; r++) {
        a0[r] += v0 * p[r * KEYS + j];
        a1[r] += v1 * p[r * KEYS + j];
      }
    }
    for (int r = 0; r < R; r++) {
      store8(acc + r * lda + d, a0[r]);
      store8(acc + r * lda + d + 8, a1[r]);
    }
  }
  for (; d < Dv; d += 8) {
    F8 a0[R];
    for (int r = 0; r < R; r++) a0[r] = load8(acc + r * lda + d) * shrink[r];
    for (i64 j = low; j < high; j++) {
      F8 v0 = load_some(v + j * ldv + d, Dv - d);
      for (int r = 0; r < R; r++) a0[r] += v0 * p[r * KEYS + j];
    }
    for (int r = 0; r < R; r++) store8(acc + r * lda + d, a0[r]);
  }
}

// cap * tanh(scale * score / cap); near 0 the difference of exponentials has few digits.
INLINE void cap_row(float* scores, float scale, float cap, i64 low, i64 high) {
  for (i64 j = low / 8 * 8; j < high; j += 8) {
    F8 x = load8(scores + j) * scale / cap, square = x * x;
    F8 near = x * (1.0f - square * (0.333333333f - square * (0.133333333f - square * 0.053968254f)));
    F8 far = 2.0f / (exp8(-2.0f * abs8(x)) + 1.0f) - 1.0f;
    far = select(x < 0.0f, -far, far);
    store8(scores + j, cap * select(square < 0.015625f, near, far));
  }
}

// One online-softmax step of a row: scores become exponentials; returns the factor that older sums shrink by.
INLINE float soften(float* scores, const float* added, float scale, i64 low, i64 high, float* top, float* total) {
  i64 aligned = low / 8 * 8;
  F8 best = splat(-INFINITY);
  for (i64 j = aligned; j < high; j += 8) {
    F8 s = load8(scores + j) * scale + load8(added + j);
    I8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    I8 outside = ((lane + (int)j) < (int)low) | ((lane + (int)j) >= (int)high) | (load8(added + j) == -INFINITY);
    s = select(outside, splat(-INFINITY), s);
    store8(scores + j, s);
    best = max8(best, s);
  }
  float peak = std::max(*top, maximum(best));
  if (peak == -INFINITY) peak = 0.0f;  // nothing to attend yet: every exponential below is 0
  F8 sums = {};
  for (i64 j = aligned; j < high; j += 8) {
    F8 e = exp8(load8(scores + j) - peak);
    store8(scores + j, e);
    sums += e;
  }
  float shrink = exp8(splat(*top - peak))[0];
  *total = *total * shrink + sum(sums);
  if (maximum(best) > *top || *top != -INFINITY) *top = peak;
  return shrink;
}

template <class T> void attention_unit(const AttentionWork& w, i64 unit) {
  const AttentionArgs& a = *w.args;
  i64 split = unit % w.splits, tile = unit / w.splits % w.tiles, head = unit / w.splits / w.tiles % a.Hkv;
  i64 b = unit / w.splits / w.tiles / a.Hkv, group = a.H / a.Hkv;
  i64 row0 = tile * TILE, rows = std::min(TILE, group * a.Sq - row0);
  i64 span = w.last[b] - w.first[b], piece = ceil_div(ceil_div(span, w.splits), 8) * 8;
  i64 begin = w.first[b] + std::min(span, split * piece), end = w.first[b] + std::min(span, (split + 1) * piece);
  if (a.causal) end = std::min(end, a.reach(std::min(row0 + rows - 1, a.Sq * group - 1) / group) + 1);

  i64 padded = ceil_div(a.D, 8) * 8, stride = w.stride();
  float* partial = w.partial + unit * TILE * stride;
  alignas(32) float scores[TILE * KEYS], added[TILE * KEYS], shrink[TILE];
  float* q = (float*)scratch.need((size_t)TILE * padded * 4);
  for (i64 r = 0; r < rows; r++) {  // row r: query (row0 + r) / group of head (row0 + r) % group
    i64 s = (row0 + r) / group, h = head * group + (row0 + r) % group;
    const T* from = (const T*)a.q.data + b * a.q.b + h * a.q.h + s * a.q.s;
    for (i64 d = 0; d < a.D; d += 8) store8(q + r * padded + d, load_some(from + d, a.D - d));
    partial[r * stride] = -INFINITY;
    for (i64 d = 1; d < stride; d++) partial[r * stride + d] = 0.0f;
  }
  for (i64 j0 = begin; j0 < end; j0 += KEYS) {
    i64 count = std::min(KEYS, end - j0), low = count, high = 0;
    for (i64 r = 0; r < rows; r++) {
      if (r > 0 && a.mask_h == 0 && (row0 + r) % group) {  // the same query as the row before
        std::memcpy(added + r * KEYS, added + (r - 1) * KEYS, count * sizeof(float));
        continue;
      }
      mask_row(a, b, head * group + (row0 + r) % group, (row0 + r) / group, j0, count, added + r * KEYS, &low, &high);
    }
    if (low >= high) continue;
    const T* k = (const T*)a.k.data + b * a.k.b + head * a.k.h + j0 * a.k.s;
    const T* v = (const T*)a.v.data + b * a.v.b + head * a.v.h + j0 * a.v.s;
    for (i64 r = 0; r < rows; r += 4) {
      float *s = scores + r * KEYS, *part = partial + r * stride;
      i64 some = std::min<i64>(4, rows - r);
      if (some == 4) score_rows<4>(q + r * padded, padded, k, a.k.s, a.D, low, high, s);
      else if (some == 3) score_rows<3>(q + r * padded, padded, k, a.k.s, a.D, low, high, s);
      else if (some == 2) score_rows<2>(q + r * padded, padded, k, a.k.s, a.D, low, high, s);
      else score_rows<1>(q + r * padded, padded, k, a.k.s, a.D, low, high, s);
      float scale = a.softcap ? 1.0f : (float)a.scale, cap = (float)a.softcap;
      for (i64 i = 0; i < some; i++) {
        if (cap) cap_row(s + i * KEYS, (float)a.scale, cap, low, high);
        shrink[i] = soften(s + i * KEYS, added + (r + i) * KEYS, scale, low, high, &part[i * stride], &part[i * stride + 1]);
      }
      if (some == 4) weigh_rows<4>(s, shrink, v, a.v.s, a.Dv, low, high, part + 2, stride);
      else if (some == 3) weigh_rows<3>(s, shrink, v, a.v.s, a.Dv, low, high, part + 2, stride);
      else if (some == 2) weigh_rows<2>(s, shrink, v, a.v.s, a.Dv, low, high, part + 2, stride);
      else weigh_rows<1>(s, shrink, v, a.v.s, a.Dv, low, high, part + 2, stride);
    }
  }
}

// Joins the splits of one tile and writes its rows.
template <class T> void attention_join(const AttentionWork& w, i64 index) {
  const AttentionArgs& a = *w.args;
  i64 tile = index % w.tiles, head = index / w.tiles % a.Hkv, b = index / w.tiles / a.Hkv, group = a.H / a.Hkv;
  i64 row0 = tile * TILE, rows = std::min(TILE, group * a.Sq - row0), stride = w.stride();
  float* partial = w.partial + index * w.splits * TILE * stride;
  for (i64 r = 0; r < rows; r++) {
    float top = -INFINITY, total = 0.0f;
    for (i64 i = 0; i < w.splits; i++) top = std::max(top, partial[(i * TILE + r) * stride]);
    float factors[64];
    for (i64 i = 0; i < w.splits; i++) {
      float* part = partial + (i * TILE + r) * stride;
      factors[i] = part[1] == 0.0f ? 0.0f : std::exp(part[0] - top);
      total += part[1] * factors[i];
    }
    float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    i64 s = (row0 + r) / group, h = head * group + (row0 + r) % group;
    T* out = (T*)a.out.data + b * a.out.b + h * a.out.h + s * a.out.s;
    for (i64 d = 0; d < a.Dv; d += 8) {
      F8 v = {};
      for (i64 i = 0; i < w.splits; i++) v += load8(partial + (i * TILE + r) * stride + 2 + d) * factors[i];
      store_some(out + d, v * inverse, a.Dv - d);
    }
  }
}

template <class T> void attention_body(const AttentionWork& w, Team& team) {
  i64 tiles = w.args->B * w.args->Hkv * w.tiles;
  for (i64 unit = team.claim(); unit < tiles * w.splits; unit = team.claim()) attention_unit<T>(w, unit);
  team.barrier();
  for (i64 index = team.claim(); index < tiles; index = team.claim()) attention_join<T>(w, index);
}

// The span of keys that any query of batch row b attends, by its reach or read from a bool mask that all heads share.
void attended(const AttentionArgs& a, i64 b, i64* first, i64* last) {
  *first = 0, *last = a.Skv;
  if (a.rows) {
    i64 count = a.mask ? std::min(a.Skv, a.held - a.first_key()) : a.Skv;
    *last = std::max<i64>(0, std::min(count, a.reach(a.Sq - 1) + 1)), *first = std::min(a.begin(0), *last);
    if (!a.mask) return;
    const uint8_t* keys = (const uint8_t*)a.mask + b * a.mask_b + a.first_key() * a.mask_k;
    while (*first < *last && !keys[*first * a.mask_k]) ++*first;
    while (*first < *last && !keys[(*last - 1) * a.mask_k]) --*last;
    return;
  }
  if (!a.mask || a.mask_type != BOOL || a.mask_h != 0 || a.Sq > 16) return;
  const uint8_t* mask = (const uint8_t*)a.mask + b * a.mask_b;
  i64 low = a.Skv, high = 0;
  for (i64 s = 0; s < a.Sq; s++) {
    const uint8_t* row = mask + s * a.mask_q;
    i64 i = 0, j = a.Skv;
    while (i < low && !row[i * a.mask_k]) i++;
    while (j > high && !row[(j - 1) * a.mask_k]) j--;
    low = i, high = j;
  }
  *first = std::min(low, high), *last = high;
}

}  // namespace

extern "C" int tf_attention(const AttentionArgs* a) {
  static thread_local Scratch ranges, partials;
  i64* range = (i64*)ranges.need((size_t)a->B * 16);
  if (!range) return NO_MEMORY;
  i64 longest = 0;
  for (i64 b = 0; b < a->B; b++) {
    attended(*a, b, range + b, range + a->B + b);
    longest = std::max(longest, range[a->B + b] - range[b]);
  }
  i64 tiles = ceil_div(a->H / a->Hkv * a->Sq, TILE), units = a->B * a->Hkv * tiles;
  i64 work = units * std::min(TILE, a->H / a->Hkv * a->Sq) * longest * (a->D + a->Dv);
  i64 threads = work < 60000 ? 1 : a->threads;
  // Enough units for an even load, but at least 64 keys in each.
  i64 splits = threads == 1 || units >= 8 * threads ? 1 : std::min<i64>(ceil_div(4 * threads, units), std::max<i64>(1, longest / 64));
  splits = std::min<i64>(splits, 64);
  AttentionWork w{a, nullptr, range, range + a->B, tiles, splits};
  w.partial = (float*)partials.need((size_t)(units * splits * TILE * w.stride()) * 4);
  if (!w.partial) return NO_MEMORY;
  if (a->type == BF16) run_team<AttentionWork>(threads, attention_body<bf16>, w);
  else if (a->type == F16) run_team<AttentionWork>(threads, attention_body<f16>, w);
  else run_team<AttentionWork>(threads, attention_body<float>, w);
  return OK;
}

// ---------------------------------------------------------------- replay

struct Call {
  int (*kernel)(const void*);
  const void* args;
};
struct ReplayArgs {
  const Call* calls;
  i64 count, threads;
};

namespace {

struct Replay {
  const ReplayArgs* args;
  Crew* crew;
  int error;
};

void replay_calls(Replay& replay) {
  for (i64 i = 0; i < replay.args->count && !replay.error; i++)
    replay.error = replay.args->calls[i].kernel(replay.args->calls[i].args);
}

void replay_entry(void* data) {
  Replay& replay = *(Replay*)data;
  if (omp_thread() != 0) return replay.crew->follow(omp_thread());
  replay.crew->size = omp_threads();
  crew = replay.crew;
  replay_calls(replay);
  crew = nullptr;
  replay.crew->dismiss();
}

}  // namespace

// Runs `count` kernels one after the other; the first error ends it.
extern "C" int tf_replay(const ReplayArgs* a) {
  Crew together{(int)a->threads};
  Replay replay{a, &together, OK};
  if (a->threads > 1 && gomp_parallel) gomp_parallel(replay_entry, &replay, (unsigned)a->threads, 0);
  else replay_calls(replay);
  return replay.error;
}

extern "C" int tf_version() { return 1; }

extern "C" void tf_init(void* parallel, void* thread, void* threads) {
  if (!parallel || !thread || !threads) return;
  gomp_parallel = (Parallel)parallel;
  omp_thread = (int (*)())thread;
  omp_threads = (int (*)())threads;
}
