// One step of a Llama-shaped model in one call: tokens that decode and tokens of prompts, each over the paged cache.
//
// Every number is computed in an order that depends on nothing but the token's own text: not on how many tokens share
// the step, on how a prompt is cut into chunks, or on the number of threads. So logits are bitwise the same in any
// company. Weights, keys and values are float or bfloat16, everything between is float.
// Shapes: T tokens, C hidden width, H query heads, K key/value heads, d head width, G = H/K, I feed-forward width,
// V vocabulary, 16 tokens a page. C, d, I must be multiples of 16. A word is 32 bits of a matrix: a float, or two
// neighboring bfloat16.

#include <limits.h>
#include <linux/futex.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vectors.h"

namespace {

// ---- matrix products: y[t, o] = x[t, :] . w[o, :] --------------------------------------------------------------------
//
// A sum runs over the words of a row from first to last, one after the other, whichever way it is computed:
// few tokens: the weights of sixteen outputs are transposed in registers, a lane is an output; memory is the limit.
// many tokens: the inputs of sixteen tokens lie transposed ("packed": [T/16][words][16 tokens]), a lane is a token, and
//              weights are read as they are, a word at a time for all lanes. Nothing is ever summed across lanes.

constexpr int64_t FEW = 8;

template <typename W>
inline constexpr int64_t elements = 4 / sizeof(W);  // of a word

inline f16 multiply_add(f16 acc, u16 a, u16 b, float) { return acc + (f16)a * (f16)b; }
inline f16 multiply_add(f16 acc, u16 a, u16 b, bf16) {
#ifdef __AVX512BF16__
  return (f16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  acc += (f16)(a << 16) * (f16)(b << 16);
  return acc + (f16)(a & 0xffff0000) * (f16)(b & 0xffff0000);
#endif
}

// Sixteen outputs of up to FEW tokens, x [NT, words], w [16, words]: y[t] holds the outputs of token t.
template <typename W, int NT>
inline void few_tokens(const uint32_t* x, const uint32_t* w, int64_t words, f16* y) {
  f16 acc[NT] = {};
  u16 m[16];
  int64_t u = 0;
  for (; u + 16 <= words; u += 16) {
    for (int i = 0; i < 16; i++) {
      m[i] = *(const u16*)(w + i * words + u);
      __builtin_prefetch(w + 16 * words + 16 * (u + i), 0, 2);  // the next sixteen outputs, in the order of memory
    }
    transpose16(m);
    for (int j = 0; j < 16; j++)
      for (int t = 0; t < NT; t++) acc[t] = multiply_add(acc[t], u16{} + x[t * words + u + j], m[j], W());
  }
  if (u < words) {  // eight words are left
    for (int i = 0; i < 16; i++) {
      m[i] = u16{};
      memcpy(&m[i], w + i * words + u, 32);
    }
    transpose16(m);
    for (int j = 0; j < 8; j++)
      for (int t = 0; t < NT; t++) acc[t] = multiply_add(acc[t], u16{} + x[t * words + u + j], m[j], W());
  }
  for (int t = 0; t < NT; t++) y[t] = acc[t];
}

// NO outputs of NB * 16 tokens, x packed, w [NO, words]: y[o][b] holds an output of sixteen tokens.
template <typename W, int NB, int NO>
inline void many_tokens(const u16* x, const uint32_t* w, int64_t words, f16 (*y)[4]) {
  f16 acc[NO][NB] = {};
  for (int64_t u0 = 0; u0 < words; u0 += 16) {
    for (int o = 0; o < NO; o++) __builtin_prefetch(w + NO * (words + u0) + 16 * o, 0, 2);  // the next outputs
    for (int64_t u = u0; u < words && u < u0 + 16; u++) {
      u16 a[NB];
      for (int b = 0; b < NB; b++) a[b] = x[b * words + u];
      for (int o = 0; o < NO; o++) {
        const u16 c = u16{} + w[o * words + u];
        for (int b = 0; b < NB; b++) acc[o][b] = multiply_add(acc[o][b], a[b], c, W());
      }
    }
  }
  for (int o = 0; o < NO; o++)
    for (int b = 0; b < NB; b++) y[o][b] = acc[o][b];
}

template <typename W>
inline void many_tokens(int64_t blocks, const u16* x, const uint32_t* w, int64_t words, f16 (*y)[4]) {
  switch (blocks) {
    case 4:
      many_tokens<W, 4, 6>(x, w, words, y);
      many_tokens<W, 4, 6>(x, w + 6 * words, words, y + 6);
      return many_tokens<W, 4, 4>(x, w + 12 * words, words, y + 12);
    case 3:
      many_tokens<W, 3, 8>(x, w, words, y);
      return many_tokens<W, 3, 8>(x, w + 8 * words, words, y + 8);
    case 2:
      many_tokens<W, 2, 8>(x, w, words, y);
      return many_tokens<W, 2, 8>(x, w + 8 * words, words, y + 8);
    default:
      many_tokens<W, 1, 8>(x, w, words, y);
      many_tokens<W, 1, 8>(x, w + 8 * words, words, y + 8);
  }
}

// The inputs of a matrix product: rows [T, width] if tokens are few, packed if they are many.
template <typename W>
struct Inputs {
  uint32_t* words;
  int64_t tokens, width;
  bool few() const { return tokens <= FEW; }
  int64_t num_words() const { return width / elements<W>; }
};

struct Tokens {
  int64_t first, end;
};

// Outputs [o, o + 16) of w [outputs, width] for some tokens, handed to `use(to, v)`, `to` being `place(t)` of a token; those
// beyond the last output are arbitrary. Where tokens are many the first is a multiple of 16.
template <typename W, typename Place, typename Use>
inline void sixteen_outputs(const Inputs<W>& x, Tokens of, const W* weights, int64_t o, int64_t outputs, uint32_t* tail,
                            Place place, Use use) {
  const int64_t words = x.num_words();
  const uint32_t* w = (const uint32_t*)weights + o * words;
  if (o + 16 > outputs) {  // rows beyond the last would lie outside the matrix
    memcpy(tail, w, (outputs - o) * words * 4);
    w = tail;
  }
  if (x.few()) {
    f16 y[FEW];
    switch (x.tokens) {
#define CASE(n) case n: few_tokens<W, n>(x.words, w, words, y); break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
    for (int64_t t = 0; t < x.tokens; t++) use(place(t), y[t]);
    return;
  }
  f16 y[16][4];
  for (int64_t t0 = of.first; t0 < of.end; t0 += 64) {
    const int64_t blocks = (of.end - t0 + 15) / 16;
    for (int64_t t = t0; t < t0 + 64 && t < of.end; t++) __builtin_prefetch((const void*)place(t), 1);  // written many cycles from now
    many_tokens<W>(blocks < 4 ? blocks : 4, (const u16*)x.words + t0 / 16 * words, w, words, y);
    for (int64_t b = 0; b < 4 && t0 + b * 16 < of.end; b++) {
      f16 v[16];
      for (int i = 0; i < 16; i++) v[i] = y[i][b];
      transpose16(v);
      for (int64_t t = t0 + b * 16, i = 0; i < 16 && t < of.end; i++, t++) use(place(t), v[i]);
    }
  }
}

// ---- threads ---------------------------------------------------------------------------------------------------------

// Threads meet here. OpenMP's own barrier sleeps at once when the process has more OpenMP threads than cores, which it
// has as soon as two of its threads compute (a trainer's and the engine's): 25 us each, and a layer has seven. Whoever
// waits spins for about as long as a piece of work takes, then sleeps: on a busy machine those it waits for need a core.
// If that happens again and again the machine has no core to spare, and the first thread goes on alone.
struct Team {
  int size, patience, arrived = 0, generation = 0, sleepers = 0, long_waits = 0;

  // False: the first thread does the rest, this one is done.
  bool meet(int id) {
    const int mine = __atomic_load_n(&generation, __ATOMIC_ACQUIRE), here = size;
    if (here == 1) return id == 0;
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == here) {
      arrived = 0;
      if (__atomic_load_n(&long_waits, __ATOMIC_RELAXED) > 3) size = 1;
      __atomic_add_fetch(&generation, 1, __ATOMIC_SEQ_CST);
      if (__atomic_load_n(&sleepers, __ATOMIC_SEQ_CST)) syscall(SYS_futex, &generation, FUTEX_WAKE_PRIVATE, INT_MAX);
      return size > 1 || id == 0;
    }
    for (int spins = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == mine; spins++) {
      if (spins < patience) {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
        continue;
      }
      if (spins == patience) __atomic_add_fetch(&long_waits, 1, __ATOMIC_RELAXED);
      __atomic_add_fetch(&sleepers, 1, __ATOMIC_SEQ_CST);
      syscall(SYS_futex, &generation, FUTEX_WAIT_PRIVATE, mine, nullptr);
      __atomic_add_fetch(&sleepers, -1, __ATOMIC_SEQ_CST);
    }
    return size > 1 || id == 0;
  }
};

// Pieces [0, n) of work, shared out beforehand: each thread then finds the same weights in its own cache at every step.
template <typename Use>
inline void shared_out(const Team& team, int id, int64_t n, Use use) {
  for (int64_t i = n * id / team.size, end = n * (id + 1) / team.size; i < end; i++) use(i);
}

// The units, of sixteen outputs each, of a matrix product for all tokens: use(unit, tokens). A thread takes tokens of its own
// from one product to the next, for what another core has written is far away: on machines of many parts it may cost
// more than the product. Only where sixteen tokens are left for two threads do they share out the outputs.
template <typename Use>
inline void share_product(const Team& team, int id, int64_t tokens, int64_t units, Use use) {
  const int64_t blocks = tokens <= FEW ? 1 : (tokens + 15) / 16, n = blocks * units;
  for (int64_t i = n * id / team.size, end = n * (id + 1) / team.size; i < end;) {
    const int64_t block = i / units, first = i % units, left = end - i;
    // Up to eight whole blocks at once: their inputs stay in the cache while the weights pass by.
    const int64_t whole = first || left < units ? 0 : left / units < 8 ? left / units : 8;
    const int64_t stop = whole || first + left > units ? units : first + left, after = (block + (whole ? whole : 1)) * 16;
    const Tokens of{block * 16, after < tokens ? after : tokens};
    for (int64_t unit = first; unit < stop; unit++) use(unit, of);
    i += whole ? whole * units : stop - first;
  }
}

// ---- norms, rotation, attention --------------------------------------------------------------------------------------

inline float norm_scale(const float* x, int64_t n, float eps) {
  f16 squares = {};
  for (int64_t c = 0; c < n; c += 16) squares += load(x + c) * load(x + c);
  return 1.f / __builtin_sqrtf(sum(squares) / n + eps);
}

// Sixteen channels of sixteen tokens, v[channel], into packed inputs.
template <typename W>
inline void pack(const f16* v, uint32_t* to) {
  for (int i = 0; i < 16 / elements<W>; i++) {
    u16 word = (u16)v[i];
    if (elements<W> == 2)
      word = __builtin_convertvector(rounded(v[2 * i]), u16) | __builtin_convertvector(rounded(v[2 * i + 1]), u16) << 16;
    *(u16*)(to + i * 16) = word;
  }
}

// Rows [t, t + 16) of a matrix [T, width] into packed inputs.
template <typename W>
inline void pack_rows(const W* rows, int64_t t, const Inputs<W>& out) {
  const int64_t words = out.num_words();
  uint32_t* to = out.words + t / 16 * words * 16;
  for (int64_t u = 0; u < words; u += 16) {
    const int64_t n = words - u < 16 ? words - u : 16;
    u16 v[16] = {};
    for (int i = 0; i < 16 && t + i < out.tokens; i++) memcpy(&v[i], (const uint32_t*)rows + (t + i) * words + u, n * 4);
    transpose16(v);
    for (int i = 0; i < n; i++) *(u16*)(to + (u + i) * 16) = v[i];
  }
}

// RMS norm of tokens [t, end), x(t) being where one lies, into the inputs of a matrix product.
template <typename W, typename X>
inline void norm(X x, int64_t t, int64_t end, const W* w, float eps, const Inputs<W>& out) {
  const int64_t C = out.width, t0 = t;
  float scales[16];
  for (; t < end; t++) scales[t - t0] = norm_scale(x(t), C, eps);
  if (out.few()) {
    for (t = t0; t < end; t++)
      for (int64_t c = 0; c < C; c += 16)
          put((W*)out.words + t * C + c, load(x(t) + c) * scales[t - t0] * load(w + c));
    return;
  }
  uint32_t* to = out.words + t0 / 16 * out.num_words() * 16;
  for (int64_t c = 0; c < C; c += 16) {
    f16 v[16];
    for (int i = 0; i < 16; i++) v[i] = t0 + i < end ? load(x(t0 + i) + c) * scales[i] : f16{};
    transpose16(v);
    for (int i = 0; i < 16; i++) v[i] *= one(w + c + i);
    pack<W>(v, to + c / elements<W> * 16);
  }
}

template <typename W>
inline void norm_and_rotate(float* x, const W* w, int64_t d, float eps, const float* cos, const float* sin) {
  if (w) {
    const float scale = norm_scale(x, d, eps);
    for (int64_t c = 0; c < d; c++) x[c] *= scale * one(w + c);
  }
  int64_t half = d / 2;
  for (int64_t c = 0; c < half; c++) {
    float a = x[c], b = x[c + half];
    x[c] = a * cos[c] - b * sin[c];
    x[c + half] = b * cos[c + half] + a * sin[c + half];
  }
}

// A query and the tokens [first, end) of its row that it attends to.
struct Query {
  const float* q;
  int64_t first, end;
};

// Keys and values of one head in the pages of one row, page p at keys + pages[p] * page_size.
template <typename W>
struct Cached {
  const W *keys, *values;
  const int32_t* pages;
};

// Scores of N queries with the keys of NP pages from page p on, [d, 16] each; pages of `next` are on their way meanwhile.
template <int N, int NP, typename W>
inline void page_scores(const Query* queries, const Cached<W>& cached, const Cached<W>& next, int64_t p, size_t page_size,
                        int64_t d, float scale, float* scores, int64_t stride) {
  f16 acc[NP][N] = {};
  const W *k[NP], *k_next[NP];
  const float* q[N];
  for (int i = 0; i < NP; i++) {
    k[i] = cached.keys + cached.pages[p + i] * page_size;
    k_next[i] = next.keys + next.pages[p + i] * page_size;
  }
  for (int n = 0; n < N; n++) q[n] = queries[n].q;
  for (int64_t i = 0; i < d; i++)
    for (int j = 0; j < NP; j++) {
      if (sizeof(W) == 4 || i % 2 == 0) __builtin_prefetch(k_next[j] + i * 16, 0, 2);
      const f16 key = load(k[j] + i * 16);
      for (int n = 0; n < N; n++) acc[j][n] += key * q[n][i];
    }
  for (int j = 0; j < NP; j++)
    for (int n = 0; n < N; n++) *(f16*)(scores + n * stride + (p + j) * 16) = acc[j][n] * scale;
}

// NC times sixteen columns of the weighted sums of values over tokens [first, end) of pages [16, d]: the sum over tokens
// in even places and that over those in odd ones, times a factor a query.
template <int N, int NC, typename W>
inline void weigh_values(const float* weights, int64_t stride, const Cached<W>& cached, const Cached<W>& next,
                         size_t page_size, int64_t first, int64_t end, int64_t d, int64_t column, const float* factors,
                         float* out) {
  f16 acc[2][N][NC] = {};
  auto add = [&](const W* v, ptrdiff_t ahead, int64_t j, int odd) {
    __builtin_prefetch(v + ahead, 0, 2);
    f16 value[NC];
    for (int c = 0; c < NC; c++) value[c] = load(v + c * 16);
    for (int n = 0; n < N; n++)
      for (int c = 0; c < NC; c++) acc[odd][n][c] += value[c] * weights[n * stride + j];
  };
  for (int64_t j = first; j < end;) {
    const W* v = cached.values + cached.pages[j / 16] * page_size + column;
    const ptrdiff_t ahead = next.values + next.pages[j / 16] * page_size + column - v;
    const int64_t stop = j / 16 * 16 + 16 < end ? j / 16 * 16 + 16 : end;
    if (j % 2) add(v + j % 16 * d, ahead, j, 1), j++;
    for (; j + 2 <= stop; j += 2) add(v + j % 16 * d, ahead, j, 0), add(v + (j % 16 + 1) * d, ahead, j + 1, 1);
    if (j < stop) add(v + j % 16 * d, ahead, j, 0), j++;
  }
  for (int n = 0; n < N; n++)
    for (int c = 0; c < NC; c++) *(f16*)(out + n * d + column + c * 16) = (acc[0][n][c] + acc[1][n][c]) * factors[n];
}

// N queries of one row and key/value head: out [N, d]. What a query does not attend to has weight 0, which changes no
// bit of a sum. Meanwhile the keys and values that `next` names are on their way from the memory.
template <int N, typename W>
void attend(const Query* queries, const Cached<W>& cached, const Cached<W>& next, size_t page_size, int64_t d, float scale,
            float* scores, int64_t stride, float* out) {
  int64_t first = queries[0].first, last = queries[0].end;
  for (int n = 1; n < N; n++) {
    if (queries[n].first < first) first = queries[n].first;
    if (queries[n].end > last) last = queries[n].end;
  }
  const int64_t begin = first / 16, end = (last + 15) / 16;
  constexpr int NP = N <= 2 ? 4 : 1, NC = N <= 2 ? 2 : 1;
  int64_t p = begin;
  for (; p + NP <= end; p += NP)
    page_scores<N, NP>(queries, cached, next, p, page_size, d, scale, scores, stride);
  for (; p < end; p++) page_scores<N, 1>(queries, cached, next, p, page_size, d, scale, scores, stride);
  float factors[N];
  for (int n = 0; n < N; n++) {
    float* s = scores + n * stride;
    for (int64_t j = begin * 16; j < queries[n].first; j++) s[j] = -1e30f;
    for (int64_t j = queries[n].end; j < end * 16; j++) s[j] = -1e30f;
    f16 most = splat(-1e30f), total = {};
    for (int64_t j = begin * 16; j < end * 16; j += 16) most = where(load(s + j) > most, load(s + j), most);
    const float top = highest_of(most);
    for (int64_t j = begin * 16; j < end * 16; j += 16) {
      const f16 score = load(s + j), e = where(score > splat(-1e29f), exp16(score - top), f16{});
      *(f16*)(s + j) = e;
      total += e;
    }
    factors[n] = 1.f / sum(total);
  }
  int64_t column = 0;
  for (; column + NC * 16 <= d; column += NC * 16)
    weigh_values<N, NC>(scores, stride, cached, next, page_size, first, last, d, column, factors, out);
  if (column < d) weigh_values<N, 1>(scores, stride, cached, next, page_size, first, last, d, column, factors, out);
}

// ---- sampling --------------------------------------------------------------------------------------------------------

constexpr int64_t TOGETHER_SUMMED = 256;  // neighboring weights that have a sum of their own

// e^(x*inverse_temperature - most) of a row into `out`, sums of neighbors into `sums`, and the sum of all.
double exponentials(const float* x, int64_t V, float inverse_temperature, float most, float* out, float* sums) {
  double total = 0;
  for (int64_t v = 0; v < V; total += *sums++) {
    const int64_t end = v + TOGETHER_SUMMED < V ? v + TOGETHER_SUMMED : V;
    f16 lanes = {};
    for (; v + 16 <= end; v += 16) {
      const f16 z = load(x + v) * inverse_temperature - most, e = where(z < splat(-87.f), f16{}, exp16(z));
      *(f16*)(out + v) = e;
      lanes += e;
    }
    *sums = sum(lanes);
    for (; v < end; v++) {
      const float z = x[v] * inverse_temperature - most;
      out[v] = z < -87.f ? 0 : exp16(splat(z))[0];
      *sums += out[v];
    }
  }
  return total;
}

float highest(const float* x, int64_t V) {
  f16 most = splat(-__builtin_inff());
  int64_t v = 0;
  for (; v + 16 <= V; v += 16) most = where(load(x + v) > most, load(x + v), most);
  float highest = v ? highest_of(most) : x[0];
  for (; v < V; v++) highest = x[v] > highest ? x[v] : highest;
  return highest;
}

int64_t find(const float* x, int64_t V, float value) {
  int64_t v = 0;
  while (v < V - 1 && x[v] != value) v++;
  return v;
}

// The first token at which the running sum of `weights` exceeds u times their sum `total`, 0 <= u < 1.
int64_t inverse_cdf(const float* weights, const float* sums, int64_t V, double total, float u) {
  const double target = u * total;
  double before = 0;
  int64_t v = 0, last = 0;
  for (; v + TOGETHER_SUMMED <= V && before + *sums <= target; v += TOGETHER_SUMMED) before += *sums++;
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

struct Sampled {
  int64_t id;
  float log_prob, raw_log_prob;  // at the row's temperature and at 1
};

// A token from the full distribution of logits x [V]; `scratch` is [2 * V].
Sampled sample_row(const float* x, int64_t V, float inverse_temperature, bool greedy, float uniform, float* scratch) {
  const float most = highest(x, V);
  float* sums = scratch + V;
  const double total = exponentials(x, V, inverse_temperature, most * inverse_temperature, scratch, sums);
  const int64_t id = greedy ? find(x, V, most) : inverse_cdf(scratch, sums, V, total, uniform);
  const double log_prob = (double)(x[id] * inverse_temperature) - most * inverse_temperature - __builtin_log(total);
  if (inverse_temperature == 1.f) return {id, (float)log_prob, (float)log_prob};
  const double raw_total = exponentials(x, V, 1.f, most, scratch, sums);
  return {id, (float)log_prob, (float)((double)x[id] - most - __builtin_log(raw_total))};
}

// The engine's rows, as sequences.Rows has them.
struct RowStates {
  int64_t longest, num_stop_ids;  // the widths of [R, longest] and of `stop_ids`
  int32_t* tokens;                // [R, longest], as are the log-probs
  float *log_probs, *raw_log_probs;
  int64_t *num_prompt, *num_tokens, *num_computed, *max_length;
  uint64_t* random_start;
  int64_t* stop_ids;
  float* temperature;
  uint8_t *greedy, *watched;
};

enum : uint8_t { STOPPED = 1, FULL = 2, BROKEN = 4, WATCHED = 8 };  // as sequences.py has them

// The same as random_numbers.uniforms.
inline float uniform(uint64_t start, int64_t position) {
  uint64_t x = start + (uint64_t)(position + 1) * 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return (float)((x ^ (x >> 31)) >> 40) * 0x1p-24f;
}

// A row that decodes gets its token; gives what that makes of the row.
uint8_t append_token(const RowStates& s, int64_t row, const float* x, int64_t V, float* scratch) {
  const int64_t end = s.num_tokens[row]++, place = row * s.longest + end;
  const float u = uniform(s.random_start[row], end - s.num_prompt[row]);
  const Sampled got = sample_row(x, V, 1.f / s.temperature[row], s.greedy[row], u, scratch);
  s.num_computed[row]++;
  s.tokens[place] = (int32_t)got.id, s.log_probs[place] = got.log_prob, s.raw_log_probs[place] = got.raw_log_prob;
  uint8_t flags = s.watched[row] ? WATCHED : 0;
  for (int64_t i = 0; i < s.num_stop_ids; i++)
    if (s.stop_ids[row * s.num_stop_ids + i] == got.id) flags |= STOPPED;
  if (end + 1 >= s.max_length[row]) flags |= FULL;
  if (got.raw_log_prob != got.raw_log_prob) flags |= BROKEN;
  return flags;
}

// ---- the step --------------------------------------------------------------------------------------------------------

struct Layer {  // as model_runner lays it out: addresses, 0 where absent, and the window (0 = none)
  uint64_t input_norm, q, k, v, o, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, post_norm, gate, up, down, keys, values;
  int64_t window;
};

struct Model {
  int64_t num_layers, hidden, heads, kv_heads, head_dim, intermediate, vocab_size, num_threads, long_waits;
  uint64_t layers, embedding, final_norm, head, cos, sin;
  double eps, scale;
};

constexpr int64_t TOGETHER = 8;  // queries that attend at once, and tokens of a row whose queries do

struct Run {  // tokens [first, first + count) of the step follow one another in one row
  int32_t first, count;
};

// The memory that a step works in; every part begins on a cache line.
struct Scratch {
  char* at;
  template <typename T>
  T* take(int64_t count) {
    char* here = at;
    at += (count * sizeof(T) + 63) / 64 * 64;
    return (T*)here;
  }
};

struct Places {
  float *x, *q, *kv;           // [T, C], [T, H*d], [T, 2*K*d]
  uint32_t* a;                 // [T, H*d] words at most, what attention gives
  uint32_t *h, *h2, *outputs;  // inputs of matrix products
  Run* runs;                   // [T]
  float* last_x;               // [B, C], the outputs alone; likewise
  int64_t *last_positions, *last_rows;
  Run* last_runs;
  int64_t *tokens, *positions, *all;  // [T], of rows that decode
  struct Own {                 // of each thread
    uint32_t *h, *tail;
    float *scores, *attended, *weights;
  } own;
  Places(const Model& m, int64_t T, int64_t B, int64_t max_pages, Scratch& scratch, int thread) {
    const int64_t Hd = m.heads * m.head_dim, Kd = m.kv_heads * m.head_dim, T16 = (T + 15) / 16 * 16;
    int64_t wide = Hd > m.intermediate ? Hd : m.intermediate;
    if (m.hidden > wide) wide = m.hidden;
    x = scratch.take<float>(T * m.hidden), q = scratch.take<float>(T * Hd), kv = scratch.take<float>(T * 2 * Kd);
    a = scratch.take<uint32_t>(T16 * Hd);
    h = scratch.take<uint32_t>(T16 * m.hidden), h2 = scratch.take<uint32_t>(T16 * wide);
    outputs = scratch.take<uint32_t>((B + 15) / 16 * 16 * m.hidden);
    runs = scratch.take<Run>(T);
    last_x = scratch.take<float>(B * m.hidden), last_runs = scratch.take<Run>(B);
    last_positions = scratch.take<int64_t>(B), last_rows = scratch.take<int64_t>(B);
    tokens = scratch.take<int64_t>(T), positions = scratch.take<int64_t>(T), all = scratch.take<int64_t>(T);
    for (int i = 0; i <= thread; i++) {
      own.h = scratch.take<uint32_t>(FEW * m.hidden), own.tail = scratch.take<uint32_t>(16 * m.hidden);
      own.scores = scratch.take<float>(TOGETHER * max_pages * 16);
      own.attended = scratch.take<float>(TOGETHER * m.head_dim), own.weights = scratch.take<float>(2 * m.vocab_size);
    }
  }
};

// Tokens that attend: where they stand and what their runs are.
struct Queries {
  const int64_t *positions, *rows;
  const Run* runs;
  int64_t num_runs;
};

template <typename W>
struct Step {
  const Model& m;
  const int64_t T, *tokens, *positions, *rows;
  const int32_t* page_table;
  const int64_t max_pages, B, *outputs;
  float* logits;
  char* memory;
  const RowStates* states = nullptr;  // of rows that all decode, and are to get their tokens; what that makes of them
  uint8_t* flags = nullptr;
  bool chunks = false;  // whether some tokens attend to others of the same step
  Queries all{}, last{};  // of every token; of the outputs, which are all that the last layer need go on with

  void run() {
    Scratch scratch{memory};
    const Places places(m, T, B, max_pages, scratch, 0);
    const int64_t G = m.heads / m.kv_heads, longest = G < TOGETHER ? TOGETHER / G : 1;
    int64_t num_runs = 0;
    for (int64_t t = 0; t < T; t++) {
      const bool follows = t && rows[t] == rows[t - 1] && positions[t] == positions[t - 1] + 1;
      chunks |= follows;
      if (follows && places.runs[num_runs - 1].count < longest) places.runs[num_runs - 1].count++;
      else places.runs[num_runs++] = Run{(int32_t)t, 1};
    }
    for (int64_t b = 0; b < B; b++) {
      places.last_positions[b] = positions[outputs[b]], places.last_rows[b] = rows[outputs[b]];
      places.last_runs[b] = Run{(int32_t)b, 1};
    }
    all = Queries{positions, rows, places.runs, num_runs};
    last = Queries{places.last_positions, places.last_rows, places.last_runs, B};
    // A turn of the spin takes some 40 cycles; the largest pieces of work T * 16 * wide / 32 of them.
    Team team{(int)m.num_threads, (int)(4000 + T * (m.hidden > m.intermediate ? m.hidden : m.intermediate) / 40)};
    if (m.num_threads == 1) thread(team, 0);
    else {
#pragma omp parallel num_threads((int)m.num_threads)
      thread(team, omp_get_thread_num());
    }
    *(int64_t*)&m.long_waits = team.long_waits;
  }

  void thread(Team& team, int id) const {
    const int64_t C = m.hidden, H = m.heads, K = m.kv_heads, d = m.head_dim, I = m.intermediate;
    const float eps = (float)m.eps;
    Scratch scratch{memory};
    const Places at(m, T, B, max_pages, scratch, id);
    const Layer* layers = (const Layer*)m.layers;
    // What the tokens that go on work with: all T of them, in the last layer the outputs alone if they are fewer.
    float* x = at.x;
    int64_t n = T;
    bool few;
    Inputs<W> h, attended, gated;
    auto go_on_with = [&](int64_t tokens, float* where) {
      x = where, n = tokens, few = n <= FEW;
      // Few tokens: every thread norms them all for itself, which is faster than to meet.
      h = {few ? at.own.h : at.h, n, C}, attended = {few ? at.a : at.h2, n, H * d}, gated = {at.h2, n, I};
    };
    go_on_with(T, at.x);

    auto product = [&](int64_t outputs, auto use) { share_product(team, id, n, outputs / 16, use); };
    auto norm_all = [&](const Inputs<W>& out, uint64_t weight, auto where_is) {
      auto block = [&](int64_t b) {
        const int64_t end = b * 16 + 16 < out.tokens ? b * 16 + 16 : out.tokens;
        norm<W>(where_is, b * 16, end, (const W*)weight, eps, out);
      };
      if (out.few()) block(0);
      else shared_out(team, id, (out.tokens + 15) / 16, block);
      return out.few() || team.meet(id);
    };
    auto token = [&](int64_t t) { return x + t * C; };
    auto bias = [](uint64_t b, int64_t o) { return b ? load((const W*)b + o) : f16{}; };

    shared_out(team, id, T, [&](int64_t t) {
      for (int64_t c = 0; c < C; c += 16) put(x + t * C + c, load((const W*)m.embedding + tokens[t] * C + c));
    });
    if (!team.meet(id)) return;
    for (int64_t l = 0; l < m.num_layers; l++) {
      const Layer& L = layers[l];
      const bool narrow = l + 1 == m.num_layers && B < T, apart = chunks || narrow;
      const Queries& queries = narrow ? last : all;
      if (!norm_all(h, L.input_norm, token)) return;
      auto query = [&](int64_t o, Tokens of) {
        sixteen_outputs(h, of, (const W*)L.q, o, H * d, at.own.tail,
                        [&](int64_t t) { return at.q + t * H * d + o; },
                        [&](float* to, f16 v) { put(to, v + bias(L.q_bias, o)); });
      };
      auto key_or_value = [&](int64_t o, Tokens of) {
        const bool is_value = o >= K * d;
        const int64_t row = is_value ? o - K * d : o;
        sixteen_outputs(h, of, (const W*)(is_value ? L.v : L.k), row, K * d, at.own.tail,
                        [&](int64_t t) { return at.kv + t * 2 * K * d + o; },
                        [&](float* to, f16 v) { put(to, v + bias(is_value ? L.v_bias : L.k_bias, row)); });
      };
      product(((narrow ? 0 : H) + 2 * K) * d, [&](int64_t unit, Tokens of) {
        const int64_t o = unit * 16 - (narrow ? 0 : H * d);
        o < 0 ? query(o + H * d, of) : key_or_value(o, of);
      });
      if (!team.meet(id)) return;
      if (apart) {
        shared_out(team, id, T * K, [&](int64_t task) { remember(at, L, task / K, task % K); });
        if (narrow) {
          if (B == 0) return;
          shared_out(team, id, B, [&](int64_t b) { memcpy(at.last_x + b * C, x + outputs[b] * C, C * sizeof(float)); });
        }
        if (!team.meet(id)) return;
      }
      if (narrow) {
        go_on_with(B, at.last_x);
        if (!norm_all(h, L.input_norm, token)) return;
        product(H * d, [&](int64_t unit, Tokens of) { query(unit * 16, of); });
        if (!team.meet(id)) return;
      }
      shared_out(team, id, queries.num_runs * K, [&](int64_t piece) {
        if (!apart) remember(at, L, queries.runs[piece / K].first, piece % K);
        attend_run(at, L, queries, piece / K, piece % K);
      });
      if (!team.meet(id)) return;
      if (!few) {
        shared_out(team, id, (n + 15) / 16, [&](int64_t b) { pack_rows((const W*)at.a, b * 16, attended); });
        if (!team.meet(id)) return;
      }
      product(C, [&](int64_t unit, Tokens of) {
        sixteen_outputs(attended, of, (const W*)L.o, unit * 16, C, at.own.tail,
                        [&](int64_t t) { return x + t * C + unit * 16; },
                        [&](float* to, f16 v) { put(to, load(to) + (v + bias(L.o_bias, unit * 16))); });
      });
      if (!team.meet(id)) return;
      if (!norm_all(h, L.post_norm, token)) return;
      product(I, [&](int64_t unit, Tokens of) { gate(at, h, of, (const W*)L.gate, (const W*)L.up, unit * 16, gated); });
      if (!team.meet(id)) return;
      product(C, [&](int64_t unit, Tokens of) {
        sixteen_outputs(gated, of, (const W*)L.down, unit * 16, C, at.own.tail,
                        [&](int64_t t) { return x + t * C + unit * 16; },
                        [&](float* to, f16 v) { put(to, load(to) + v); });
      });
      if (!team.meet(id)) return;
    }
    if (B == 0) return;
    const Inputs<W> final{B <= FEW ? at.own.h : at.outputs, B, C};
    auto output = [&](int64_t b) { return x + (B < T ? b : outputs[b]) * C; };
    if (!norm_all(final, m.final_norm, output)) return;
    const int64_t V = m.vocab_size;
    share_product(team, id, B, (V + 15) / 16, [&](int64_t unit, Tokens of) {
      const int64_t o = unit * 16;
      sixteen_outputs(final, of, (const W*)m.head, o, V, at.own.tail, [&](int64_t b) { return logits + b * V + o; },
                      [&](float* to, f16 v) {
                        if (o + 16 <= V) put(to, v);
                        else memcpy(to, &v, (V - o) * sizeof(float));
                      });
    });
    if (!states || !team.meet(id)) return;
    shared_out(team, id, B, [&](int64_t b) {
      flags[b] = append_token(*states, rows[b], logits + b * V, V, at.own.weights);
    });
  }

  // A token's key and value of one head go into the cache.
  void remember(const Places& at, const Layer& L, int64_t t, int64_t head) const {
    const int64_t K = m.kv_heads, d = m.head_dim, position = positions[t];
    float *key = at.kv + t * 2 * K * d + head * d, *value = key + K * d;
    rotate(key, L.k_norm, position);
    const size_t place = (page_table[rows[t] * max_pages + position / 16] * (size_t)K + head) * d * 16;
    for (int64_t i = 0; i < d; i++) put((W*)L.keys + place + i * 16 + position % 16, key[i]);
    for (int64_t i = 0; i < d; i += 16) put((W*)L.values + place + (position % 16) * d + i, load(value + i));
  }

  void rotate(float* x, uint64_t norm, int64_t position) const {
    const int64_t d = m.head_dim;
    norm_and_rotate(x, (const W*)norm, d, (float)m.eps, (const float*)m.cos + position * d, (const float*)m.sin + position * d);
  }

  Cached<W> cached(const Layer& L, int64_t row, int64_t head) const {
    const int64_t page = head * m.head_dim * 16;
    return {(const W*)L.keys + page, (const W*)L.values + page, page_table + row * max_pages};
  }

  // The queries of a run and of the heads that share key/value head `head`.
  void attend_run(const Places& at, const Layer& L, const Queries& of, int64_t which, int64_t head) const {
    const Run run = of.runs[which];
    const int64_t H = m.heads, K = m.kv_heads, d = m.head_dim, G = H / K, stride = max_pages * 16;
    const int64_t row = of.rows[run.first], next_run = which + 1 < of.num_runs ? which + 1 : which;
    const Cached<W> own = cached(L, row, head);
    const Cached<W> next = head + 1 < K ? cached(L, row, head + 1) : cached(L, of.rows[of.runs[next_run].first], 0);
    for (int64_t begin = 0, end = run.count * G, n; begin < end; begin += n) {
      Query queries[TOGETHER];
      n = end - begin >= 8 ? 8 : end - begin >= 4 ? 4 : end - begin;
      for (int64_t i = 0; i < n; i++) {
        const int64_t t = run.first + (begin + i) / G, position = of.positions[t];
        const int64_t first = L.window && position + 1 > L.window ? position + 1 - L.window : 0;
        float* q = at.q + (t * H + head * G + (begin + i) % G) * d;
        rotate(q, L.q_norm, position);
        queries[i] = Query{q, first, position + 1};
      }
      auto together = [&](auto attend_n) {
        attend_n(queries, own, next, (size_t)K * d * 16, d, (float)m.scale, at.own.scores, stride,
                 at.own.attended);
      };
      switch (n) {
        case 8: together(attend<8, W>); break;
        case 4: together(attend<4, W>); break;
        case 3: together(attend<3, W>); break;
        case 2: together(attend<2, W>); break;
        default: together(attend<1, W>);
      }
      for (int64_t i = 0; i < n; i++) {
        W* to = (W*)at.a + ((run.first + (begin + i) / G) * H + head * G + (begin + i) % G) * d;
        for (int64_t c = 0; c < d; c += 16) put(to + c, load(at.own.attended + i * d + c));
      }
    }
  }

  static f16 silu(f16 x) {
    const f16 bounded = where(x < splat(-80.f), splat(-80.f), x);
    return x / (splat(1.f) + exp16(-bounded));
  }

  // Sixteen channels of silu(gate) * up.
  void gate(const Places& at, const Inputs<W>& h, Tokens of, const W* gates, const W* ups, int64_t o,
            const Inputs<W>& out) const {
    if (h.few()) {
      f16 g[FEW];
      sixteen_outputs(h, of, gates, o, m.intermediate, at.own.tail, [&](int64_t t) { return g + t; },
                      [&](f16* to, f16 v) { *to = silu(v); });
      sixteen_outputs(h, of, ups, o, m.intermediate, at.own.tail, [&](int64_t t) { return t; },
                      [&](int64_t t, f16 v) { put((W*)out.words + t * out.width + o, g[t] * v); });
      return;
    }
    const int64_t words = h.num_words();
    f16 g[16][4], u[16][4];
    for (int64_t b0 = of.first / 16, end = (of.end + 15) / 16; b0 < end; b0 += 4) {
      const int64_t n = end - b0 < 4 ? end - b0 : 4;
      const u16* x = (const u16*)h.words + b0 * words;
      many_tokens<W>(n, x, (const uint32_t*)gates + o * words, words, g);
      many_tokens<W>(n, x, (const uint32_t*)ups + o * words, words, u);
      for (int64_t b = 0; b < n; b++) {
        f16 v[16];
        for (int i = 0; i < 16; i++) v[i] = silu(g[i][b]) * u[i][b];
        pack<W>(v, out.words + ((b0 + b) * out.num_words() + o / elements<W>) * 16);
      }
    }
  }
};

}  // namespace

// One token for each of D rows of logits [D, V] from its full distribution, with its log-probs at the row's temperature
// and at 1. `inverse_temperatures` and `greedy` may be null (1 and false); `scratch` is [threads, 2 * V].
extern "C" void sample_rows(const float* logits, int64_t rows, int64_t V, const float* inverse_temperatures,
                            const uint8_t* greedy, const float* uniforms, int64_t* ids, float* log_probs,
                            float* raw_log_probs, float* scratch, int64_t threads) {
#pragma omp parallel num_threads((int)threads)
  {
    const int64_t id = omp_get_thread_num(), size = omp_get_num_threads();
    for (int64_t t = rows * id / size; t < rows * (id + 1) / size; t++) {
      const float inverse = inverse_temperatures ? inverse_temperatures[t] : 1.f;
      const Sampled got =
          sample_row(logits + t * V, V, inverse, greedy && greedy[t], uniforms[t], scratch + id * 2 * V);
      ids[t] = got.id, log_probs[t] = got.log_prob, raw_log_probs[t] = got.raw_log_prob;
    }
  }
}

// Bytes that `step` needs to work in, 64 of them for alignment.
extern "C" int64_t step_bytes(const Model* m, int64_t T, int64_t B, int64_t max_pages) {
  Scratch scratch{nullptr};
  Places(*m, T, B, max_pages, scratch, (int)m->num_threads - 1);
  return (int64_t)scratch.at + 64;
}

inline char* aligned(char* memory) { return (char*)(((uintptr_t)memory + 63) / 64 * 64); }

// T tokens of rows [T] at positions [T]: a row's tokens follow one another. Logits [B, V] of tokens `outputs` [B].
#define STEP(name, W)                                                                                                  \
  extern "C" void name(const Model* m, int64_t T, const int64_t* tokens, const int64_t* positions, const int64_t* rows, \
                       const int32_t* page_table, int64_t max_pages, int64_t B, const int64_t* outputs, float* logits,  \
                       char* memory) {                                                                                 \
    Step<W>{*m, T, tokens, positions, rows, page_table, max_pages, B, outputs, logits, aligned(memory)}.run();         \
  }
STEP(step_float32, float)
STEP(step_bfloat16, bf16)

// The next token of each of `rows` [D], sampled and written down in `states`; flags [D] say what that makes of the rows,
// and the result how many have any.
template <typename W>
int64_t decode(const Model& m, const RowStates& states, int64_t D, const int64_t* rows, const int32_t* page_table,
               int64_t max_pages, float* logits, uint8_t* flags, char* memory) {
  Scratch scratch{memory};
  const Places at(m, D, D, max_pages, scratch, 0);
  for (int64_t i = 0; i < D; i++) {
    at.all[i] = i, at.positions[i] = states.num_computed[rows[i]];
    at.tokens[i] = states.tokens[rows[i] * states.longest + at.positions[i]];
  }
  Step<W>{m, D, at.tokens, at.positions, rows, page_table, max_pages, D, at.all, logits, memory, &states, flags}.run();
  int64_t count = 0;
  for (int64_t i = 0; i < D; i++) count += flags[i] != 0;
  return count;
}
#define DECODE(name, W)                                                                                                \
  extern "C" int64_t name(const Model* m, const RowStates* states, int64_t D, const int64_t* rows,                      \
                          const int32_t* page_table, int64_t max_pages, float* logits, uint8_t* flags, char* memory) {  \
    return decode<W>(*m, *states, D, rows, page_table, max_pages, logits, flags, aligned(memory));                      \
  }
DECODE(decode_float32, float)
DECODE(decode_bfloat16, bf16)
