// Sixteen numbers at a time, in float or in bfloat16: what the compiled code of every folder is written in.

#pragma once

#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

typedef float f16 __attribute__((vector_size(64), aligned(4)));  // sixteen floats
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2)));
typedef uint16_t bf16;

inline f16 splat(float x) { return x - f16{}; }  // not +: that would make 0 of -0, and cost an addition
inline f16 where(i16 mask, f16 a, f16 b) { return (f16)(((i16)a & mask) | ((i16)b & ~mask)); }

inline f16 load(const float* p) { return *(const f16*)p; }
inline f16 load(const bf16* p) {
#ifdef __AVX512BW__  // one shuffle into the upper halves, where gcc takes three instructions
  const i16 to = i16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} << 16;
  const __m512i halves = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  return (f16)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)to, halves);
#else
  return (f16)(__builtin_convertvector(*(const h16*)p, u16) << 16);
#endif
}
typedef uint64_t u8 __attribute__((vector_size(64), aligned(4)));
#define LOW_WORDS(a, b) (u8) __builtin_shuffle((u16)a, (u16)b, i16{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29})
#define HIGH_WORDS(a, b) (u8) __builtin_shuffle((u16)a, (u16)b, i16{2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31})
#define LOW_PAIRS(a, b) __builtin_shuffle(a, b, u8{0, 8, 2, 10, 4, 12, 6, 14})
#define HIGH_PAIRS(a, b) __builtin_shuffle(a, b, u8{1, 9, 3, 11, 5, 13, 7, 15})
#define EVEN_FOURS(a, b) __builtin_shuffle(a, b, u8{0, 1, 4, 5, 8, 9, 12, 13})
#define ODD_FOURS(a, b) __builtin_shuffle(a, b, u8{2, 3, 6, 7, 10, 11, 14, 15})

// Sixteen lines of sixteen words each -> the i-th line holding everybody's i-th word, by shuffles that need no register for
// their pattern.
template <typename V>  // of 64 bytes
inline void transpose16(V* v) {
  u8 a[16], b[16];
  for (int i = 0; i < 16; i += 2) a[i] = LOW_WORDS(v[i], v[i + 1]), a[i + 1] = HIGH_WORDS(v[i], v[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++)
      b[i + 2 * j] = LOW_PAIRS(a[i + j], a[i + j + 2]), b[i + 2 * j + 1] = HIGH_PAIRS(a[i + j], a[i + j + 2]);
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; j++)
      a[i + j] = EVEN_FOURS(b[i + j], b[i + j + 4]), a[i + j + 4] = ODD_FOURS(b[i + j], b[i + j + 4]);
  for (int j = 0; j < 8; j++) v[j] = (V)EVEN_FOURS(a[j], a[j + 8]), v[j + 8] = (V)ODD_FOURS(a[j], a[j + 8]);
}
#undef LOW_WORDS
#undef HIGH_WORDS
#undef LOW_PAIRS
#undef HIGH_PAIRS
#undef EVEN_FOURS
#undef ODD_FOURS

inline float one(const float* p) { return *p; }
inline float one(const bf16* p) {
  uint32_t bits = (uint32_t)*p << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline h16 rounded(f16 x) {  // to bfloat16: to nearest, ties to even
  const u16 bits = (u16)x;
  return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, h16);
}
inline void put(float* p, f16 x) { *(f16*)p = x; }
inline void put(bf16* p, f16 x) { *(h16*)p = rounded(x); }
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  *p = (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The sum, or the highest, of all sixteen: of pairs of neighbors, of pairs of those, and so on.
const i16 NEIGHBORS[4] = {{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14},
                          {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13},
                          {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11},
                          {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}};
inline float sum(f16 v) {
  for (int i = 0; i < 4; i++) v += __builtin_shuffle(v, NEIGHBORS[i]);
  return v[0];
}
inline float highest_of(f16 v) {
  for (int i = 0; i < 4; i++) {
    const f16 other = __builtin_shuffle(v, NEIGHBORS[i]);
    v = v > other ? v : other;
  }
  return v[0];
}

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

}  // namespace
