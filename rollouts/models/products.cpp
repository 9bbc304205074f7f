// A product of bfloat16 matrices, summed in float, for processors with avx512_bf16 and no matrix unit.

#include "products.h"

extern "C" int products_are_here() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

#ifdef __AVX512BF16__
// N is a multiple of 16; K is even, or both matrices have K first; M is a multiple of 16 where a is transposed.
// Of out and total one is null. 0: there was no memory, and nothing was written.
extern "C" int product(Matrix a, Matrix b, bf16* out, float* total, int64_t M, int64_t N, int64_t K, int64_t threads) {
  const int64_t words = (K + 1) / 2;
  uint32_t* packed_b = numbers<uint32_t>(words * N);
  uint32_t* packed_a = a.transposed ? numbers<uint32_t>(words * blocks(M) * BLOCK) : nullptr;
  const bool fits = packed_b && (packed_a || !a.transposed);
  const Left left = packed_a ? Left{(bf16*)packed_a, 2, 2 * BLOCK} : Left{a.data, a.stride, 2};
  if (fits)
#pragma omp parallel num_threads((int)threads)
  {
    pack_right(b, N, K, 0, words, packed_b);
    if (packed_a) pack_left(a.data, a.stride, M, K, packed_a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks(M) * panels(N); i++)
      block_task(i, left, BLOCK * (packed_a ? 2 * words : a.stride), M, N, words, packed_b, out, total);
  }
  free(packed_a);
  free(packed_b);
  return fits;
}
#endif
