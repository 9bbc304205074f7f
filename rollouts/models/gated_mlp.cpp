// Gated layers, out = (silu(x gate^T) * x up^T) down^T, both passes: products whose sums go on through SiLU and
// multiplication before they are rounded. T tokens, D numbers of a token, I of what lies between.

#include <omp.h>

#include "products.h"

#ifdef __AVX512BF16__
namespace {

// 1 / (1 + e^-x) to 4 parts in a million, of which bfloat16 keeps 4 in a thousand: 2^n times a polynomial (Chebyshev).
inline f16 sigmoid(f16 x) {
  const __m512 most = _mm512_set1_ps(126), least = _mm512_set1_ps(-126);  // given first: what is no number passes
  const __m512 t = _mm512_max_ps(least, _mm512_min_ps(most, (__m512)(x * -1.44269504f)));
  const __m512 n = _mm512_roundscale_ps(t, 0);
  const f16 r = (f16)t - (f16)n;
  const f16 power = (((r * 0.0096760371f + 0.0559220356f) * r + 0.240221074f) * r + 0.693121034f) * r + 1.00000008f;
  return 1.f / (1.f + (f16)_mm512_scalef_ps((__m512)power, n));
}
inline f16 wide(__m256i x) { return (f16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
inline f16 low(__m512i x) { return wide(_mm512_castsi512_si256(x)); }
inline f16 high(__m512i x) { return wide(_mm512_extracti64x4_epi64(x, 1)); }
inline __m512i narrow(f16 low, f16 high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

// Sums of 32 columns of gate and 32 of up -> both rounded, for the backward pass where one is to come; and their gated
// product.
struct Gate {
  bf16 *gate_up, *gated;  // [rows, 2 I] or null; [rows, I]
  int64_t I;
  void operator()(int64_t m, int64_t count, const __m512 (&acc)[ROWS][4]) const {
    for (int64_t r = 0; r < count; r++) {
      const __m512i gate = narrow((f16)acc[r][0], (f16)acc[r][1]), up = narrow((f16)acc[r][2], (f16)acc[r][3]);
      if (gate_up) {
        _mm512_storeu_si512(gate_up + (m + r) * 2 * I, gate);
        _mm512_storeu_si512(gate_up + (m + r) * 2 * I + I, up);
      }
      const f16 a = low(gate), b = high(gate);
      _mm512_storeu_si512(gated + (m + r) * I, narrow(a * sigmoid(a) * low(up), b * sigmoid(b) * high(up)));
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
    const i16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i pairs = (__m512i)(lanes | (lanes + 16) << 16);  // the i-th of the first half, the i-th of the second
    for (int64_t r = 0; r < ROWS; r++)  // what the next rows will read
      for (int v = 0; v < V; v += 2) {
        const bf16* next = gate_up + (m + ROWS + r) * 2 * I + column + v * 16;
        _mm_prefetch((const char*)next, _MM_HINT_T0);
        _mm_prefetch((const char*)(next + I), _MM_HINT_T0);
      }
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; r += 2) {
      if (r >= count) return;
      const bool both = r + 1 < count;
      for (int v = 0; v < V; v++) {
        const int64_t line = column + v * 16, row = (m + r) * 2 * I + line;
        const Three x = of((f16)acc[r][v], row), y = both ? of((f16)acc[r + 1][v], row + 2 * I) : Three{};
        const __m512i to_gate = narrow(x.to_gate, y.to_gate), to_up = narrow(x.to_up, y.to_up);
        _mm256_storeu_si256((__m256i*)(grads + row), _mm512_castsi512_si256(to_gate));
        _mm256_storeu_si256((__m256i*)(grads + row + I), _mm512_castsi512_si256(to_up));
        if (both) {
          _mm256_storeu_si256((__m256i*)(grads + row + 2 * I), _mm512_extracti64x4_epi64(to_gate, 1));
          _mm256_storeu_si256((__m256i*)(grads + row + 3 * I), _mm512_extracti64x4_epi64(to_up, 1));
        }
        if (!to_gate_words) continue;
        const int64_t word = (m + r) / 2, at = line / BLOCK * BLOCK * words + word * BLOCK + line % BLOCK;
        _mm512_store_si512(to_gate_words + at, _mm512_permutexvar_epi16(pairs, to_gate));
        _mm512_store_si512(to_up_words + at, _mm512_permutexvar_epi16(pairs, to_up));
        _mm512_store_si512(gated_words + word * 16 * V + v * 16,
                           _mm512_permutexvar_epi16(pairs, narrow(x.gated, y.gated)));
      }
    }
  }
  struct Three {
    f16 to_gate, to_up, gated;
  };
  inline Three of(f16 grad, int64_t at) const {
    const f16 gate = load(gate_up + at), up = load(gate_up + at + I), share = sigmoid(gate), silu = gate * share;
    return {grad * up * (share + silu * (1.f - share)), grad * silu, silu * up};
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
