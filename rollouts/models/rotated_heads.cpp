// Heads of queries or keys, normed (RMSNorm over the D numbers of a head) and rotated by their position, both passes.
// T tokens, H heads, P rows of angles: token t takes row t % P. D is a multiple of 32; everything in between is float.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#ifdef __AVX512BF16__
namespace {

const int64_t TOGETHER = 32;  // tokens whose share of the norm's gradient is summed before it meets that of others

inline void store(bf16* p, f16 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }

// 1 / the root of the mean square of a head.
template <int V>
inline float inverse_size(const f16 (&x)[V], float eps) {
  f16 squares = {};
  for (int v = 0; v < V; v++) squares += x[v] * x[v];
  return 1.f / sqrtf(sum(squares) / (V * 16) + eps);
}

template <int V>
inline void read(const bf16* p, f16 (&x)[V]) {
  for (int v = 0; v < V; v++) x[v] = load(p + v * 16);
}

template <int V>
void forward(const bf16* x, const bf16* norm, const bf16* cos, const bf16* sin, bf16* out, int64_t H, float eps) {
  f16 w[V], c[V], s[V];
  read(norm, w), read(cos, c), read(sin, s);
  for (int64_t h = 0; h < H; h++, x += V * 16, out += V * 16) {
    f16 y[V];
    read(x, y);
    const float r = inverse_size(y, eps);
    for (int v = 0; v < V; v++) y[v] *= r * w[v];
    for (int v = 0; v < V / 2; v++) {
      store(out + v * 16, y[v] * c[v] - y[v + V / 2] * s[v]);
      store(out + (v + V / 2) * 16, y[v + V / 2] * c[v + V / 2] + y[v] * s[v + V / 2]);
    }
  }
}

template <int V>
void backward(const bf16* grad, const bf16* x, const bf16* norm, const bf16* cos, const bf16* sin, bf16* to_x,
              f16 (&to_norm)[V], int64_t H, float eps) {
  f16 w[V], c[V], s[V];
  read(norm, w), read(cos, c), read(sin, s);
  for (int64_t h = 0; h < H; h++, grad += V * 16, x += V * 16, to_x += V * 16) {
    f16 g[V], n[V], back[V], dot = {};
    read(grad, g), read(x, n);
    const float r = inverse_size(n, eps);
    for (int v = 0; v < V; v++) {
      const int other = (v + V / 2) % V;
      const f16 turned = g[other] * s[other];
      n[v] *= r;
      back[v] = g[v] * c[v] + (v < V / 2 ? turned : -turned);
      to_norm[v] += back[v] * n[v];
      back[v] *= w[v];
      dot += back[v] * n[v];
    }
    const float mean = sum(dot) / (V * 16);
    for (int v = 0; v < V; v++) store(to_x + v * 16, (back[v] - n[v] * mean) * r);
  }
}

template <class Run>
bool by_width(int64_t D, Run run) {
  switch (D) {
    case 32: run.template operator()<2>(); return true;
    case 64: run.template operator()<4>(); return true;
    case 96: run.template operator()<6>(); return true;
    case 128: run.template operator()<8>(); return true;
    default: return false;
  }
}

}  // namespace

// x and out [T, H, D], norm [D], cos and sin [P, D]. 0: not for heads of this width.
extern "C" int rotated_forward(const bf16* x, const bf16* norm, const bf16* cos, const bf16* sin, bf16* out, int64_t T,
                               int64_t H, int64_t D, int64_t P, int64_t threads, double eps) {
  return by_width(D, [&]<int V>() {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t t = 0; t < T; t++)
      forward<V>(x + t * H * D, norm, cos + t % P * D, sin + t % P * D, out + t * H * D, H, (float)eps);
  });
}

// grad and what the forward pass read -> gradients of x and, in float, of the norm. 0: not for heads of this width, or
// there was no memory.
extern "C" int rotated_backward(const bf16* grad, const bf16* x, const bf16* norm, const bf16* cos, const bf16* sin,
                                bf16* to_x, float* to_norm, int64_t T, int64_t H, int64_t D, int64_t P, int64_t threads,
                                double eps) {
  const int64_t parts = (T + TOGETHER - 1) / TOGETHER;
  float* shares = (float*)malloc(parts * D * sizeof(float) + 1);
  const bool fits = shares && by_width(D, [&]<int V>() {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t p = 0; p < parts; p++) {
      f16 share[V] = {};
      for (int64_t t = p * TOGETHER; t < T && t < (p + 1) * TOGETHER; t++)
        backward<V>(grad + t * H * D, x + t * H * D, norm, cos + t % P * D, sin + t % P * D, to_x + t * H * D, share, H,
                    (float)eps);
      for (int v = 0; v < V; v++) put(shares + p * D + v * 16, share[v]);
    }
  });
  if (fits) memset(to_norm, 0, D * sizeof(float));
  for (int64_t p = 0; p < parts && fits; p++)  // in their order, whatever the number of threads
    for (int64_t i = 0; i < D; i++) to_norm[i] += shares[p * D + i];
  free(shares);
  return fits;
}
#endif
