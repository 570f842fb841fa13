// Tensor cores, a warp at a time, as PTX has them. No torch.
//
// mma m16n8k16, c += a b, in lane 4 g + t:
//     a[0..3]  rows g, g + 8, g, g + 8;  columns 2t, 2t + 1, of the left half twice, then of the right
//     b[0..1]  rows 2t, 2t + 1, of the upper half, then of the lower;  column g
//     c[0..3]  rows g, g, g + 8, g + 8;  columns 2t, 2t + 1, 2t, 2t + 1
#pragma once

#include <type_traits>

#include "common.cuh"

#ifdef __CUDACC__
template <typename T> __device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define MMA(TYPE) \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, " \
                 "{%0,%1,%2,%3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (std::is_same_v<T, __half>) MMA("f16");
    else MMA("bf16");
#undef MMA
}

// r[i], in lane 4 g + t: row g, columns 2t, 2t + 1 of the i-th of four 8 x 8 matrices, whose rows the lanes point to,
// eight lanes a matrix;  transposed: rows 2t, 2t + 1, column g
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}
#endif
