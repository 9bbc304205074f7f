// Statistics of softmax(scale * logits) row by row, and the gradient of -log p(target), in one visit to each row.
//
// Logits are float or bfloat16, everything between is float. A row's numbers do not depend on the number of threads.
// Shapes: n rows, V vocabulary.

#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "vectors.h"

namespace {

const float IMPOSSIBLE = -1e30f;  // the log-probability of what cannot be sampled
const float LOWEST = -87.f;       // e^-87 is float's smallest normal number

// e^x for -87 <= x <= 0 to about 2e-7: 2^n from the exponent's bits times a polynomial of 2^f, |f| <= 1/2.
inline f16 exponential(f16 x) {
  const f16 t = x * 1.44269504f;
  const f16 magic = f16{} + 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  const f16 n = (t + magic) - magic, f = t - n;
  f16 p = f * 1.54035e-4f + 1.33336e-3f;
  p = p * f + 9.61813e-3f;
  p = p * f + 5.55041e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.f;
  return (f16)((i16)p + (__builtin_convertvector(n, i16) << 23));
}

template <class T>
void rows(const T* logits, int64_t n, int64_t V, float scale, const int64_t* targets, float* log_probs, float* highest,
          float* log_z, float* entropy, float* collision, T* gradient, float* scratch, int64_t threads) {
  const int64_t whole = V / 16 * 16, padded = (V + 15) / 16 * 16;
#pragma omp parallel num_threads((int)threads)
  {
    float* weights = scratch + omp_get_thread_num() * padded;  // [V], filled up to a whole vector
#pragma omp for schedule(static)
    for (int64_t r = 0; r < n; r++) {
      const T* x = logits + r * V;
      f16 tops = f16{} - __builtin_inff();
      i16 nan = {};
      for (int64_t v = 0; v < whole; v += 16) {
        const f16 a = load(x + v);
        tops = a > tops ? a : tops;
        nan |= a != a;
      }
      float top = highest_of(tops);
      bool broken = false;
      for (int i = 0; i < 16; i++) broken |= nan[i] != 0;
      for (int64_t v = whole; v < V; v++) {
        top = one(x + v) > top ? one(x + v) : top;
        broken |= one(x + v) != one(x + v);
      }
      broken |= !(__builtin_fabsf(top) < __builtin_inff());  // as with any softmax, one of them makes all of them NaN

      f16 z = {}, dot = {}, squares = {};
      for (int64_t v = 0; v < padded; v += 16) {
        f16 a;
        if (v < whole) {
          a = load(x + v);
        } else {
          a = f16{} - __builtin_inff();
          for (int64_t i = v; i < V; i++) a[i - v] = one(x + i);
        }
        a = (a - top) * scale;
        a = a > LOWEST ? a : f16{} + LOWEST;
        const f16 e = exponential(a);  // past the end it is the smallest number there is
        *(f16*)(weights + v) = e;
        z += e;
        dot += e * a;
        squares += e * e;
      }
      const float total = broken ? __builtin_nanf("") : sum(z), log_total = __builtin_logf(total), inverse = 1.f / total;
      const int64_t y = targets[r];
      const float log_prob = (one(x + y) - top) * scale - log_total;
      if (log_probs) log_probs[r] = log_prob < IMPOSSIBLE ? IMPOSSIBLE : log_prob;
      if (highest) highest[r] = -log_total;  // the same operations on (top - top) * scale: equal where y is the likeliest
      if (log_z) log_z[r] = log_total + top * scale;
      if (entropy) entropy[r] = log_total - sum(dot) * inverse;
      if (collision) collision[r] = sum(squares) * inverse * inverse;
      if (gradient) {  // may stand where the logits stood: they have been read
        T* g = gradient + r * V;
        for (int64_t v = 0; v < whole; v += 16) put(g + v, load(weights + v) * inverse);
        for (int64_t v = whole; v < V; v++) put(g + v, weights[v] * inverse);
        put(g + y, weights[y] * inverse - 1.f);
      }
    }
  }
}

}  // namespace

// Everything to be written may be null. scratch: threads * (V rounded up to 16) floats.
extern "C" void softmax_rows_float32(const float* logits, int64_t n, int64_t V, float scale, const int64_t* targets,
                                    float* log_probs, float* highest, float* log_z, float* entropy, float* collision,
                                    float* gradient, float* scratch, int64_t threads) {
  rows(logits, n, V, scale, targets, log_probs, highest, log_z, entropy, collision, gradient, scratch, threads);
}

extern "C" void softmax_rows_bfloat16(const bf16* logits, int64_t n, int64_t V, float scale, const int64_t* targets,
                                    float* log_probs, float* highest, float* log_z, float* entropy, float* collision,
                                    bf16* gradient, float* scratch, int64_t threads) {
  rows(logits, n, V, scale, targets, log_probs, highest, log_z, entropy, collision, gradient, scratch, threads);
}
