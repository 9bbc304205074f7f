// Gated layers, out = (silu(x gate^T) * x up^T) down^T, both passes: products whose sums go on through SiLU and
// multiplication before they are rounded. T tokens, D numbers of a token, I of what lies between.

#include <omp.h>

#include "products.h"

#ifdef __AVX512BF16__
namespace {

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
