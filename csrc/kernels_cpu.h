// The launchers of the CPU kernels, in the namespace of the level that they are compiled for: setup.py compiles each
// *_cpu.cpp once for each. No guard: binding.cpp takes this once for each level. Dtypes are f32 and bf16; `threads`
// changes the time, never the result, and neither does the level.
#include "kernels.h"

namespace LEVEL {

// csrc/sinkhorn_cpu.cpp    scratch: so many floats, of any content; targets are f32 or bf16; log_r may be log_u
int64_t sinkhorn_pass_scratch_cpu(int64_t n, int64_t K, int threads);
void sinkhorn_pass_cpu(float* log_r, const void* logits, const float* log_u, float* scratch, int64_t n, int64_t K,
                       double temperature, Dtype dtype, int threads);
int64_t sinkhorn_scratch_cpu(int64_t n, int64_t K, int threads);
void sinkhorn_cpu(float* log_u, const void* logits, float* scratch, int64_t n, int64_t K, double temperature,
                  int64_t iterations, Dtype dtype, int threads);
int64_t sinkhorn_targets_scratch_cpu(int64_t K, int threads);
void sinkhorn_targets_cpu(void* targets, Dtype target_dtype, const void* logits, const float* log_u, float* scratch,
                          int64_t n, int64_t K, double temperature, Dtype dtype, int threads);

// csrc/assignment_loss_cpu.cpp    grad may be student
int64_t assignment_loss_scratch_cpu(int64_t T, int64_t K, int threads);
void assignment_loss_cpu(float* losses, void* grad, const void* student, const void* teacher, const float* log_u,
                         const float* weights, const float* pairs, float* scratch, int64_t S, int64_t T, int64_t B,
                         int64_t K, double student_temp, double teacher_temp, Dtype dtype, int threads);

// csrc/rope_attention_cpu.cpp    even E
void rope_attention_cpu(void* out, float* lse, const void* qkv, const RopeGroup* groups, int n_groups, int64_t T, int A,
                        int E, Dtype dtype, int threads);
void rope_attention_backward_cpu(void* dqkv, const void* dout, const void* qkv, const void* out, const float* lse,
                                 const RopeGroup* groups, int n_groups, int64_t T, int A, int E, Dtype dtype,
                                 int threads);

// csrc/colours_cpu.cpp    scratch: so many bytes, of any content, on a multiple of 4; H, width from 5; scale, shift  3
int64_t colours_scratch_cpu(int64_t H, int64_t width, int threads);
void colours_cpu(float* out, const uint8_t* crops, const float* table, uint8_t* scratch, int64_t n, int64_t H,
                 int64_t width, const float* scale, const float* shift, int threads);

// csrc/cut_cpu.cpp    image: the box's first byte, rows `stride` bytes apart; scratch: so many bytes, on a multiple of
// 8
int64_t cut_scratch_cpu(int64_t height, int64_t width, int64_t size);
void cut_cpu(uint8_t* out, const uint8_t* image, int64_t stride, int64_t height, int64_t width, int64_t size, bool flip,
             uint8_t* scratch);

}  // namespace LEVEL
