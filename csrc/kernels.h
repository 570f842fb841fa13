// Every launcher in csrc/, and nothing else: raw pointers, sizes. No torch, no allocation, no synchronisation. Those of
// the CPU stand in kernels_cpu.h, once for each level.
// Shapes and equations stand in the header of the file named above each; dimension letters: see the top of model.py.
#pragma once

#include <cstdint>

enum class Dtype { f32, f16, bf16 };

struct RopeGroup {  // n images of N tokens each, from row `first` of T on;  cos, sin  N E/2
    int64_t first, n, N;
    const float *cos, *sin;
};

// --------------------------------------------------------------------------------
// CUDA kernels: each returns the status of its own launch

#if defined(WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime.h>

// csrc/sinkhorn.cu    scratch: so many floats, of any content; targets have any of the three dtypes. by_clusters: a row
// is shared by several blocks, where the device and the rows allow it
int64_t sinkhorn_scratch_cuda(int64_t n, int64_t K, Dtype dtype);
cudaError_t sinkhorn_pass_cuda(float* log_r, const void* logits, const float* log_u, float* scratch, int64_t n,
                               int64_t K, double temperature, bool by_clusters, Dtype dtype, cudaStream_t stream);
cudaError_t sinkhorn_targets_cuda(void* targets, Dtype target_dtype, const void* logits, const float* log_u, int64_t n,
                                  int64_t K, double temperature, Dtype dtype, cudaStream_t stream);

// csrc/assignment_loss.cu    grad may be student; T is 1 or 2; scratch as above
int64_t assignment_loss_scratch_cuda(int64_t T, int64_t B, int64_t K);
cudaError_t assignment_loss_cuda(float* losses, void* grad, const void* student, const void* teacher,
                                 const float* log_u, const float* weights, const float* pairs, float* scratch,
                                 int64_t S, int64_t T, int64_t B, int64_t K, double student_temp, double teacher_temp,
                                 bool by_clusters, Dtype dtype, cudaStream_t stream);

// csrc/rope_attention.cu    E = 64 or 128; f16 or bf16; tensors and tables must start on 16 bytes
cudaError_t rope_attention_cuda(void* out, float* lse, const void* qkv, const RopeGroup* groups, int n_groups,
                                int64_t T, int A, int E, Dtype dtype, cudaStream_t stream);

// csrc/colours.cu    scratch: so many bytes, of any content; H, width from 5, 2^24 pixels at most; scale, shift  3, on
// the host
int64_t colours_scratch_cuda(int64_t n, int64_t H, int64_t width);
cudaError_t colours_cuda(float* out, const uint8_t* crops, const float* table, uint8_t* scratch, int64_t n, int64_t H,
                         int64_t width, const float* scale, const float* shift, cudaStream_t stream);

#endif
