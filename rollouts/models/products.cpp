// Products of bfloat16 matrices, summed in float, for processors with avx512_bf16 and no matrix unit.
//
// out [M, N] = a [M, K] b [K, N], or total += a b in float. A word is two bfloat16 numbers that follow each other along K, which the processor
// multiplies and adds in one go. b is copied into panels [words][up to 64 columns]; a is read where it lies, unless it
// is stored the other way round: then it is copied into panels [words][96 rows]. A task is 96 rows by one panel; 6 rows
// by 64 columns of sums stay in registers.

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

const int64_t ROWS = 6, CHUNK = 96, PANEL = 64;
const int64_t DEPTH = 1024;  // words of a panel taken at a time, so that it stays in the second cache

struct Matrix {
  const bf16* data;
  int64_t stride;   // numbers from one row of the storage to the next
  bool transposed;  // stored [columns, rows]
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Two rows of the storage (the second may be missing) -> words, 16 at a time; `count` is a multiple of 16.
inline void interleave(const bf16* first, const bf16* second, int64_t count, uint32_t* words) {
  for (int64_t i = 0; i < count; i += 16) {
    __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(first + i)));
    if (second)
      x = _mm512_or_si512(
          x, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(second + i))), 16));
    _mm512_storeu_si512(words + i, x);
  }
}

// `width` lines along K of a matrix stored with K last, from line `first` -> words [words, width].
inline void transpose(const bf16* data, int64_t stride, int64_t first, int64_t width, int64_t words, uint32_t* out) {
  for (int64_t i = 0; i < width; i += 16)
    for (int64_t k = 0; k < words; k += 16) {
      const int64_t count = least(16, words - k);
      const __mmask16 there = (__mmask16)((1u << count) - 1);
      i16 x[16];  // words of sixteen lines, then of everybody's the j-th
      for (int64_t r = 0; r < 16; r++)
        x[r] = (i16)_mm512_maskz_loadu_epi32(there, (const uint32_t*)(data + (first + i + r) * stride) + k);
      transpose16(x);
      for (int64_t j = 0; j < count; j++) _mm512_storeu_si512(out + (k + j) * width + i, (__m512i)x[j]);
    }
}

// ROWS rows of sums over `words` words. A row of a begins at a[r] and goes on `step` words further; b is [words, 16 V].
// The sums start from, and go to, `sums` [ROWS, PANEL]; but the first start from `total`, or nothing, and the last go to
// `total`, or to `out` as bfloat16.
template <int V>
void tile(const uint32_t* const* a, int64_t step, const uint32_t* b, int64_t words, float* sums, bool starts, bool ends,
          bf16* out, float* total, int64_t stride, int64_t count) {
  __m512 acc[ROWS][V];
  for (int64_t r = 0; r < ROWS; r++) {
    const float* from = starts ? total ? total + least(r, count - 1) * stride : nullptr : sums + r * PANEL;
    for (int v = 0; v < V; v++) acc[r][v] = from ? _mm512_loadu_ps(from + v * 16) : _mm512_setzero_ps();
  }
  const uint32_t *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
  for (int64_t k = 0; k < words; k++) {
    const int64_t at = k * step;
    __m512bh x[V];
    for (int v = 0; v < V; v++) x[v] = (__m512bh)_mm512_loadu_si512(b + k * 16 * V + v * 16);
    const uint32_t y[ROWS] = {a0[at], a1[at], a2[at], a3[at], a4[at], a5[at]};
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32((int)y[r]);
      for (int v = 0; v < V; v++) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], row, x[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < V; v++) {
      if (!ends)
        _mm512_storeu_ps(sums + r * PANEL + v * 16, acc[r][v]);
      else if (r < count && total)
        _mm512_storeu_ps(total + r * stride + v * 16, acc[r][v]);
      else if (r < count)
        _mm256_storeu_si256((__m256i*)(out + r * stride + v * 16), (__m256i)_mm512_cvtneps_pbh(acc[r][v]));
    }
}

struct Task {
  Matrix a;
  const uint32_t *packed_a, *packed_b;
  bf16* out;
  float* total;
  int64_t M, N, words;
};

template <int V>
void panel(const Task& t, int64_t row, int64_t column) {
  float sums[CHUNK * PANEL];
  const uint32_t* b = t.packed_b + column * t.words;
  const int64_t rows = least(CHUNK, t.M - row);
  for (int64_t k = 0; k < t.words; k += DEPTH) {
    const int64_t words = least(DEPTH, t.words - k);
    for (int64_t m = 0; m < rows; m += ROWS) {
      const int64_t count = least(ROWS, rows - m), at = (row + m) * t.N + column;
      const uint32_t* a[ROWS];
      for (int64_t r = 0; r < ROWS; r++) {
        const int64_t line = m + least(r, count - 1);
        a[r] = t.packed_a ? t.packed_a + (row * t.words + k * CHUNK) + line
                          : (const uint32_t*)(t.a.data + (row + line) * t.a.stride) + k;
      }
      tile<V>(a, t.packed_a ? CHUNK : 1, b + k * 16 * V, words, sums + m * PANEL, k == 0, k + words == t.words,
              t.out + at, t.total ? t.total + at : nullptr, t.N, count);
    }
  }
}

}  // namespace

// N is a multiple of 16; K is even, or both matrices have K first; M is a multiple of 16 where a is transposed.
// Of out and total one is null. 0: there was no memory, and nothing was written.
extern "C" int product(Matrix a, Matrix b, bf16* out, float* total, int64_t M, int64_t N, int64_t K, int64_t threads) {
  const int64_t words = (K + 1) / 2, chunks = (M + CHUNK - 1) / CHUNK, panels = (N + PANEL - 1) / PANEL;
  uint32_t* packed_b = (uint32_t*)aligned_alloc(64, words * N * 4);
  uint32_t* packed_a = a.transposed ? (uint32_t*)aligned_alloc(64, words * chunks * CHUNK * 4) : nullptr;
  const bool fits = packed_b && (packed_a || !a.transposed);
  const Task task = {a, packed_a, packed_b, out, total, M, N, words};
  if (fits)
#pragma omp parallel num_threads((int)threads)
  {
    if (b.transposed) {
#pragma omp for schedule(static)
      for (int64_t n = 0; n < N; n += PANEL)
        transpose(b.data, b.stride, n, least(PANEL, N - n), words, packed_b + n * words);
    } else {
#pragma omp for schedule(static)
      for (int64_t k = 0; k < words; k++)
        for (int64_t n = 0; n < N; n += PANEL) {
          const bf16* row = b.data + 2 * k * b.stride + n;
          const int64_t width = least(PANEL, N - n);
          interleave(row, 2 * k + 1 < K ? row + b.stride : nullptr, width, packed_b + n * words + k * width);
        }
    }
    if (packed_a) {
#pragma omp for schedule(static)
      for (int64_t k = 0; k < words; k++)
        for (int64_t m = 0; m < M; m += CHUNK) {
          const bf16* row = a.data + 2 * k * a.stride + m;
          interleave(row, 2 * k + 1 < K ? row + a.stride : nullptr, least(CHUNK, M - m),
                     packed_a + m * words + k * CHUNK);
        }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < chunks * panels; i++) {
      const int64_t row = i / panels * CHUNK, column = i % panels * PANEL;
      switch (least(PANEL, N - column) / 16) {
        case 4: panel<4>(task, row, column); break;
        case 3: panel<3>(task, row, column); break;
        case 2: panel<2>(task, row, column); break;
        default: panel<1>(task, row, column);
      }
    }
  }
  free(packed_a);
  free(packed_b);
  return fits;
}
#endif
