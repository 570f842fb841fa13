// The launchers of csrc/*.cu as C functions, for emulated.py: scratch as binding.cpp gives it, but ending at a page that
// nobody may touch. They return the launcher's status, or what cudaFree found.
#include "kernels.h"

static cudaError_t worse(cudaError_t a, cudaError_t b) { return a == cudaSuccess ? b : a; }

extern "C" {

void* emulated_allocate(size_t size, size_t residue) { return allocate(size, residue); }
int emulated_free(void* p) { return cudaFree(p); }
const char* emulated_words(int status) { return cudaGetErrorString(status); }
void emulated_order(unsigned which) { order = which; }
unsigned emulated_launches() { return launches; }
int emulated_shared() { return shared_bytes; }

int sinkhorn_pass(float* log_r, const void* logits, const float* log_u, int64_t n, int64_t K, double temperature,
                  int64_t by_clusters, int dtype) {
    float* scratch;
    cudaMalloc(&scratch, sinkhorn_scratch_cuda(n, K, (Dtype)dtype) * sizeof(float));
    const cudaError_t status = sinkhorn_pass_cuda(log_r, logits, log_u, scratch, n, K, temperature, by_clusters,
                                                  (Dtype)dtype, 0);
    return worse(status, cudaFree(scratch));
}

int sinkhorn_targets(void* targets, int target_dtype, const void* logits, const float* log_u, int64_t n, int64_t K,
                     double temperature, int dtype) {
    return sinkhorn_targets_cuda(targets, (Dtype)target_dtype, logits, log_u, n, K, temperature, (Dtype)dtype, 0);
}

int assignment_loss(float* losses, void* grad, const void* student, const void* teacher, const float* log_u,
                    const float* weights, const float* pairs, int64_t S, int64_t T, int64_t B, int64_t K,
                    double student_temp, double teacher_temp, int64_t by_clusters, int dtype) {
    float* scratch;
    cudaMalloc(&scratch, assignment_loss_scratch_cuda(T, B, K) * sizeof(float));
    const cudaError_t status = assignment_loss_cuda(losses, grad, student, teacher, log_u, weights, pairs, scratch, S,
                                                    T, B, K, student_temp, teacher_temp, by_clusters, (Dtype)dtype, 0);
    return worse(status, cudaFree(scratch));
}

int rope_attention(void* out, float* lse, const void* qkv, const RopeGroup* groups, int n_groups, int64_t T, int A,
                   int E, int dtype) {
    return rope_attention_cuda(out, lse, qkv, groups, n_groups, T, A, E, (Dtype)dtype, 0);
}

int colours(float* out, const uint8_t* crops, const float* table, int64_t n, int64_t H, int64_t width,
            const float* scale, const float* shift) {
    uint8_t* scratch;
    cudaMalloc(&scratch, colours_scratch_cuda(n, H, width));
    const cudaError_t status = colours_cuda(out, crops, table, scratch, n, H, width, scale, shift, 0);
    return worse(status, cudaFree(scratch));
}

}
