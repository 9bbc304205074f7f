// Causal attention over sequences packed back to back, forward and backward, in float32 on the CPU.
//
// A sequence may go on from a prefix, an earlier sequence that several share: its queries see all of the prefix and
// what is before them in their own sequence. One task is one family (a sequence and those that go on from it) and one
// key/value head, so that a prefix's gradients are summed by one thread; what lies above the diagonal is never computed.
// A tile of R queries is taken at a time: its scores with 16 keys to a vector, its outputs with 16 columns to a vector.
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

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Tensor {
  float* data;
  int64_t token, head;  // strides, in numbers
  float* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
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

// x [W, D] -> rows [W, D], one behind the other.
template <int D>
void gather_rows(const Tensor& x, const Span& s, int64_t h, float* rows) {
  for (int64_t j = 0; j < s.keys(); j++) memcpy(rows + j * D, x.at(s.token(j), h), D * sizeof(float));
}

// x [W, D] -> columns [padded(W) / 32][D][32], the padding zero.
template <int D>
void gather_columns(const Tensor& x, const Span& s, int64_t h, float* columns) {
  for (int64_t j = 0; j < padded(s.keys()); j += 16)
    for (int64_t i = 0; i < D; i += 16) {
      f16 lines[16] = {};
      for (int64_t k = 0; k < least(16, s.keys() - j); k++) lines[k] = load(x.at(s.token(j + k), h) + i);
      transpose16(lines);
      for (int64_t k = 0; k < 16; k++) put(columns + j / 32 * D * 32 + (i + k) * 32 + j % 32, lines[k]);
    }
}

// out[r, j] = rows[r] . columns[:, j] for R rows and all j < end, 32 at a time.
template <int R, int D>
inline void products(const float (*rows)[D], const float* columns, int64_t end, float* out) {
  for (int64_t j = 0; j < end; j += 32) {
    f16 a[R] = {}, b[R] = {};
    for (int i = 0; i < D; i++) {
      const f16 x = load(columns + j * D + i * 32), y = load(columns + j * D + i * 32 + 16);
      for (int r = 0; r < R; r++) {
        const f16 q = splat(rows[r][i]);
        a[r] += q * x;
        b[r] += q * y;
      }
    }
    for (int r = 0; r < R; r++) put(out + j * R + r * 32, a[r]), put(out + j * R + r * 32 + 16, b[r]);
  }
}

// out[r] = sum over j < end of weights[r, j] * x[j], for R rows; at most 64 columns at a time, which registers can hold.
template <int R, int D, int FROM = 0>
inline void weighted_sums(const float* weights, const float* x, int64_t end, float (*out)[D]) {
  const int C = D - FROM < 64 ? (D - FROM) / 16 : 4;
  f16 acc[R][C] = {};
  for (int64_t j = 0; j < end; j++) {
    const float* w = weights + place<R>(j, 0);
    f16 v[C];
    for (int c = 0; c < C; c++) v[c] = load(x + j * D + FROM + c * 16);
    for (int r = 0; r < R; r++) {
      const f16 weight = splat(w[r * 32]);
      for (int c = 0; c < C; c++) acc[r][c] += weight * v[c];
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) put(out[r] + FROM + c * 16, acc[r][c]);
  if constexpr (FROM + C * 16 < D) weighted_sums<R, D, FROM + C * 16>(weights, x, end, out);
}

// x[j] += sum over r of weights[r, j] * rows[r], for all j < end.
template <int R, int D>
inline void add_outer(const float* weights, const float (*rows)[D], float* x, int64_t end) {
  f16 a[R][D / 16];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < D / 16; c++) a[r][c] = load(rows[r] + c * 16);
  for (int64_t j = 0; j < end; j++) {
    const float* w = weights + place<R>(j, 0);
    for (int c = 0; c < D / 16; c++) {
      f16 sum = load(x + j * D + c * 16);
      for (int r = 0; r < R; r++) sum += splat(w[r * 32]) * a[r][c];
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
    for (; j < end; j += 16) put(scores + place<R>(j, r), splat(0));
    sums[r] = sum(total);
  }
}

struct Task {
  Tensor q, k, v, out;
  float* lse;  // [H, T]
  int64_t tokens, group;
  float scale;
};

template <int D>
struct Rows {  // as many queries at a time as leave the registers room
  static const int count = D <= 32 ? 8 : D <= 64 ? 6 : 4;
};

template <int D>
void forward(const Task& t, const Span& s, int64_t kv_head, float* scratch) {
  const int R = Rows<D>::count;
  const int64_t width = padded(s.keys()), start = s.start, L = s.L;
  float *keys = scratch, *values = keys + D * width, *scores = values + D * width;
  gather_columns<D>(t.k, s, kv_head, keys);
  gather_rows<D>(t.v, s, kv_head, values);
  for (int64_t g = 0; g < t.group; g++) {
    const int64_t h = kv_head * t.group + g;
    for (int64_t first = 0; first < L; first += R) {
      const int64_t count = least(R, L - first), end = s.P + first + count;
      float rows[R][D], peak[R], total[R], out[R][D];
      for (int64_t r = 0; r < R; r++)
        memcpy(rows[r], t.q.at(start + first + least(r, count - 1), h), sizeof rows[r]);
      products<R, D>(rows, keys, end, scores);
      peaks<R>(scores, s.P + first, count, t.scale, peak);
      exponentials<R>(scores, s.P + first, count, t.scale, peak, total);
      weighted_sums<R, D>(scores, values, end, out);
      for (int64_t r = 0; r < count; r++) {
        float* to = t.out.at(start + first + r, h);
        for (int c = 0; c < D; c += 16) put(to + c, load(out[r] + c) * (1.f / total[r]));
        t.lse[h * t.tokens + start + first + r] = peak[r] + __builtin_logf(total[r]);
      }
    }
  }
}

template <int D>
void backward(const Task& t, const Tensor& grad, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
              const Span& s, int64_t kv_head, float* scratch) {
  const int R = Rows<D>::count;
  const int64_t width = padded(s.keys()), start = s.start, L = s.L;
  float *key_rows = scratch, *keys = key_rows + D * width, *values = keys + D * width, *weights = values + D * width;
  float *slopes = weights + R * width, *sum_k = slopes + R * width, *sum_v = sum_k + width * D;
  gather_rows<D>(t.k, s, kv_head, key_rows);
  gather_columns<D>(t.k, s, kv_head, keys);
  gather_columns<D>(t.v, s, kv_head, values);
  memset(sum_k, 0, 2 * width * D * sizeof(float));
  for (int64_t g = 0; g < t.group; g++) {
    const int64_t h = kv_head * t.group + g;
    for (int64_t first = 0; first < L; first += R) {
      const int64_t count = least(R, L - first), end = s.P + first + count;
      float queries[R][D], grads[R][D], lse[R], delta[R], sums[R], out[R][D];
      for (int64_t r = 0; r < R; r++) {
        const int64_t row = start + first + least(r, count - 1);
        memcpy(queries[r], t.q.at(row, h), sizeof queries[r]);
        memcpy(grads[r], grad.at(row, h), sizeof grads[r]);
        lse[r] = t.lse[h * t.tokens + row];
        f16 dot = {};
        for (int c = 0; c < D; c += 16) dot += load(grads[r] + c) * load(t.out.at(row, h) + c);
        delta[r] = sum(dot);
      }
      products<R, D>(queries, keys, end, weights);
      exponentials<R>(weights, s.P + first, count, t.scale, lse, sums);
      products<R, D>(grads, values, end, slopes);
      for (int64_t r = 0; r < R; r++)
        for (int64_t j = 0; j < end; j += 16) {
          float *w = weights + place<R>(j, r), *slope = slopes + place<R>(j, r);
          if (r >= count) put(w, splat(0));  // a tile's rows past the end repeat its last one: they must add nothing
          put(slope, load(w) * (load(slope) - delta[r]) * t.scale);
        }
      add_outer<R, D>(weights, grads, sum_v, end);
      add_outer<R, D>(slopes, queries, sum_k, end);
      weighted_sums<R, D>(slopes, key_rows, end, out);
      for (int64_t r = 0; r < count; r++) memcpy(grad_q.at(start + first + r, h), out[r], sizeof out[r]);
    }
  }
  for (int64_t j = 0; j < s.P; j++)  // the prefix's own gradients are there already: a family's first sequence is first
    for (int64_t c = 0; c < D; c += 16) {
      float *gk = grad_k.at(s.prefix + j, kv_head) + c, *gv = grad_v.at(s.prefix + j, kv_head) + c;
      put(gk, load(gk) + load(sum_k + j * D + c));
      put(gv, load(gv) + load(sum_v + j * D + c));
    }
  for (int64_t j = 0; j < L; j++) {
    memcpy(grad_k.at(start + j, kv_head), sum_k + (s.P + j) * D, D * sizeof(float));
    memcpy(grad_v.at(start + j, kv_head), sum_v + (s.P + j) * D, D * sizeof(float));
  }
}

// Runs `one(span, key head, scratch)` for every sequence and key/value head: families side by side on several threads,
// the sequences of a family in their order. Without `prefixes` every sequence is a family of its own.
template <typename One>
void for_each_task(const int32_t* bounds, const int32_t* prefixes, int64_t sequences, int64_t kv_heads, int64_t threads,
                   int64_t floats_a_token, One one) {
  int64_t longest = 0, families = 0;
  int64_t* firsts = (int64_t*)malloc((sequences + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < sequences; i++) {
    const int64_t P = prefixes ? prefixes[2 * i + 1] - prefixes[2 * i] : 0, W = P + bounds[i + 1] - bounds[i];
    if (W > longest) longest = W;
    if (!P) firsts[families++] = i;
  }
  firsts[families] = sequences;
  const size_t bytes = (size_t)padded(longest) * floats_a_token * sizeof(float);
#pragma omp parallel num_threads((int)threads)
  {
    float* scratch = (float*)aligned_alloc(64, (bytes + 63) / 64 * 64);
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
  Tensor q, k, v, out, grad, grad_q, grad_k, grad_v;
  float* lse;
  const int32_t *bounds, *prefixes;  // [sequences + 1]; [sequences, 2] or null
  int64_t sequences, tokens, heads, kv_heads, head_dim, threads;
  double scale;
};

static Task task_of(const Call& c) {
  return {c.q, c.k, c.v, c.out, c.lse, c.tokens, c.heads / c.kv_heads, (float)c.scale};
}

extern "C" int packed_attention_forward(const Call* c) {
  const Task t = task_of(*c);
  return by_head_width(c->head_dim, [&]<int D>() {
    for_each_task(c->bounds, c->prefixes, c->sequences, c->kv_heads, c->threads, 2 * D + Rows<D>::count,
                  [&](const Span& s, int64_t h, float* scratch) { forward<D>(t, s, h, scratch); });
  });
}

extern "C" int packed_attention_backward(const Call* c) {
  const Task t = task_of(*c);
  return by_head_width(c->head_dim, [&]<int D>() {
    for_each_task(c->bounds, c->prefixes, c->sequences, c->kv_heads, c->threads, 5 * D + 2 * Rows<D>::count,
                  [&](const Span& s, int64_t h, float* scratch) {
                    backward<D>(t, c->grad, c->grad_q, c->grad_k, c->grad_v, s, h, scratch);
                  });
  });
}
