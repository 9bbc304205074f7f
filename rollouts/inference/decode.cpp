// One decoding step of a Llama-shaped model: a token for each of D rows over the paged cache, in one call.
//
// Every number is computed in an order that does not depend on D or on the number of threads, so a row's logits are
// bitwise the same in any company. Weights, keys and values are float or bfloat16, everything between is float.
// Shapes: D rows, C hidden width, H query heads, K key/value heads, d head width, I feed-forward width, V vocabulary,
// 16 tokens a page. C, d, I must be multiples of 16.

#include <omp.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

typedef float f16 __attribute__((vector_size(64), aligned(4)));  // sixteen floats
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2)));
typedef uint32_t u16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t bf16;

inline f16 splat(float x) { return f16{} + x; }
inline f16 load(const float* p) { return *(const f16*)p; }
inline f16 load(const bf16* p) { return (f16)(__builtin_convertvector(*(const h16*)p, u16) << 16); }
inline float one(const float* p) { return *p; }
inline float one(const bf16* p) {
  uint32_t bits = (uint32_t)*p << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  *p = (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // round to nearest, ties to even
}
// The sum of a vector as a tree over neighbors; `sums` of sixteen vectors at once follows the same tree, bit for bit.
inline f16 swap(f16 v, i16 lanes) { return __builtin_shuffle(v, lanes); }
inline float sum(f16 v) {
  v += swap(v, i16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
  v += swap(v, i16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
  v += swap(v, i16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
  v += swap(v, i16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  return v[0];
}
// Joins a and b: lane i of the result is the sum of the two neighbors (at distance `step`) of a or b that i stands for.
#define JOIN(a, b, even, odd) (__builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd))
inline f16 sums(const f16* v) {
  const i16 e1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}, o1 = e1 + 1;
  const i16 e2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}, o2 = e2 + 2;
  const i16 e4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}, o4 = e4 + 4;
  const i16 e8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, o8 = e8 + 8;
  f16 a[8], b[4];
  for (int i = 0; i < 8; i++) a[i] = JOIN(v[2 * i], v[2 * i + 1], e1, o1);
  for (int i = 0; i < 4; i++) b[i] = JOIN(a[2 * i], a[2 * i + 1], e2, o2);
  return JOIN(JOIN(b[0], b[1], e4, o4), JOIN(b[2], b[3], e4, o4), e8, o8);
}
#undef JOIN
template <int NT, int NO>
inline void sum_tile(const f16 (*acc)[NO], float (*y)[4]) {
  if (NT * NO == 16) {
    f16 all = sums(&acc[0][0]);
    memcpy(y, &all, 64);
  } else {
    for (int t = 0; t < NT; t++)
      for (int o = 0; o < NO; o++) y[t][o] = sum(acc[t][o]);
  }
}
inline f16 where(i16 mask, f16 a, f16 b) { return (f16)(((i16)a & mask) | ((i16)b & ~mask)); }

// e^x for x <= 88 to 2 ulp: 2^n * e^r with |r| <= ln2/2 and a polynomial for e^r (Cephes expf).
inline f16 exp16(f16 x) {
  x = where(x < splat(-87.f), splat(-87.f), x);
  f16 magic = splat(12582912.f), n = x * 1.44269504f + magic;
  i16 power = (i16)n << 23;
  n -= magic;
  f16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return (f16)((i16)p + power);
}

// ---- matrix products: y[t, o] = x[t, :] . w[o, :] --------------------------------------------------------------------

template <int NT, int NO>
inline void tile(const float* x, const float* w, int64_t n, float (*y)[4]) {
  f16 acc[NT][NO] = {};
  for (int64_t c = 0; c < n; c += 16) {
    f16 b[NO];
    for (int o = 0; o < NO; o++) b[o] = load(w + o * n + c);
    for (int t = 0; t < NT; t++) {
      f16 a = load(x + t * n + c);
      for (int o = 0; o < NO; o++) acc[t][o] += a * b[o];
    }
  }
  sum_tile<NT, NO>(acc, y);
}

template <int NT, int NO>
inline void tile(const bf16* x, const bf16* w, int64_t n, float (*y)[4]) {
  f16 acc[NT][NO] = {};
  int64_t c = 0;
#ifdef __AVX512BF16__
  for (; c + 32 <= n; c += 32) {
    __m512bh b[NO];
    for (int o = 0; o < NO; o++) b[o] = (__m512bh)_mm512_loadu_si512(w + o * n + c);
    for (int t = 0; t < NT; t++) {
      __m512bh a = (__m512bh)_mm512_loadu_si512(x + t * n + c);
      for (int o = 0; o < NO; o++) acc[t][o] = (f16)_mm512_dpbf16_ps((__m512)acc[t][o], a, b[o]);
    }
  }
#endif
  for (; c < n; c += 16) {
    f16 b[NO];
    for (int o = 0; o < NO; o++) b[o] = load(w + o * n + c);
    for (int t = 0; t < NT; t++) {
      f16 a = load(x + t * n + c);
      for (int o = 0; o < NO; o++) acc[t][o] += a * b[o];
    }
  }
  sum_tile<NT, NO>(acc, y);
}

// Outputs o .. o+no of all T rows, handed to `use(t, o, value)`. The weights of a tile stay in the first-level cache.
template <typename W, typename Use>
inline void columns(const W* x, const W* w, int64_t rows, int64_t n, int64_t o, int64_t no, Use use) {
  float y[4][4];
  for (int64_t t = 0; t < rows; t += 4) {
    int64_t nt = rows - t < 4 ? rows - t : 4;
    const W *xt = x + t * n, *wo = w + o * n;
    if (no == 4) switch (nt) {
        case 4: tile<4, 4>(xt, wo, n, y); break;
        case 3: tile<3, 4>(xt, wo, n, y); break;
        case 2: tile<2, 4>(xt, wo, n, y); break;
        default: tile<1, 4>(xt, wo, n, y);
      }
    else
      for (int64_t i = 0; i < nt; i++)
        for (int64_t j = 0; j < no; j++) {
          float z[1][4];
          tile<1, 1>(xt + i * n, wo + j * n, n, z);
          y[i][j] = z[0][0];
        }
    for (int64_t i = 0; i < nt; i++)
      for (int64_t j = 0; j < no; j++) use(t + i, o + j, y[i][j]);
  }
}

// Threads meet here. OpenMP's own barrier sleeps at once when the process has more OpenMP threads than cores, which it
// has as soon as two of its threads compute (a trainer's and the engine's): 25 us each, and a layer has seven.
struct Meeting {
  int arrived = 0, generation = 0;
  void wait() {
    const int mine = __atomic_load_n(&generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == omp_get_num_threads()) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_add_fetch(&generation, 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == mine; spins++)
      if (spins % 4096 == 4095) sched_yield();  // whoever is missing may need this core
  }
};

// This thread's share of [0, n) in multiples of `unit`.
struct Share {
  int64_t begin, end;
  explicit Share(int64_t n, int64_t unit = 4) {
    int64_t units = (n + unit - 1) / unit, threads = omp_get_num_threads(), id = omp_get_thread_num();
    begin = units * id / threads * unit, end = units * (id + 1) / threads * unit;
    if (end > n) end = n;
  }
};

template <typename W, typename Use>
inline void linear(const W* x, const W* w, const W* bias, int64_t rows, int64_t n, int64_t outputs, Use use) {
  Share share(outputs);
  for (int64_t o = share.begin; o < share.end; o += 4)
    columns(x, w, rows, n, o, share.end - o < 4 ? share.end - o : 4,
            [&](int64_t t, int64_t j, float v) { use(t, j, bias ? v + one(bias + j) : v); });
}

// ---- norms, rotation, attention --------------------------------------------------------------------------------------

template <typename W>
inline void rms_norm(const float* x, const W* w, int64_t n, float eps, W* out) {
  f16 squares = {};
  for (int64_t c = 0; c < n; c += 16) squares += load(x + c) * load(x + c);
  float scale = 1.f / __builtin_sqrtf(sum(squares) / n + eps);
  for (int64_t c = 0; c < n; c += 16) {
    f16 y = load(x + c) * scale * load(w + c);
    for (int i = 0; i < 16; i++) put(out + c + i, y[i]);
  }
}

template <typename W>
inline void norm_and_rotate(float* x, const W* w, int64_t d, float eps, const float* cos, const float* sin) {
  if (w) {
    f16 squares = {};
    for (int64_t c = 0; c < d; c += 16) squares += load(x + c) * load(x + c);
    float scale = 1.f / __builtin_sqrtf(sum(squares) / d + eps);
    for (int64_t c = 0; c < d; c++) x[c] *= scale * one(w + c);
  }
  int64_t half = d / 2;
  for (int64_t c = 0; c < half; c++) {
    float a = x[c], b = x[c + half];
    x[c] = a * cos[c] - b * sin[c];
    x[c + half] = b * cos[c + half] + a * sin[c + half];
  }
}

// Scores of G queries with the 16 keys of a page, [d, 16].
template <int G, typename W>
inline void page_scores(const float* q, const W* k, int64_t d, float scale, float* scores, int64_t stride) {
  f16 acc[G] = {};
  for (int64_t i = 0; i < d; i++) {
    f16 key = load(k + i * 16);
    for (int g = 0; g < G; g++) acc[g] += key * q[g * d + i];
  }
  for (int g = 0; g < G; g++) *(f16*)(scores + g * stride) = acc[g] * scale;
}

// Sixteen columns of the weighted sum of values for G queries over `tokens` tokens of pages [16, d].
template <int G, typename W>
inline void weigh_values(const float* weights, int64_t stride, const W* values, size_t page_size, const int32_t* pages,
                         int64_t first, int64_t tokens, int64_t d, int64_t column, float* out) {
  f16 acc[G] = {};
  for (int64_t j = first; j < tokens; j++) {
    f16 v = load(values + pages[j / 16] * page_size + (j % 16) * d + column);
    for (int g = 0; g < G; g++) acc[g] += v * weights[g * stride + j];
  }
  for (int g = 0; g < G; g++) *(f16*)(out + g * d + column) = acc[g];
}

// G queries of one key/value head attend over tokens [first, tokens) of their row: out [G, d].
template <int G, typename W>
void attend(const float* q, const W* keys, const W* values, size_t page_size, const int32_t* pages, int64_t first,
            int64_t tokens, int64_t d, float scale, float* scores, int64_t stride, float* out) {
  int64_t begin = first / 16, end = (tokens + 15) / 16;
  for (int64_t p = begin; p < end; p++)
    page_scores<G>(q, keys + pages[p] * page_size, d, scale, scores + p * 16, stride);
  for (int g = 0; g < G; g++) {
    float* s = scores + g * stride;
    for (int64_t j = begin * 16; j < first; j++) s[j] = -1e30f;
    for (int64_t j = tokens; j < end * 16; j++) s[j] = -1e30f;
    f16 most = splat(-1e30f);
    for (int64_t j = begin * 16; j < end * 16; j += 16) most = where(load(s + j) > most, load(s + j), most);
    float highest = most[0];
    for (int i = 1; i < 16; i++) highest = most[i] > highest ? most[i] : highest;
    f16 total = {};
    for (int64_t j = begin * 16; j < end * 16; j += 16) {
      f16 e = exp16(load(s + j) - highest);
      *(f16*)(s + j) = e;
      total += e;
    }
    float inverse = 1.f / sum(total);
    for (int64_t j = begin * 16; j < end * 16; j += 16) *(f16*)(s + j) = load(s + j) * inverse;
  }
  for (int64_t column = 0; column < d; column += 16)
    weigh_values<G>(scores, stride, values, page_size, pages, first, tokens, d, column, out);
}

template <typename W>
void attend_all(int64_t group, const float* q, const W* keys, const W* values, size_t page_size, const int32_t* pages,
                int64_t first, int64_t tokens, int64_t d, float scale, float* scores, int64_t stride, float* out) {
  for (int64_t g = 0; g < group; g += 4) {
    auto run = [&](auto attend_group) {
      attend_group(q + g * d, keys, values, page_size, pages, first, tokens, d, scale, scores, stride, out + g * d);
    };
    switch (group - g < 4 ? group - g : 4) {
      case 4: run(attend<4, W>); break;
      case 3: run(attend<3, W>); break;
      case 2: run(attend<2, W>); break;
      default: run(attend<1, W>);
    }
  }
}

struct Layer {  // as model_runner lays it out: addresses, 0 where absent, and the window (0 = none)
  uint64_t input_norm, q, k, v, o, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, post_norm, gate, up, down, keys, values;
  int64_t window;
};

struct Model {
  int64_t num_layers, hidden, heads, kv_heads, head_dim, intermediate, vocab_size, num_threads;
  uint64_t layers, embedding, final_norm, head, cos, sin;
  double eps, scale;
};

template <typename W>
void decode(const Model& m, int64_t rows, const int64_t* tokens, const int64_t* positions, const int32_t* page_table,
            int64_t max_pages, const int64_t* table_rows, float* logits, float* scratch) {
  const int64_t C = m.hidden, H = m.heads, K = m.kv_heads, d = m.head_dim, I = m.intermediate, G = H / K;
  const int64_t wide = H * d > I ? (H * d > C ? H * d : C) : (I > C ? I : C), stride = max_pages * 16;
  const size_t page_size = (size_t)K * d * 16;
  float* x = scratch;                 // [D, C] the residual stream
  float* q = x + rows * C;            // [D, H*d]
  float* kv = q + rows * H * d;       // [D, 2*K*d]
  W* h = (W*)(kv + rows * 2 * K * d); // [D, wide] input of the next matrix product
  W* h2 = h + rows * wide;            // [D, wide]
  float* all_scores = (float*)(h2 + rows * wide);  // [threads, 4, stride], then [threads, G*d]
  const Layer* layers = (const Layer*)m.layers;
  const float eps = (float)m.eps;

  Meeting meeting;
#pragma omp parallel num_threads((int)m.num_threads)
  {
    const Share mine(rows, 1), pairs(rows * K, 1), columns_of_gate(I);
    float* scores = all_scores + omp_get_thread_num() * (4 * stride + G * d);
    float* attended = scores + 4 * stride;
    for (int64_t t = mine.begin; t < mine.end; t++) {
      const W* e = (const W*)m.embedding + tokens[t] * C;
      for (int64_t c = 0; c < C; c += 16) *(f16*)(x + t * C + c) = load(e + c);
      rms_norm(x + t * C, (const W*)layers[0].input_norm, C, eps, h + t * C);
    }
    meeting.wait();
    for (int64_t l = 0; l < m.num_layers; l++) {
      const Layer& L = layers[l];
      linear((const W*)h, (const W*)L.q, (const W*)L.q_bias, rows, C, H * d,
             [&](int64_t t, int64_t o, float v) { q[t * H * d + o] = v; });
      linear((const W*)h, (const W*)L.k, (const W*)L.k_bias, rows, C, K * d,
             [&](int64_t t, int64_t o, float v) { kv[t * 2 * K * d + o] = v; });
      linear((const W*)h, (const W*)L.v, (const W*)L.v_bias, rows, C, K * d,
             [&](int64_t t, int64_t o, float v) { kv[t * 2 * K * d + K * d + o] = v; });
      meeting.wait();
      for (int64_t task = pairs.begin; task < pairs.end; task++) {
        const int64_t t = task / K, head = task % K, position = positions[t];
        const float *cos = (const float*)m.cos + position * d, *sin = (const float*)m.sin + position * d;
        const int32_t* pages = page_table + table_rows[t] * max_pages;
        const size_t place = pages[position / 16] * page_size + head * d * 16;
        float *key = kv + t * 2 * K * d + head * d, *value = key + K * d, *query = q + (t * H + head * G) * d;
        norm_and_rotate(key, (const W*)L.k_norm, d, eps, cos, sin);
        for (int64_t g = 0; g < G; g++) norm_and_rotate(query + g * d, (const W*)L.q_norm, d, eps, cos, sin);
        for (int64_t i = 0; i < d; i++) {
          put((W*)L.keys + place + i * 16 + position % 16, key[i]);
          put((W*)L.values + place + (position % 16) * d + i, value[i]);
        }
        const int64_t first = L.window && position + 1 > L.window ? position + 1 - L.window : 0;
        attend_all(G, query, (const W*)L.keys + head * d * 16, (const W*)L.values + head * d * 16, page_size, pages,
                   first, position + 1, d, (float)m.scale, scores, stride, attended);
        for (int64_t i = 0; i < G * d; i++) put(h2 + (t * H + head * G) * d + i, attended[i]);
      }
      meeting.wait();
      linear((const W*)h2, (const W*)L.o, (const W*)L.o_bias, rows, H * d, C,
             [&](int64_t t, int64_t o, float v) { x[t * C + o] += v; });
      meeting.wait();
      for (int64_t t = mine.begin; t < mine.end; t++)
        rms_norm(x + t * C, (const W*)L.post_norm, C, eps, h + t * C);
      meeting.wait();
      for (int64_t o = columns_of_gate.begin; o < columns_of_gate.end; o += 4) {
        const int64_t no = columns_of_gate.end - o < 4 ? columns_of_gate.end - o : 4;
        // Gates and ups of four columns wait in this thread's own memory, to be joined sixteen at a time.
        float *gates = scores, *ups = scores + 2 * stride;
        for (int64_t t0 = 0; t0 < rows; t0 += stride / 2) {
          const int64_t n = rows - t0 < stride / 2 ? rows - t0 : stride / 2;
          const W* some = (const W*)h + t0 * C;
          columns(some, (const W*)L.gate, n, C, o, no, [&](int64_t t, int64_t j, float v) { gates[t * 4 + j - o] = v; });
          columns(some, (const W*)L.up, n, C, o, no, [&](int64_t t, int64_t j, float v) { ups[t * 4 + j - o] = v; });
          for (int64_t i = 0; i < n * 4; i += 16) {
            const f16 g = load(gates + i), bounded = where(g < splat(-80.f), splat(-80.f), g);
            *(f16*)(ups + i) = g / (splat(1.f) + exp16(-bounded)) * load(ups + i);
          }
          for (int64_t t = 0; t < n; t++)
            for (int64_t j = 0; j < no; j++) put(h2 + (t0 + t) * I + o + j, ups[t * 4 + j]);
        }
      }
      meeting.wait();
      linear((const W*)h2, (const W*)L.down, (const W*)nullptr, rows, I, C,
             [&](int64_t t, int64_t o, float v) { x[t * C + o] += v; });
      meeting.wait();
      const W* next = (const W*)(l + 1 < m.num_layers ? layers[l + 1].input_norm : m.final_norm);
      for (int64_t t = mine.begin; t < mine.end; t++) rms_norm(x + t * C, next, C, eps, h + t * C);
      meeting.wait();
    }
    linear((const W*)h, (const W*)m.head, (const W*)nullptr, rows, C, m.vocab_size,
           [&](int64_t t, int64_t o, float v) { logits[t * m.vocab_size + o] = v; });
  }
}

// e^(x*inverse_temperature - most) of a row into `out`, and their sum; lanes beyond V count nothing.
double exponentials(const float* x, int64_t V, float inverse_temperature, float most, float* out) {
  double total = 0;
  int64_t v = 0;
  for (; v + 16 <= V; v += 16) {
    const f16 z = load(x + v) * inverse_temperature - most, e = where(z < splat(-87.f), f16{}, exp16(z));
    *(f16*)(out + v) = e;
    total += sum(e);
  }
  for (; v < V; v++) {
    const float z = x[v] * inverse_temperature - most;
    out[v] = z < -87.f ? 0 : exp16(splat(z))[0];
    total += out[v];
  }
  return total;
}

int64_t argmax(const float* x, int64_t V) {
  f16 most = splat(-__builtin_inff());
  int64_t v = 0, best = 0;
  for (; v + 16 <= V; v += 16) most = where(load(x + v) > most, load(x + v), most);
  float highest = v ? most[0] : x[0];
  for (int i = 1; v && i < 16; i++) highest = most[i] > highest ? most[i] : highest;
  for (; v < V; v++) highest = x[v] > highest ? x[v] : highest;
  while (best < V - 1 && x[best] != highest) best++;
  return best;
}

// The first token at which the running sum of `weights` exceeds u times their sum `total`, 0 <= u < 1.
int64_t inverse_cdf(const float* weights, int64_t V, double total, float u) {
  const double target = u * total;
  double before = 0;
  int64_t v = 0, last = 0;
  for (; v + 16 <= V; v += 16) {
    const double after = before + sum(load(weights + v));
    if (after > target) break;
    before = after;
  }
  for (; v < V; v++) {
    if (weights[v] > 0) last = v;  // rounding within a block may leave the target just out of reach
    before += weights[v];
    if (before > target && weights[v] > 0) return v;
  }
  return last;
}

}  // namespace

// One token for each of D rows of logits [D, V] from its full distribution, with its log-probs at the row's temperature
// and at 1. `inverse_temperatures` and `greedy` may be null (1 and false); `scratch` is [threads, V].
extern "C" void sample_rows(const float* logits, int64_t rows, int64_t V, const float* inverse_temperatures,
                            const uint8_t* greedy, const float* uniforms, int64_t* ids, float* log_probs,
                            float* raw_log_probs, float* scratch, int64_t threads) {
#pragma omp parallel num_threads((int)threads)
  {
    float* weights = scratch + omp_get_thread_num() * V;
    for (Share mine(rows, 1); mine.begin < mine.end; mine.begin++) {
      const int64_t t = mine.begin;
      const float *x = logits + t * V, temper = inverse_temperatures ? inverse_temperatures[t] : 1.f;
      const int64_t best = argmax(x, V);
      const double total = exponentials(x, V, temper, x[best] * temper, weights);
      const int64_t id = ids[t] = greedy && greedy[t] ? best : inverse_cdf(weights, V, total, uniforms[t]);
      log_probs[t] = (float)((double)(x[id] * temper) - x[best] * temper - __builtin_log(total));
      raw_log_probs[t] = log_probs[t];
      if (temper != 1.f)
        raw_log_probs[t] = (float)((double)x[id] - x[best] - __builtin_log(exponentials(x, V, 1.f, x[best], weights)));
    }
  }
}

extern "C" void decode_float32(const Model* m, int64_t rows, const int64_t* tokens, const int64_t* positions,
                               const int32_t* page_table, int64_t max_pages, const int64_t* table_rows, float* logits,
                               float* scratch) {
  decode<float>(*m, rows, tokens, positions, page_table, max_pages, table_rows, logits, scratch);
}

extern "C" void decode_bfloat16(const Model* m, int64_t rows, const int64_t* tokens, const int64_t* positions,
                                const int32_t* page_table, int64_t max_pages, const int64_t* table_rows, float* logits,
                                float* scratch) {
  decode<bf16>(*m, rows, tokens, positions, page_table, max_pages, table_rows, logits, scratch);
}
