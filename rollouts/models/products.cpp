// Products of bfloat16 matrices, summed in float, for processors with avx512_bf16 and no matrix unit; and gated layers,
// which are products whose sums go on through SiLU and multiplication before they are rounded.
//
// A product is left [M, K] times right [K, N]. A word is two bfloat16 numbers that follow each other along K, which the
// processor multiplies and adds in one go. The right matrix is copied into panels [words][up to 64 columns]; the left
// one is read where it lies, unless it is stored the other way round: then it is copied into blocks [words][96 rows]. A
// task is some rows by one panel; 6 rows by 64 columns of sums stay in registers.

#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

extern "C" int products_are_here() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

#ifdef __AVX512BF16__
namespace {

const int64_t ROWS = 6, BLOCK = 96, PANEL = 64;
const int64_t DEPTH = 1024;  // words of a panel taken at a time, so that it stays in the second cache

struct Matrix {
  const bf16* data;
  int64_t stride;   // numbers from one row of the storage to the next
  bool transposed;  // stored [columns, rows]
};

// Where a left matrix lies: word k of row r begins at data + r * row + k * word.
struct Left {
  const bf16* data;
  int64_t row, word;
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
T* numbers(int64_t count) {
  return (T*)aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
}

// Two rows of sixteen -> words.
inline __m512i words_of(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// Two rows of the storage (the second may be missing) -> words, 16 at a time; `count` is a multiple of 16.
inline void interleave(const bf16* first, const bf16* second, int64_t count, uint32_t* words) {
  for (int64_t i = 0; i < count; i += 16)
    _mm512_storeu_si512(words + i, words_of(_mm256_loadu_si256((const __m256i*)(first + i)),
                                            second ? _mm256_loadu_si256((const __m256i*)(second + i)) : __m256i{}));
}

// `width` lines along K of a matrix stored with K last, from line `first` -> words [words, width], `pitch` apart.
inline void transpose(const bf16* data, int64_t stride, int64_t first, int64_t width, int64_t words, uint32_t* out,
                      int64_t pitch) {
  for (int64_t i = 0; i < width; i += 16)
    for (int64_t k = 0; k < words; k += 16) {
      const int64_t count = least(16, words - k);
      const __mmask16 there = (__mmask16)((1u << count) - 1);
      i16 x[16];  // words of sixteen lines, then of everybody's the j-th
      for (int64_t r = 0; r < 16; r++)
        x[r] = (i16)_mm512_maskz_loadu_epi32(there, (const uint32_t*)(data + (first + i + r) * stride) + k);
      transpose16(x);
      for (int64_t j = 0; j < count; j++) _mm512_storeu_si512(out + (k + j) * pitch + i, (__m512i)x[j]);
    }
}

// A right matrix [K, N] -> words from `first` on of panels of `words`, the threads of a team sharing the work; the panel
// of column n begins at packed + n * words.
void pack_right(const Matrix& b, int64_t N, int64_t K, int64_t first, int64_t words, uint32_t* packed) {
  if (b.transposed) {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n += PANEL) {
      const int64_t width = least(PANEL, N - n);
      transpose(b.data, b.stride, n, width, K / 2, packed + n * words + first * width, width);
    }
  } else {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < (K + 1) / 2; k++)
      for (int64_t n = 0; n < N; n += PANEL) {
        const bf16* row = b.data + 2 * k * b.stride + n;
        const int64_t width = least(PANEL, N - n);
        interleave(row, 2 * k + 1 < K ? row + b.stride : nullptr, width, packed + n * words + (first + k) * width);
      }
  }
}

// A left matrix [M, K] stored [K, M] -> blocks; block m begins at packed + m * words.
void pack_left(const bf16* data, int64_t stride, int64_t M, int64_t K, uint32_t* packed) {
  const int64_t words = (K + 1) / 2;
#pragma omp for schedule(static)
  for (int64_t k = 0; k < words; k++)
    for (int64_t m = 0; m < M; m += BLOCK) {
      const bf16* row = data + 2 * k * stride + m;
      interleave(row, 2 * k + 1 < K ? row + stride : nullptr, least(BLOCK, M - m), packed + m * words + k * BLOCK);
    }
}

inline int64_t blocks(int64_t M) { return (M + BLOCK - 1) / BLOCK; }
inline int64_t panels(int64_t N) { return (N + PANEL - 1) / PANEL; }

// ROWS rows of sums over `words` words of a left matrix, whose rows begin at a[r], and a panel b [words, 16 V]. The sums
// start from nothing or from `sums` [ROWS, PANEL], and go there or to finish(sums).
template <int V, class Finish>
inline void tile(const bf16* const* a, int64_t word, const uint32_t* b, int64_t words, float* sums, bool starts,
                 bool ends, const Finish& finish) {
  __m512 acc[ROWS][V];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[r][v] = starts ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * PANEL + v * 16);
  const bf16 *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
  for (int64_t k = 0; k < words; k++) {
    const int64_t at = k * word;
    __m512bh x[V];
    for (int v = 0; v < V; v++) x[v] = (__m512bh)_mm512_loadu_si512(b + k * 16 * V + v * 16);
    const bf16* const y[ROWS] = {a0 + at, a1 + at, a2 + at, a3 + at, a4 + at, a5 + at};
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32(*(const int32_t*)y[r]);
      for (int v = 0; v < V; v++) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], row, x[v]);
    }
  }
  if (ends) return finish(acc);
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < V; v++) _mm512_storeu_ps(sums + r * PANEL + v * 16, acc[r][v]);
}

// The product of `rows` <= BLOCK rows and one panel; sums of up to ROWS rows from row m on go to finish(m, count, sums).
template <int V, class Finish>
void panel(const Left& a, int64_t rows, const uint32_t* b, int64_t words, const Finish& finish) {
  float sums[BLOCK * PANEL];
  for (int64_t k = 0; k < words; k += DEPTH) {
    const int64_t depth = least(DEPTH, words - k);
    for (int64_t m = 0; m < rows; m += ROWS) {
      const int64_t count = least(ROWS, rows - m);
      const bf16* lines[ROWS];
      for (int64_t r = 0; r < ROWS; r++) lines[r] = a.data + (m + least(r, count - 1)) * a.row + k * a.word;
      tile<V>(lines, a.word, b + k * 16 * V, depth, sums + m * PANEL, k == 0, k + depth == words,
              [&](const __m512(&acc)[ROWS][V]) { finish(m, count, acc); });
    }
  }
}

template <class Finish>
void panel_of(int64_t width, const Left& a, int64_t rows, const uint32_t* b, int64_t words, const Finish& finish) {
  switch (width / 16) {
    case 4: return panel<4>(a, rows, b, words, finish);
    case 3: return panel<3>(a, rows, b, words, finish);
    case 2: return panel<2>(a, rows, b, words, finish);
    default: return panel<1>(a, rows, b, words, finish);
  }
}

// What becomes of sums: they are added to `total` where there is one, else rounded into `out`; rows lie N apart.
struct Store {
  bf16* out;
  float* total;
  int64_t N;
  template <int V>
  void operator()(int64_t m, int64_t count, const __m512 (&acc)[ROWS][V]) const {
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < V; v++) {
        const int64_t at = (m + r) * N + v * 16;
        if (r < count && total)
          _mm512_storeu_ps(total + at, _mm512_add_ps(_mm512_loadu_ps(total + at), acc[r][v]));
        else if (r < count)
          _mm256_storeu_si256((__m256i*)(out + at), (__m256i)_mm512_cvtneps_pbh(acc[r][v]));
      }
  }
};

// One of a product's tasks, panel by panel within a block of rows.
void block_task(int64_t task, const Left& a, int64_t block_step, int64_t M, int64_t N, int64_t words,
                const uint32_t* packed_b, bf16* out, float* total) {
  const int64_t m = task / panels(N) * BLOCK, n = task % panels(N) * PANEL, at = m * N + n;
  panel_of(least(PANEL, N - n), Left{a.data + m / BLOCK * block_step, a.row, a.word}, least(BLOCK, M - m),
           packed_b + n * words, words, Store{out ? out + at : nullptr, total ? total + at : nullptr, N});
}

// Gated layers: out = (silu(x gate^T) * x up^T) down^T. T tokens, D numbers of a token, I of what lies between.

inline f16 sigmoid(f16 x) { return 1.f / (1.f + exp16(-where(x < splat(-87.f), splat(-87.f), x))); }
inline f16 wide(__m256i x) { return (f16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
inline __m256i narrow(f16 x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }

// Sums of 32 columns of gate and 32 of up -> both rounded, for the backward pass where one is to come; and their gated
// product.
struct Gate {
  bf16 *gate_up, *gated;  // [rows, 2 I] or null; [rows, I]
  int64_t I;
  void operator()(int64_t m, int64_t count, const __m512 (&acc)[ROWS][4]) const {
    for (int64_t r = 0; r < count; r++)
      for (int v = 0; v < 2; v++) {
        const __m256i gate = narrow((f16)acc[r][v]), up = narrow((f16)acc[r][v + 2]);
        if (gate_up) {
          bf16* kept = gate_up + (m + r) * 2 * I + v * 16;
          _mm256_storeu_si256((__m256i*)kept, gate);
          _mm256_storeu_si256((__m256i*)(kept + I), up);
        }
        const f16 g = wide(gate);
        put(gated + (m + r) * I + v * 16, g * sigmoid(g) * wide(up));
      }
  }
};

// Gradients of 16 V columns of the gated product -> those of gate and up, row by row; and, where gradients of weights
// are wanted, both and the gated product itself in words along the tokens, as products to weights read them.
struct GateBackward {
  const bf16* gate_up;   // [rows, 2 I]
  bf16* grads;           // [rows, 2 I]
  uint32_t *to_gate_words, *to_up_words, *gated_words;  // of these rows: blocks of the gradients, a panel; or null
  int64_t I, column, words;
  template <int V>
  void operator()(int64_t m, int64_t count, const __m512 (&acc)[ROWS][V]) const {
    __m512 sums[ROWS][V];
    memcpy(sums, acc, sizeof sums);
    for (int64_t r = 0; r < ROWS; r++)  // what the next rows will read
      for (int v = 0; v < V; v += 2) {
        const bf16* next = gate_up + (m + ROWS + r) * 2 * I + column + v * 16;
        _mm_prefetch((const char*)next, _MM_HINT_T0);
        _mm_prefetch((const char*)(next + I), _MM_HINT_T0);
      }
    for (int64_t r = 0; r < count; r += 2)
      for (int v = 0; v < V; v++) {
        const Three first = of((f16)sums[r][v], m + r, column + v * 16);
        const Three second = r + 1 < count ? of((f16)sums[r + 1][v], m + r + 1, column + v * 16) : Three{};
        if (!to_gate_words) continue;
        const int64_t word = (m + r) / 2, line = column + v * 16;
        const int64_t at = line / BLOCK * BLOCK * words + word * BLOCK + line % BLOCK;
        _mm512_store_si512(to_gate_words + at, words_of(first.to_gate, second.to_gate));
        _mm512_store_si512(to_up_words + at, words_of(first.to_up, second.to_up));
        _mm512_store_si512(gated_words + word * 16 * V + v * 16, words_of(first.gated, second.gated));
      }
  }
  struct Three {
    __m256i to_gate, to_up, gated;
  };
  inline Three of(f16 grad, int64_t row, int64_t column) const {
    const int64_t at = row * 2 * I + column;
    const f16 gate = load(gate_up + at), up = load(gate_up + at + I), share = sigmoid(gate), silu = gate * share;
    const Three x = {narrow(grad * up * (share + silu * (1.f - share))), narrow(grad * silu), narrow(silu * up)};
    _mm256_storeu_si256((__m256i*)(grads + at), x.to_gate);
    _mm256_storeu_si256((__m256i*)(grads + at + I), x.to_up);
    return x;
  }
};

// Where the tokens are cut between tasks: some tens of rows each, fewer towards the end, so that threads end together.
struct Cuts {
  int64_t* at;
  int64_t count = 0;
  Cuts(int64_t T, int64_t threads) : at(numbers<int64_t>(T / ROWS + 2)) {
    if (!at) return;
    at[0] = 0;
    for (int64_t t = 0; t < T; at[++count] = t) {
      const int64_t share = (T - t) / (4 * threads) / ROWS * ROWS;
      t = least(T, t + (share < ROWS ? ROWS : least(share, BLOCK / 2)));
    }
  }
  ~Cuts() { free(at); }
};

}  // namespace

// N is a multiple of 16; K is even, or both matrices have K first; M is a multiple of 16 where a is transposed.
// Of out and total one is null. 0: there was no memory, and nothing was written.
extern "C" int product(Matrix a, Matrix b, bf16* out, float* total, int64_t M, int64_t N, int64_t K, int64_t threads) {
  const int64_t words = (K + 1) / 2;
  uint32_t* packed_b = numbers<uint32_t>(words * N);
  uint32_t* packed_a = a.transposed ? numbers<uint32_t>(words * blocks(M) * BLOCK) : nullptr;
  const bool fits = packed_b && (packed_a || !a.transposed);
  const Left left = packed_a ? Left{(bf16*)packed_a, 2, 2 * BLOCK} : Left{a.data, a.stride, 2};
  if (fits)
#pragma omp parallel num_threads((int)threads)
  {
    pack_right(b, N, K, 0, words, packed_b);
    if (packed_a) pack_left(a.data, a.stride, M, K, packed_a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks(M) * panels(N); i++)
      block_task(i, left, BLOCK * (packed_a ? 2 * words : a.stride), M, N, words, packed_b, out, total);
  }
  free(packed_a);
  free(packed_b);
  return fits;
}
// x [T, D], gate and up [I, D], down [D, I], all contiguous -> out [T, D] and, unless it is null, gate_up [T, 2 I] for
// the backward pass. D is a multiple of 16, I of 32. 0: there was no memory.
extern "C" int gated_forward(const bf16* x, const bf16* gate, const bf16* up, const bf16* down, bf16* out, bf16* gate_up,
                             int64_t T, int64_t D, int64_t I, int64_t threads) {
  const Cuts cuts(T, threads);
  uint32_t *packed_in = numbers<uint32_t>(D * I), *packed_out = numbers<uint32_t>(I / 2 * D);
  bf16* scratch = numbers<bf16>(threads * BLOCK * I);
  const bool fits = cuts.at && packed_in && packed_out && scratch;
  if (fits)
#pragma omp parallel num_threads((int)threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < I; i += PANEL / 2) {  // a panel holds columns of gate and the same ones of up
      uint32_t* panel = packed_in + i * D;
      transpose(gate, D, i, PANEL / 2, D / 2, panel, PANEL);
      transpose(up, D, i, PANEL / 2, D / 2, panel + PANEL / 2, PANEL);
    }
    pack_right({down, I, true}, D, I, 0, I / 2, packed_out);
    bf16* gated = scratch + omp_get_thread_num() * BLOCK * I;
#pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < cuts.count; c++) {
      const int64_t t = cuts.at[c], rows = cuts.at[c + 1] - t;
      for (int64_t i = 0; i < I; i += PANEL / 2)
        panel<4>({x + t * D, D, 2}, rows, packed_in + i * D, D / 2,
                 Gate{gate_up ? gate_up + t * 2 * I + i : nullptr, gated + i, I});
      for (int64_t n = 0; n < D; n += PANEL)
        panel_of(least(PANEL, D - n), {gated, I, 2}, rows, packed_out + n * (I / 2), I / 2,
                 Store{out + t * D + n, nullptr, D});
    }
  }
  free(scratch);
  free(packed_out);
  free(packed_in);
  return fits;
}

// grad [T, D] and what the forward pass read and kept -> gradients of x (unless null) and of the weights (unless null).
extern "C" int gated_backward(const bf16* grad, const bf16* x, const bf16* gate_up, const bf16* gate, const bf16* up,
                              const bf16* down, bf16* grad_x, bf16* grad_gate, bf16* grad_up, bf16* grad_down, int64_t T,
                              int64_t D, int64_t I, int64_t threads) {
  const Cuts cuts(T, threads);
  const int64_t words = (T + 1) / 2, half = blocks(I) * BLOCK * words;
  uint32_t *packed_down = numbers<uint32_t>(D / 2 * I), *packed_in = numbers<uint32_t>(D * I);
  bf16* scratch = numbers<bf16>(threads * BLOCK * 2 * I);
  uint32_t* packed =  // for the gradients of weights
      grad_gate ? numbers<uint32_t>(words * (D + I) + 2 * half + blocks(D) * BLOCK * words) : nullptr;
  const bool fits = cuts.at && packed_down && packed_in && scratch && (packed || !grad_gate);
  if (fits)
#pragma omp parallel num_threads((int)threads)
  {
    uint32_t *packed_x = packed, *gated = packed + words * D;                       // on the right
    uint32_t *to_gate = gated + words * I, *to_up = to_gate + half, *to_out = to_up + half;  // on the left
    pack_right({down, I, false}, I, D, 0, D / 2, packed_down);
    pack_right({gate, D, false}, D, I, 0, I, packed_in);  // gate's words, then up's
    pack_right({up, D, false}, D, I, I / 2, I, packed_in);
    if (packed) {
      pack_right({x, D, false}, D, T, 0, words, packed_x);
      pack_left(grad, D, D, T, to_out);
    }
    bf16* grads = scratch + omp_get_thread_num() * BLOCK * 2 * I;
#pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < cuts.count; c++) {
      const int64_t t = cuts.at[c], rows = cuts.at[c + 1] - t;
      for (int64_t i = 0; i < I; i += PANEL) {
        const int64_t width = least(PANEL, I - i);
        panel_of(width, {grad + t * D, D, 2}, rows, packed_down + i * (D / 2), D / 2,
                 GateBackward{gate_up + t * 2 * I, grads, packed ? to_gate + t / 2 * BLOCK : nullptr,
                              to_up + t / 2 * BLOCK, gated + i * words + t / 2 * width, I, i, words});
      }
      if (grad_x)
        for (int64_t n = 0; n < D; n += PANEL)
          panel_of(least(PANEL, D - n), {grads, 2 * I, 2}, rows, packed_in + n * I, I,
                   Store{grad_x + t * D + n, nullptr, D});
    }
    if (packed) {
      const int64_t in = blocks(I) * panels(D), out = blocks(D) * panels(I);
      const Left left[3] = {{(bf16*)to_gate, 2, 2 * BLOCK}, {(bf16*)to_up, 2, 2 * BLOCK}, {(bf16*)to_out, 2, 2 * BLOCK}};
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < 2 * in + out; i++)
        if (i < 2 * in)
          block_task(i % in, left[i / in], 2 * BLOCK * words, I, D, words, packed_x, i < in ? grad_gate : grad_up, nullptr);
        else
          block_task(i - 2 * in, left[2], 2 * BLOCK * words, D, I, words, gated, grad_down, nullptr);
    }
  }
  free(packed);
  free(scratch);
  free(packed_in);
  free(packed_down);
  return fits;
}
#endif
