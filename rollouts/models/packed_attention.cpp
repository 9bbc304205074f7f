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

// x [W, D] -> columns [D, padded(W)], the padding zero.
template <int D>
void transpose(const Tensor& x, const Span& s, int64_t h, float* columns) {
  const int64_t width = padded(s.keys());
  for (int64_t i = 0; i < D; i++)
    for (int64_t j = s.keys(); j < width; j++) columns[i * width + j] = 0;
  for (int64_t j = 0; j < s.keys(); j++) {
    const float* row = x.at(s.token(j), h);
    for (int64_t i = 0; i < D; i++) columns[i * width + j] = row[i];
  }
}

// out[r, j] = rows[r] . columns[:, j] for R rows and all j < end, 32 at a time.
template <int R, int D>
inline void products(const float* const* rows, const float* columns, int64_t width, int64_t end, float* out) {
  for (int64_t j = 0; j < end; j += 32) {
    f16 a[R] = {}, b[R] = {};
    for (int i = 0; i < D; i++) {
      const f16 x = load(columns + i * width + j), y = load(columns + i * width + j + 16);
      for (int r = 0; r < R; r++) {
        const f16 q = splat(rows[r][i]);
        a[r] += q * x;
        b[r] += q * y;
      }
    }
    for (int r = 0; r < R; r++) put(out + r * width + j, a[r]), put(out + r * width + j + 16, b[r]);
  }
}

// out[r] = sum over j < end of weights[r, j] * x[j], for R rows.
template <int R, int D>
inline void weighted_sums(const float* weights, int64_t width, const Tensor& x, const Span& s, int64_t h, int64_t end,
                          float (*out)[D]) {
  f16 acc[R][D / 16] = {};
  for (int64_t j = 0; j < end; j++) {
    const float* row = x.at(s.token(j), h);
    for (int c = 0; c < D / 16; c++) {
      const f16 v = load(row + c * 16);
      for (int r = 0; r < R; r++) acc[r][c] += splat(weights[r * width + j]) * v;
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < D / 16; c++) put(out[r] + c * 16, acc[r][c]);
}

// x[j] += sum over r of weights[r, j] * rows[r], for all j < end.
template <int R, int D>
inline void add_outer(const float* weights, int64_t width, const float* const* rows, float* x, int64_t end) {
  f16 a[R][D / 16];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < D / 16; c++) a[r][c] = load(rows[r] + c * 16);
  for (int64_t j = 0; j < end; j++)
    for (int c = 0; c < D / 16; c++) {
      f16 sum = load(x + j * D + c * 16);
      for (int r = 0; r < R; r++) sum += splat(weights[r * width + j]) * a[r][c];
      put(x + j * D + c * 16, sum);
    }
}

// Scores of R queries, the first of them level with key `first` -> weights e^(s - lse), zero past the diagonal.
template <int R>
inline void softmax(float* scores, int64_t width, int64_t first, int64_t count, float scale, float* lse, bool known) {
  for (int64_t r = 0; r < R; r++) {
    float* s = scores + r * width;
    const int64_t last = first + (r < count ? r : count - 1), end = padded(first + count);
    if (!known) {
      f16 most = splat(NEVER);
      for (int64_t j = 0; j <= last; j += 16) {
        const f16 x = where(LANES > splat((float)(last - j)), splat(NEVER), load(s + j) * scale);
        most = where(x > most, x, most);
      }
      const float peak = highest_of(most);
      f16 total = {};
      for (int64_t j = 0; j <= last; j += 16) {
        const f16 e = exp16(load(s + j) * scale - peak);
        total += where(LANES > splat((float)(last - j)), splat(0), e);
      }
      lse[r] = peak + __builtin_logf(sum(total));
    }
    int64_t j = 0;
    for (; j <= last; j += 16)
      put(s + j, where(LANES > splat((float)(last - j)), splat(0), exp16(load(s + j) * scale - lse[r])));
    for (; j < end; j += 16) put(s + j, splat(0));
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
  float *keys = scratch, *scores = keys + D * width;
  transpose<D>(t.k, s, kv_head, keys);
  for (int64_t g = 0; g < t.group; g++) {
    const int64_t h = kv_head * t.group + g;
    for (int64_t first = 0; first < L; first += R) {
      const int64_t count = L - first < R ? L - first : R;
      const float* rows[R];
      for (int r = 0; r < R; r++) rows[r] = t.q.at(start + first + (r < count ? r : count - 1), h);
      float lse[R], out[R][D];
      products<R, D>(rows, keys, width, s.P + first + count, scores);
      softmax<R>(scores, width, s.P + first, count, t.scale, lse, false);
      weighted_sums<R, D>(scores, width, t.v, s, kv_head, s.P + first + count, out);
      for (int64_t r = 0; r < count; r++) {
        memcpy(t.out.at(start + first + r, h), out[r], D * sizeof(float));
        t.lse[h * t.tokens + start + first + r] = lse[r];
      }
    }
  }
}

template <int D>
void backward(const Task& t, const Tensor& grad, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
              const Span& s, int64_t kv_head, float* scratch) {
  const int R = Rows<D>::count;
  const int64_t width = padded(s.keys()), start = s.start, L = s.L;
  float *keys = scratch, *values = keys + D * width, *weights = values + D * width, *slopes = weights + R * width;
  float *sum_k = slopes + R * width, *sum_v = sum_k + width * D;
  transpose<D>(t.k, s, kv_head, keys);
  transpose<D>(t.v, s, kv_head, values);
  memset(sum_k, 0, 2 * width * D * sizeof(float));
  for (int64_t g = 0; g < t.group; g++) {
    const int64_t h = kv_head * t.group + g;
    for (int64_t first = 0; first < L; first += R) {
      const int64_t count = L - first < R ? L - first : R, end = s.P + first + count;
      const float *queries[R], *grads[R];
      float lse[R], delta[R], out[R][D];
      for (int r = 0; r < R; r++) {
        const int64_t row = start + first + (r < count ? r : count - 1);
        queries[r] = t.q.at(row, h), grads[r] = grad.at(row, h);
        lse[r] = t.lse[h * t.tokens + row];
        f16 dot = {};
        for (int c = 0; c < D; c += 16) dot += load(grads[r] + c) * load(t.out.at(row, h) + c);
        delta[r] = sum(dot);
      }
      products<R, D>(queries, keys, width, end, weights);
      softmax<R>(weights, width, s.P + first, count, t.scale, lse, true);
      products<R, D>(grads, values, width, end, slopes);
      for (int64_t r = 0; r < R; r++)
        for (int64_t j = 0; j < end; j += 16) {
          // A tile's rows past the end repeat its last one: they must add nothing.
          const f16 p = r < count ? load(weights + r * width + j) : f16{};
          put(weights + r * width + j, p);
          put(slopes + r * width + j, p * (load(slopes + r * width + j) - delta[r]) * t.scale);
        }
      add_outer<R, D>(weights, width, grads, sum_v, end);
      add_outer<R, D>(slopes, width, queries, sum_k, end);
      weighted_sums<R, D>(slopes, width, t.k, s, kv_head, end, out);
      for (int64_t r = 0; r < count; r++) memcpy(grad_q.at(start + first + r, h), out[r], D * sizeof(float));
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
    for_each_task(c->bounds, c->prefixes, c->sequences, c->kv_heads, c->threads, D + Rows<D>::count,
                  [&](const Span& s, int64_t h, float* scratch) { forward<D>(t, s, h, scratch); });
  });
}

extern "C" int packed_attention_backward(const Call* c) {
  const Task t = task_of(*c);
  return by_head_width(c->head_dim, [&]<int D>() {
    for_each_task(c->bounds, c->prefixes, c->sequences, c->kv_heads, c->threads, 4 * D + 2 * Rows<D>::count,
                  [&](const Span& s, int64_t h, float* scratch) {
                    backward<D>(t, c->grad, c->grad_q, c->grad_k, c->grad_v, s, h, scratch);
                  });
  });
}
