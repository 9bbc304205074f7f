// Causal attention over sequences packed back to back, forward and backward, in float32 or bfloat16 on the CPU.
//
// A sequence may go on from a prefix, an earlier sequence that several share: its queries see all of the prefix and
// what is before them in their own sequence. One task is one family (a sequence and those that go on from it) and one
// key/value head, so that a prefix's gradients are summed by one thread; what lies above the diagonal is never computed.
// A tile of R queries is taken at a time: its scores with 16 keys to a vector, its outputs with 16 columns to a vector.
//
// Products are taken word by word: a word is one float, or two bfloat16 numbers that follow each other along what is
// summed over, which avx512_bf16 multiplies and adds in one go. Sums, scores and the softmax are floats either way.
// Shapes: T tokens, H query heads, K key/value heads, D head width (a multiple of 16), P tokens of the prefix, L tokens
// of the sequence itself, W = P + L keys, G = H / K queries' heads a key head. Tensors are [T, heads, D] with strides in
// numbers for T and heads.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

namespace {

const f16 LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
const float NEVER = -1e30f;

template <class N>
constexpr int PER = 4 / sizeof(N);  // numbers a word

typedef uint32_t word;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class N>
struct Tensor {
  N* data;
  int64_t token, head;  // strides, in numbers
  N* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

// Where a sequence lies: the tokens of its prefix, then its own.
struct Span {
  int64_t prefix, P, start, L;
  int64_t keys() const { return P + L; }
  int64_t token(int64_t j) const { return j < P ? prefix + j : start + j - P; }  // of key j
};

inline int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }

// Where the weights of queries [R] with the keys from j on lie, j a multiple of 16: [keys / 32][R][32].
template <int R>
inline int64_t place(int64_t j, int64_t r) {
  return j / 32 * R * 32 + r * 32 + j % 32;
}

inline u16 words(const word* p) { return *(const u16*)p; }
inline void put(word* p, u16 x) { *(u16*)p = x; }
inline u16 splat(word x) { return x | u16{}; }
inline u16 pairs(h16 first, h16 second) {  // sixteen words
  return __builtin_convertvector(first, u16) | __builtin_convertvector(second, u16) << 16;
}

// To bfloat16, to nearest.
inline h16 half(f16 x) {
#ifdef __AVX512BF16__
  return (h16)_mm512_cvtneps_pbh((__m512)x);
#else
  return rounded(x);
#endif
}
inline void put_half(void* p, f16 x) { *(h16*)p = half(x); }

// sum + a * b, number by number.
template <class N>
inline f16 add_product(f16 sum, u16 a, u16 b) {
#ifdef __AVX512BF16__
  if constexpr (PER<N> == 2) return (f16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return sum + (f16)a * (f16)b;
}

// `count` rows of D numbers (the last ones may be missing), at row(r) -> words along the rows [count / PER, D].
template <class N, int D, class Row>
inline void words_along_rows(int64_t count, const Row& row, word* out) {
  for (int64_t r = 0; r < count; r += PER<N>, out += D) {
    if constexpr (PER<N> == 1)
      memcpy(out, row(r), D * sizeof(N));
    else
      for (int64_t i = 0; i < D; i += 16)
        put(out + i, pairs(*(const h16*)(row(r) + i), r + 1 < count ? *(const h16*)(row(r + 1) + i) : h16{}));
  }
}

// x [W, D] -> words along the keys [W / PER, D].
template <class N, int D>
void gather_rows(const Tensor<N>& x, const Span& s, int64_t h, word* rows) {
  words_along_rows<N, D>(s.keys(), [&](int64_t j) { return x.at(s.token(j), h); }, rows);
}

// x [W, D] -> columns of words along the numbers of a key [padded(W) / 32][D / PER][32], the padding zero.
template <class N, int D>
void gather_columns(const Tensor<N>& x, const Span& s, int64_t h, word* columns) {
  const int64_t C = D / PER<N>;
  for (int64_t j = 0; j < padded(s.keys()); j += 16)
    for (int64_t i = 0; i < C; i += 16) {
      const int64_t width = least(16, C - i);
      i16 lines[16] = {};
      for (int64_t k = 0; k < least(16, s.keys() - j); k++)
        memcpy(&lines[k], x.at(s.token(j + k), h) + i * PER<N>, width * sizeof(word));
      transpose16(lines);
      for (int64_t k = 0; k < width; k++) put(columns + j / 32 * C * 32 + (i + k) * 32 + j % 32, (u16)lines[k]);
    }
}

// out[r, j] = rows[r] . columns[:, j] for R rows and all j < end, 32 at a time.
template <class N, int R, int D>
inline void products(const word (*rows)[D / PER<N>], const word* columns, int64_t end, float* out) {
  const int C = D / PER<N>;
  for (int64_t j = 0; j < end; j += 32) {
    f16 a[R] = {}, b[R] = {};
    for (int i = 0; i < C; i++) {
      const u16 x = words(columns + j * C + i * 32), y = words(columns + j * C + i * 32 + 16);
      for (int r = 0; r < R; r++) {
        const u16 q = splat(rows[r][i]);
        a[r] = add_product<N>(a[r], q, x);
        b[r] = add_product<N>(b[r], q, y);
      }
    }
    for (int r = 0; r < R; r++) put(out + j * R + r * 32, a[r]), put(out + j * R + r * 32 + 16, b[r]);
  }
}

// Weights of R queries with keys below `end` -> words along the keys [keys / 32][R][32], half of it empty with words of
// two; `to` may be where the weights are.
template <class N, int R>
inline word* along_keys(float* weights, int64_t end, word* to) {
  if constexpr (PER<N> == 1) return (word*)weights;
  for (int64_t j = 0; j < end; j += 32)
    for (int64_t r = 0; r < R; r++) {
      const f16 a = load(weights + j * R + r * 32), b = load(weights + j * R + r * 32 + 16);
      put_half(to + j * R + r * 16, a);
      put_half(to + j * R + r * 16 + 8, b);
    }
  return to;
}

// The same along the queries [keys / 32][R / PER][32], where the weights were.
template <class N, int R>
inline word* along_queries(float* weights, int64_t end) {
  if constexpr (PER<N> == 2)
    for (int64_t j = 0; j < end; j += 32)
      for (int64_t r = 0; r < R; r += 2)
        for (int64_t i = 0; i < 32; i += 16) {
          const float* from = weights + j * R + r * 32 + i;
          const h16 first = half(load(from)), second = half(load(from + 32));
          put((word*)weights + j * R + r * 16 + i, pairs(first, second));
        }
  return (word*)weights;
}

// out[r] = sum over j < end of weights[r, j] * x[j], for R rows; at most 64 columns at a time, which registers can hold.
template <class N, int R, int D, int FROM = 0>
inline void weighted_sums(const word* weights, const word* x, int64_t end, float (*out)[D]) {
  const int C = D - FROM < 64 ? (D - FROM) / 16 : 4, B = 32 / PER<N>;
  f16 acc[R][C] = {};
  for (int64_t j = 0; j * PER<N> < end; j++) {
    const word* w = weights + j / B * R * 32 + j % B;
    u16 v[C];
    for (int c = 0; c < C; c++) v[c] = words(x + j * D + FROM + c * 16);
    for (int r = 0; r < R; r++) {
      const u16 weight = splat(w[r * B]);
      for (int c = 0; c < C; c++) acc[r][c] = add_product<N>(acc[r][c], weight, v[c]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) put(out[r] + FROM + c * 16, acc[r][c]);
  if constexpr (FROM + C * 16 < D) weighted_sums<N, R, D, FROM + C * 16>(weights, x, end, out);
}

// x[j] += sum over r of weights[r, j] * rows[r], for all j < end; words along the rows.
template <class N, int R, int D>
inline void add_outer(const word* weights, const word (*rows)[D], float* x, int64_t end) {
  const int C = D / 16, Q = R / PER<N>;
  u16 a[Q][C];
  for (int r = 0; r < Q; r++)
    for (int c = 0; c < C; c++) a[r][c] = words(rows[r] + c * 16);
  for (int64_t j = 0; j < end; j++) {
    const word* w = weights + j / 32 * R * 32 + j % 32;
    for (int c = 0; c < C; c++) {
      f16 sum = load(x + j * D + c * 16);
      for (int r = 0; r < Q; r++) sum = add_product<N>(sum, splat(w[r * 32]), a[r][c]);
      put(x + j * D + c * 16, sum);
    }
  }
}

// Scores from key j on, with `none` in place of those past key `last`.
inline f16 up_to(int64_t last, int64_t j, f16 scores, float none) {
  return j + 15 <= last ? scores : where(LANES > splat((float)(last - j)), splat(none), scores);
}

// The highest scaled score of each of R queries, the first of them level with key `first`.
template <int R>
inline void peaks(const float* scores, int64_t first, int64_t count, float scale, float* peak) {
  for (int64_t r = 0; r < R; r++) {
    const int64_t last = first + least(r, count - 1);
    f16 most = splat(NEVER);
    for (int64_t j = 0; j <= last; j += 16) {
      const f16 x = up_to(last, j, load(scores + place<R>(j, r)) * scale, NEVER);
      most = where(x > most, x, most);
    }
    peak[r] = highest_of(most);
  }
}

// Scores of R queries -> weights e^(scale * s - shift), zero past the diagonal, and the sums of each query's.
template <int R>
inline void exponentials(float* scores, int64_t first, int64_t count, float scale, const float* shift, float* sums) {
  for (int64_t r = 0; r < R; r++) {
    const int64_t last = first + least(r, count - 1), end = padded(first + count);
    f16 total = {};
    int64_t j = 0;
    for (; j <= last; j += 16) {
      float* s = scores + place<R>(j, r);
      const f16 e = up_to(last, j, exp16(load(s) * scale - shift[r]), 0);
      put(s, e);
      total += e;
    }
    for (; j < end; j += 16) put(scores + place<R>(j, r), splat(0.f));
    sums[r] = sum(total);
  }
}

template <class N>
struct Task {
  Tensor<N> q, k, v, out, grad, grad_q, grad_k, grad_v;
  float* lse;  // [H, T]
  int64_t tokens, group;
  float scale;
};

template <int D>
struct Rows {  // as many queries at a time as leave the registers room
  static const int count = D <= 32 ? 8 : D <= 64 ? 6 : 4;
};

template <class N, int D>
void forward(const Task<N>& t, const Span& s, int64_t kv_head, word* scratch) {
  const int R = Rows<D>::count, C = D / PER<N>;
  const int64_t width = padded(s.keys()), start = s.start, L = s.L;
  word *keys = scratch, *values = keys + C * width;
  float* scores = (float*)(values + C * width);
  gather_columns<N, D>(t.k, s, kv_head, keys);
  gather_rows<N, D>(t.v, s, kv_head, values);
  for (int64_t g = 0; g < t.group; g++) {
    const int64_t h = kv_head * t.group + g;
    for (int64_t first = 0; first < L; first += R) {
      const int64_t count = least(R, L - first), end = s.P + first + count;
      word rows[R][C];
      float peak[R], total[R], out[R][D];
      for (int64_t r = 0; r < R; r++)
        memcpy(rows[r], t.q.at(start + first + least(r, count - 1), h), sizeof rows[r]);
      products<N, R, D>(rows, keys, end, scores);
      peaks<R>(scores, s.P + first, count, t.scale, peak);
      exponentials<R>(scores, s.P + first, count, t.scale, peak, total);
      weighted_sums<N, R, D>(along_keys<N, R>(scores, end, (word*)scores), values, end, out);
      for (int64_t r = 0; r < count; r++) {
        N* to = t.out.at(start + first + r, h);
        for (int c = 0; c < D; c += 16) put(to + c, load(out[r] + c) * (1.f / total[r]));
        t.lse[h * t.tokens + start + first + r] = peak[r] + __builtin_logf(total[r]);
      }
    }
  }
}

template <class N, int D>
void backward(const Task<N>& t, const Span& s, int64_t kv_head, word* scratch) {
  const int R = Rows<D>::count, C = D / PER<N>;
  const int64_t width = padded(s.keys()), start = s.start, L = s.L;
  word *key_rows = scratch, *keys = key_rows + C * width, *values = keys + C * width, *spare = values + C * width;
  float *weights = (float*)(spare + R * width), *slopes = weights + R * width;
  float *sum_k = slopes + R * width, *sum_v = sum_k + width * D;
  gather_rows<N, D>(t.k, s, kv_head, key_rows);
  gather_columns<N, D>(t.k, s, kv_head, keys);
  gather_columns<N, D>(t.v, s, kv_head, values);
  memset(sum_k, 0, 2 * width * D * sizeof(float));
  for (int64_t g = 0; g < t.group; g++) {
    const int64_t h = kv_head * t.group + g;
    for (int64_t first = 0; first < L; first += R) {
      const int64_t count = least(R, L - first), end = s.P + first + count;
      word queries[R][C], grads[R][C], query_rows[R / PER<N>][D], grad_rows[R / PER<N>][D];
      float lse[R], delta[R], sums[R], out[R][D];
      const auto row = [&](int64_t r) { return start + first + least(r, count - 1); };
      for (int64_t r = 0; r < R; r++) {
        memcpy(queries[r], t.q.at(row(r), h), sizeof queries[r]);
        memcpy(grads[r], t.grad.at(row(r), h), sizeof grads[r]);
        lse[r] = t.lse[h * t.tokens + row(r)];
        f16 dot = {};
        for (int c = 0; c < D; c += 16) dot += load(t.grad.at(row(r), h) + c) * load(t.out.at(row(r), h) + c);
        delta[r] = sum(dot);
      }
      words_along_rows<N, D>(R, [&](int64_t r) { return t.q.at(row(r), h); }, query_rows[0]);
      words_along_rows<N, D>(R, [&](int64_t r) { return t.grad.at(row(r), h); }, grad_rows[0]);
      products<N, R, D>(queries, keys, end, weights);
      exponentials<R>(weights, s.P + first, count, t.scale, lse, sums);
      products<N, R, D>(grads, values, end, slopes);
      for (int64_t r = 0; r < R; r++)
        for (int64_t j = 0; j < end; j += 16) {
          float *w = weights + place<R>(j, r), *slope = slopes + place<R>(j, r);
          if (r >= count) put(w, splat(0.f));  // a tile's rows past the end repeat its last one: they must add nothing
          put(slope, load(w) * (load(slope) - delta[r]) * t.scale);
        }
      add_outer<N, R, D>(along_queries<N, R>(weights, end), grad_rows, sum_v, end);
      weighted_sums<N, R, D>(along_keys<N, R>(slopes, end, spare), key_rows, end, out);
      add_outer<N, R, D>(along_queries<N, R>(slopes, end), query_rows, sum_k, end);
      for (int64_t r = 0; r < count; r++)
        for (int c = 0; c < D; c += 16) put(t.grad_q.at(start + first + r, h) + c, load(out[r] + c));
    }
  }
  for (int64_t j = 0; j < s.keys(); j++)
    for (int64_t c = 0; c < D; c += 16) {
      N *gk = t.grad_k.at(s.token(j), kv_head) + c, *gv = t.grad_v.at(s.token(j), kv_head) + c;
      f16 k = load(sum_k + j * D + c), v = load(sum_v + j * D + c);
      // The prefix's own gradients are there already: a family's first sequence comes first.
      if (j < s.P) k += load(gk), v += load(gv);
      put(gk, k), put(gv, v);
    }
}

// Runs `one(span, key head, scratch)` for every sequence and key/value head: families side by side on several threads,
// the sequences of a family in their order. Without `prefixes` every sequence is a family of its own.
template <typename One>
void for_each_task(const int32_t* bounds, const int32_t* prefixes, int64_t sequences, int64_t kv_heads, int64_t threads,
                   int64_t words_a_token, One one) {
  int64_t longest = 0, families = 0;
  int64_t* firsts = (int64_t*)malloc((sequences + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < sequences; i++) {
    const int64_t P = prefixes ? prefixes[2 * i + 1] - prefixes[2 * i] : 0, W = P + bounds[i + 1] - bounds[i];
    if (W > longest) longest = W;
    if (!P) firsts[families++] = i;
  }
  firsts[families] = sequences;
  const size_t bytes = (size_t)padded(longest) * words_a_token * sizeof(word);
#pragma omp parallel num_threads((int)threads)
  {
    word* scratch = (word*)aligned_alloc(64, (bytes + 63) / 64 * 64);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < families * kv_heads; task++)
      for (int64_t i = firsts[task / kv_heads]; i < firsts[task / kv_heads + 1]; i++) {
        const int64_t from = prefixes ? prefixes[2 * i] : 0, to = prefixes ? prefixes[2 * i + 1] : 0;
        one(Span{from, to - from, bounds[i], bounds[i + 1] - bounds[i]}, task % kv_heads, scratch);
      }
    free(scratch);
  }
  free(firsts);
}

template <typename Run>
bool by_head_width(int64_t d, Run run) {
  switch (d) {
    case 16: run.template operator()<16>(); return true;
    case 32: run.template operator()<32>(); return true;
    case 48: run.template operator()<48>(); return true;
    case 64: run.template operator()<64>(); return true;
    case 80: run.template operator()<80>(); return true;
    case 96: run.template operator()<96>(); return true;
    case 128: run.template operator()<128>(); return true;
    default: return false;
  }
}

}  // namespace

struct Call {  // as packed_attention.py lays it out
  Tensor<void> q, k, v, out, grad, grad_q, grad_k, grad_v;
  float* lse;
  const int32_t *bounds, *prefixes;  // [sequences + 1]; [sequences, 2] or null
  int64_t sequences, tokens, heads, kv_heads, head_dim, threads;
  double scale;
};

template <class N>
static Task<N> task_of(const Call& c) {
  const auto of = [](const Tensor<void>& x) { return Tensor<N>{(N*)x.data, x.token, x.head}; };
  return {of(c.q), of(c.k), of(c.v), of(c.out), of(c.grad), of(c.grad_q), of(c.grad_k), of(c.grad_v), c.lse, c.tokens,
          c.heads / c.kv_heads, (float)c.scale};
}

template <class N>
static int run_forward(const Call& c) {
  const Task<N> t = task_of<N>(c);
  return by_head_width(c.head_dim, [&]<int D>() {
    for_each_task(c.bounds, c.prefixes, c.sequences, c.kv_heads, c.threads, 2 * D / PER<N> + Rows<D>::count,
                  [&](const Span& s, int64_t h, word* scratch) { forward<N, D>(t, s, h, scratch); });
  });
}

template <class N>
static int run_backward(const Call& c) {
  const Task<N> t = task_of<N>(c);
  return by_head_width(c.head_dim, [&]<int D>() {
    for_each_task(c.bounds, c.prefixes, c.sequences, c.kv_heads, c.threads,
                  3 * D / PER<N> + 2 * D + 3 * Rows<D>::count,
                  [&](const Span& s, int64_t h, word* scratch) { backward<N, D>(t, s, h, scratch); });
  });
}

extern "C" int packed_attention_forward_float32(const Call* c) { return run_forward<float>(*c); }
extern "C" int packed_attention_backward_float32(const Call* c) { return run_backward<float>(*c); }
#ifdef __AVX512BF16__
extern "C" int packed_attention_forward_bfloat16(const Call* c) { return run_forward<bf16>(*c); }
extern "C" int packed_attention_backward_bfloat16(const Call* c) { return run_backward<bf16>(*c); }
#endif
