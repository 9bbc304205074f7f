// Products of bfloat16 matrices, tile by tile, for processors with avx512_bf16: what the compiled layers are written in.
//
// A product is left [M, K] times right [K, N], summed in float. A word is two bfloat16 numbers that follow each other
// along K, which the processor multiplies and adds in one go. The right matrix is copied into panels [words][up to 64
// columns]; the left one is read where it lies, unless it is stored the other way round: then it is copied into blocks
// [words][96 rows]. A task is some rows by one panel; 6 rows by 64 columns of sums stay in registers.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

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

}  // namespace
#endif
