// The only file in csrc/ that knows torch. It checks everything, allocates, picks the device and stream, and launches.
#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sum.h>
#include <Python.h>
#include <torch/library.h>
#ifdef WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>

#define LEVEL baseline
#include "kernels_cpu.h"
#ifdef __x86_64__
#undef LEVEL
#define LEVEL avx2
#include "kernels_cpu.h"
#undef LEVEL
#define LEVEL avx512
#include "kernels_cpu.h"
#endif

using at::Tensor;

extern const int64_t BUILT_FROM;  // checksum of csrc/, which setup.py writes

// --------------------------------------------------------------------------------
// Levels of the CPU kernels: one set of kernels for each, of which this processor runs the last that it can

static constexpr const char* LEVELS[] = {"baseline", "avx2", "avx512"};

static int64_t highest_level() {
#ifdef __x86_64__
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    for (bool there : {__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                       __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl")})
        if (!there) return 1;
    return 2;
#else
    return 0;
#endif
}

// NANODINO_CPU, where it names a level of this processor; ops.py says so where it does not
static int64_t choose_level() {
    const int64_t highest = highest_level();
    const char* asked = std::getenv("NANODINO_CPU");
    for (int64_t i = 0; asked && i <= highest; i++)
        if (!std::strcmp(asked, LEVELS[i])) return i;
    return highest;
}

static int64_t level() {
    static const int64_t chosen = choose_level();
    return chosen;
}

static std::vector<std::string> cpu_levels() {  // those of this processor, and behind them the one that runs
    std::vector<std::string> names(LEVELS, LEVELS + highest_level() + 1);
    names.push_back(LEVELS[level()]);
    return names;
}

#ifdef __x86_64__
#define AT_LEVEL(call) (level() == 2 ? avx512::call : level() == 1 ? avx2::call : baseline::call)
#else
#define AT_LEVEL(call) baseline::call
#endif

// --------------------------------------------------------------------------------
// What all kernels ask of their arguments

static Dtype dtype_of(const char* who, const Tensor& x) {
    switch (x.scalar_type()) {
        case at::kFloat:    return Dtype::f32;
        case at::kHalf:     if (x.is_cuda()) return Dtype::f16; break;
        case at::kBFloat16: return Dtype::bf16;
        default: break;
    }
    TORCH_CHECK(false, who, ": got ", x.scalar_type(), " on ", x.device(), "; wanted float32, bfloat16 or, on CUDA, ",
                "float16; cast it");
}

// `name` has these sizes (-1: any), lies in one piece on the device of `like`, and has its dtype or the one given
static void check(const char* who, const char* name, const Tensor& x, at::IntArrayRef sizes, const Tensor& like,
                  at::ScalarType dtype) {
    bool fits = x.dim() == (int64_t)sizes.size();
    for (size_t i = 0; fits && i < sizes.size(); i++) fits = sizes[i] == -1 || x.size(i) == sizes[i];
    TORCH_CHECK(fits, who, ": ", name, " is ", x.sizes(), "; wanted ", sizes, " (-1: any); reshape it");
    TORCH_CHECK(x.is_contiguous(), who, ": ", name, " has strides ", x.strides(), "; wanted it contiguous; call ",
                ".contiguous()");
    TORCH_CHECK(x.device() == like.device(), who, ": ", name, " is on ", x.device(), "; wanted ", like.device(),
                "; move it");
    TORCH_CHECK(x.scalar_type() == dtype, who, ": ", name, " is ", x.scalar_type(), "; wanted ", dtype, "; cast it");
}

// --------------------------------------------------------------------------------
// RoPE attention

// as the CUDA kernels read it, 16 bytes at a time; a view that starts inside another tensor seldom lies otherwise
static Tensor aligned(const Tensor& x) {
    return x.is_cuda() && (uintptr_t)x.const_data_ptr() % 16 ? at::clone(x) : x;
}

// The crop groups packed into qkv, which is T x 3 A E. tables: cos, sin of each, N ... E/2
static std::vector<RopeGroup> rope_groups(const char* who, const Tensor& qkv, at::TensorList tables,
                                          at::IntArrayRef n_images, int64_t heads) {
    TORCH_CHECK(qkv.dim() == 2 && heads > 0 && qkv.size(1) % (6 * heads) == 0, who, ": qkv is ", qkv.sizes(), " for ",
                heads, " heads; wanted tokens x 3 A E, E even; flatten it");
    check(who, "qkv", qkv, {-1, -1}, qkv, qkv.scalar_type());
    TORCH_CHECK(tables.size() == 2 * n_images.size(), who, ": got ", tables.size(), " tables for ", n_images.size(),
                " crop groups; wanted cos and sin of each; pass both");
    std::vector<RopeGroup> groups;
    int64_t T = 0;
    for (size_t i = 0; i < n_images.size(); i++) {
        const Tensor &cos = tables[2 * i], &sin = tables[2 * i + 1];
        const int64_t half = qkv.size(1) / heads / 6, N = cos.dim() ? cos.size(0) : 0;
        TORCH_CHECK(N > 0 && cos.size(-1) == half && cos.numel() == N * half, who, ": cos is ", cos.sizes(),
                    "; wanted tokens x ", half, ", half a head; make it with rope_tables");
        check(who, "cos", cos, cos.sizes(), qkv, at::kFloat);
        check(who, "sin", sin, cos.sizes(), qkv, at::kFloat);
        const auto places = (uintptr_t)cos.const_data_ptr() | (uintptr_t)sin.const_data_ptr();
        TORCH_CHECK(!qkv.is_cuda() || places % 16 == 0, who,
                    ": cos or sin starts off a multiple of 16 bytes; clone it");
        TORCH_CHECK(n_images[i] >= 0, who, ": got ", n_images[i], " images; wanted 0 or more; count them");
        groups.push_back({T, n_images[i], N, cos.const_data_ptr<float>(), sin.const_data_ptr<float>()});
        T += n_images[i] * N;
    }
    TORCH_CHECK(T == qkv.size(0), who, ": qkv has ", qkv.size(0), " rows; wanted ", T,
                ", the images times their tokens; check n_images");
    return groups;
}

static std::tuple<Tensor, Tensor> rope_attention(const Tensor& qkv, at::TensorList tables, at::IntArrayRef n_images,
                                                 int64_t heads) {
    const auto groups = rope_groups("rope_attention", qkv, tables, n_images, heads);
    const int64_t T = qkv.size(0), D = qkv.size(1) / 3;
    const Dtype dtype = dtype_of("rope_attention", qkv);
    Tensor out = at::empty({T, D}, qkv.options()), lse = at::empty({heads, T}, qkv.options().dtype(at::kFloat));
#ifdef WITH_CUDA
    if (qkv.is_cuda()) {
        const c10::cuda::CUDAGuard guard(qkv.device());
        const Tensor x = aligned(qkv);
        C10_CUDA_CHECK(rope_attention_cuda(out.mutable_data_ptr(), lse.mutable_data_ptr<float>(), x.const_data_ptr(),
                                           groups.data(), groups.size(), T, heads, D / heads, dtype,
                                           c10::cuda::getCurrentCUDAStream()));
        return {out, lse};
    }
#endif
    AT_LEVEL(rope_attention_cpu(out.mutable_data_ptr(), lse.mutable_data_ptr<float>(), qkv.const_data_ptr(),
                                groups.data(), groups.size(), T, heads, D / heads, dtype, at::get_num_threads()));
    return {out, lse};
}

// on a CPU alone
static Tensor rope_attention_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                      at::TensorList tables, at::IntArrayRef n_images, int64_t heads) {
    const char* who = "rope_attention_backward";
    const auto groups = rope_groups(who, qkv, tables, n_images, heads);
    const int64_t T = qkv.size(0), D = qkv.size(1) / 3;
    check(who, "dout", dout, {T, D}, qkv, qkv.scalar_type());
    check(who, "out", out, {T, D}, qkv, qkv.scalar_type());
    check(who, "lse", lse, {heads, T}, qkv, at::kFloat);
    const Dtype dtype = dtype_of(who, qkv);
    Tensor dqkv = at::empty_like(qkv);
    AT_LEVEL(rope_attention_backward_cpu(dqkv.mutable_data_ptr(), dout.const_data_ptr(), qkv.const_data_ptr(),
                                         out.const_data_ptr(), lse.const_data_ptr<float>(), groups.data(),
                                         groups.size(), T, heads, D / heads, dtype, at::get_num_threads()));
    return dqkv;
}

// On the CPU large new tensors ask for pages of 2 MB: handing out 4 KB pages takes longer than filling them does.
static Tensor large_pages(Tensor x) {
#ifdef __linux__
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t first = (uintptr_t)x.mutable_data_ptr(), end = first + x.nbytes();
    const uintptr_t start = (first + page - 1) / page * page;
    if (x.is_cpu() && end > start + page) madvise((void*)start, end - start, MADV_HUGEPAGE);  // advice: may fail
#endif
    return x;
}

// --------------------------------------------------------------------------------
// Sinkhorn-Knopp and the cross-entropies of its assignments

// whether rows of logits are shared by blocks, where a GPU and the rows allow it: not yet measured, so only who asks
static bool by_clusters = false;

static bool clusters(std::optional<bool> take) {
    if (take) by_clusters = *take;
    return by_clusters;
}

static int threads_for(const Tensor& x) { return x.numel() < 1 << 15 ? 1 : at::get_num_threads(); }

static Tensor sinkhorn_pass(const Tensor& logits, const std::optional<Tensor>& log_u, double temperature) {
    const char* who = "sinkhorn_pass";
    check(who, "logits", logits, {-1, -1}, logits, logits.scalar_type());
    const int64_t n = logits.size(0), K = logits.size(1);
    if (log_u) check(who, "log_u", *log_u, {K}, logits, at::kFloat);
    const Dtype dtype = dtype_of(who, logits);
    const float* u = log_u ? log_u->const_data_ptr<float>() : nullptr;
    const auto f32 = logits.options().dtype(at::kFloat);
    Tensor log_r = n ? at::empty({K}, f32) : at::full({K}, -INFINITY, f32);  // what the sum over no rows is
#ifdef WITH_CUDA
    if (logits.is_cuda()) {
        const c10::cuda::CUDAGuard guard(logits.device());
        Tensor scratch = at::empty({sinkhorn_scratch_cuda(n, K, dtype)}, f32);
        C10_CUDA_CHECK(sinkhorn_pass_cuda(log_r.mutable_data_ptr<float>(), logits.const_data_ptr(), u,
                                          scratch.mutable_data_ptr<float>(), n, K, temperature, by_clusters, dtype,
                                          c10::cuda::getCurrentCUDAStream()));
        return log_r;
    }
#endif
    const int threads = threads_for(logits);
    Tensor scratch = large_pages(at::empty({AT_LEVEL(sinkhorn_pass_scratch_cpu(n, K, threads))}, f32));
    AT_LEVEL(sinkhorn_pass_cpu(log_r.mutable_data_ptr<float>(), logits.const_data_ptr(), u,
                               scratch.mutable_data_ptr<float>(), n, K, temperature, dtype, threads));
    return log_r;
}

static Tensor sinkhorn(const Tensor& logits, double temperature, int64_t iterations) {
    const char* who = "sinkhorn";
    check(who, "logits", logits, {-1, -1}, logits, logits.scalar_type());
    TORCH_CHECK(iterations > 0, who, ": got ", iterations, " iterations; wanted 1 or more; without any u is 1");
    const int64_t n = logits.size(0), K = logits.size(1);
    const Dtype dtype = dtype_of(who, logits);
    const int threads = threads_for(logits);
    Tensor log_u = at::empty({K}, logits.options().dtype(at::kFloat));
    Tensor scratch = large_pages(at::empty({AT_LEVEL(sinkhorn_scratch_cpu(n, K, threads))}, log_u.options()));
    AT_LEVEL(sinkhorn_cpu(log_u.mutable_data_ptr<float>(), logits.const_data_ptr(), scratch.mutable_data_ptr<float>(),
                          n, K, temperature, iterations, dtype, threads));
    return log_u;
}

static Tensor sinkhorn_targets(const Tensor& logits, const Tensor& log_u, double temperature,
                               at::ScalarType target_dtype) {
    const char* who = "sinkhorn_targets";
    check(who, "logits", logits, {-1, -1}, logits, logits.scalar_type());
    const int64_t n = logits.size(0), K = logits.size(1);
    check(who, "log_u", log_u, {K}, logits, at::kFloat);
    Tensor targets = large_pages(at::empty({n, K}, logits.options().dtype(target_dtype)));
    const Dtype dtype = dtype_of(who, logits), to = dtype_of(who, targets);
#ifdef WITH_CUDA
    if (logits.is_cuda()) {
        const c10::cuda::CUDAGuard guard(logits.device());
        C10_CUDA_CHECK(sinkhorn_targets_cuda(targets.mutable_data_ptr(), to, logits.const_data_ptr(),
                                             log_u.const_data_ptr<float>(), n, K, temperature, dtype,
                                             c10::cuda::getCurrentCUDAStream()));
        return targets;
    }
#endif
    const int threads = threads_for(logits);
    Tensor scratch = at::empty({AT_LEVEL(sinkhorn_targets_scratch_cpu(K, threads))}, log_u.options());
    AT_LEVEL(sinkhorn_targets_cpu(targets.mutable_data_ptr(), to, logits.const_data_ptr(),
                                  log_u.const_data_ptr<float>(), scratch.mutable_data_ptr<float>(), n, K,
                                  temperature, dtype, threads));
    return targets;
}

// writes the gradient into `grad`, which may be student; returns the losses, S
static Tensor run_assignment_loss(const Tensor& student, const Tensor& teacher, const Tensor& log_u,
                                  const Tensor& weights, const Tensor& pairs, double student_temp, double teacher_temp,
                                  const Tensor& grad) {
    const char* who = "assignment_loss";
    check(who, "student", student, {-1, -1, -1}, student, student.scalar_type());
    check(who, "teacher", teacher, {-1, student.size(1), student.size(2)}, student, student.scalar_type());
    const int64_t S = student.size(0), T = teacher.size(0), B = student.size(1), K = student.size(2);
    check(who, "log_u", log_u, {K}, student, at::kFloat);
    check(who, "weights", weights, {B}, student, at::kFloat);
    check(who, "pairs", pairs, {S, T}, student, at::kFloat);
    const Dtype dtype = dtype_of(who, student);
    Tensor losses = at::empty({S, B}, log_u.options());
#ifdef WITH_CUDA
    if (student.is_cuda()) {
        TORCH_CHECK(T == 1 || T == 2, who, ": got ", T, " crops of the teacher; wanted 1 or 2 on CUDA; ",
                    "call it for each two");
        const c10::cuda::CUDAGuard guard(student.device());
        Tensor scratch = at::empty({assignment_loss_scratch_cuda(T, B, K)}, log_u.options());
        C10_CUDA_CHECK(assignment_loss_cuda(
            losses.mutable_data_ptr<float>(), grad.mutable_data_ptr(), student.const_data_ptr(),
            teacher.const_data_ptr(), log_u.const_data_ptr<float>(), weights.const_data_ptr<float>(),
            pairs.const_data_ptr<float>(), scratch.mutable_data_ptr<float>(), S, T, B, K, student_temp, teacher_temp,
            by_clusters, dtype, c10::cuda::getCurrentCUDAStream()));
        return at::sum(losses, 1);
    }
#endif
    const int threads = threads_for(student);
    Tensor scratch = at::empty({AT_LEVEL(assignment_loss_scratch_cpu(T, K, threads))}, log_u.options());
    AT_LEVEL(assignment_loss_cpu(losses.mutable_data_ptr<float>(), grad.mutable_data_ptr(),
                                 student.const_data_ptr(), teacher.const_data_ptr(), log_u.const_data_ptr<float>(),
                                 weights.const_data_ptr<float>(), pairs.const_data_ptr<float>(),
                                 scratch.mutable_data_ptr<float>(), S, T, B, K, student_temp, teacher_temp, dtype,
                                 threads));
    return at::sum(losses, 1);
}

static std::tuple<Tensor, Tensor> assignment_loss(const Tensor& student, const Tensor& teacher, const Tensor& log_u,
                                                  const Tensor& weights, const Tensor& pairs, double student_temp,
                                                  double teacher_temp) {
    Tensor grad = large_pages(at::empty_like(student, at::MemoryFormat::Contiguous));
    return {run_assignment_loss(student, teacher, log_u, weights, pairs, student_temp, teacher_temp, grad), grad};
}

static Tensor assignment_loss_(Tensor& student, const Tensor& teacher, const Tensor& log_u, const Tensor& weights,
                               const Tensor& pairs, double student_temp, double teacher_temp) {
    return run_assignment_loss(student, teacher, log_u, weights, pairs, student_temp, teacher_temp, student);
}

// --------------------------------------------------------------------------------
// Training crops, and their colours

static Tensor cut(const Tensor& image, at::IntArrayRef box, bool flip, int64_t size) {
    const char* who = "cut";
    TORCH_CHECK(image.dim() == 3 && image.size(0) == 3 && image.scalar_type() == at::kByte && image.stride(0) == 1 &&
                image.stride(2) == 3, who, ": image is ", image.scalar_type(), " of ", image.sizes(), ", strides ",
                image.strides(), "; wanted bytes, 3 H W, a pixel's side by side; let the definition do it");
    TORCH_CHECK(box.size() == 4 && box[0] >= 0 && box[1] >= 0 && box[2] > 0 && box[3] > 0 && size > 0 &&
                box[0] + box[2] <= image.size(1) && box[1] + box[3] <= image.size(2), who, ": box ", box, " of ",
                image.sizes(), " at ", size, " pixels; wanted top, left, height, width inside it; draw another");
    Tensor out = at::empty({3, size, size}, image.options());
    Tensor scratch = at::empty({AT_LEVEL(cut_scratch_cpu(box[2], box[3], size))}, image.options());
    const uint8_t* first = image.const_data_ptr<uint8_t>() + box[0] * image.stride(1) + box[1] * 3;
    AT_LEVEL(cut_cpu(out.mutable_data_ptr<uint8_t>(), first, image.stride(1), box[2], box[3], size, flip,
                     scratch.mutable_data_ptr<uint8_t>()));
    return out;
}

static Tensor colours(const Tensor& crops, const Tensor& table, at::ArrayRef<double> mean, at::ArrayRef<double> std) {
    const char* who = "colours";
    check(who, "crops", crops, {-1, 3, -1, -1}, crops, at::kByte);
    check(who, "table", table, {crops.size(0), 12}, crops, at::kFloat);
    const int64_t n = crops.size(0), H = crops.size(2), width = crops.size(3);
    TORCH_CHECK(H > 4 && width > 4 && H * width <= 1 << 24, who, ": crops of ", H, " x ", width,
                " pixels; wanted sides from 5, and 2^24 pixels at most; let the definition do it");
    TORCH_CHECK(mean.size() == 3 && std.size() == 3, who, ": got ", mean.size(), " means and ", std.size(),
                " deviations; wanted 3 each; one for each channel");
    float scale[3], shift[3];
    for (int c = 0; c < 3; c++) scale[c] = 1 / (255 * std[c]), shift[c] = -mean[c] / std[c];
    Tensor out = large_pages(at::empty(crops.sizes(), table.options()));
#ifdef WITH_CUDA
    if (crops.is_cuda()) {
        const c10::cuda::CUDAGuard guard(crops.device());
        Tensor scratch = at::empty({colours_scratch_cuda(n, H, width)}, crops.options());
        C10_CUDA_CHECK(colours_cuda(out.mutable_data_ptr<float>(), crops.const_data_ptr<uint8_t>(),
                                    table.const_data_ptr<float>(), scratch.mutable_data_ptr<uint8_t>(), n, H, width,
                                    scale, shift, c10::cuda::getCurrentCUDAStream()));
        return out;
    }
#endif
    const int threads = std::min<int64_t>(threads_for(crops), std::max<int64_t>(n, 1));
    Tensor scratch = at::empty({AT_LEVEL(colours_scratch_cpu(H, width, threads))}, crops.options());
    AT_LEVEL(colours_cpu(out.mutable_data_ptr<float>(), crops.const_data_ptr<uint8_t>(), table.const_data_ptr<float>(),
                         scratch.mutable_data_ptr<uint8_t>(), n, H, width, scale, shift, threads));
    return out;
}

// --------------------------------------------------------------------------------
// Registration; fake tensors, autograd and fallbacks: ops.py

TORCH_LIBRARY(nanodino, m) {
    m.def("cpu_levels() -> str[]", cpu_levels);
    m.def("built_from() -> int", [] { return BUILT_FROM; });
    m.def("clusters(bool? take=None) -> bool", clusters);
    m.def("sinkhorn_pass(Tensor logits, Tensor? log_u, float temperature) -> Tensor");
    m.def("sinkhorn(Tensor logits, float temperature, int iterations) -> Tensor");
    m.def("sinkhorn_targets(Tensor logits, Tensor log_u, float temperature, ScalarType dtype) -> Tensor");
    m.def("assignment_loss(Tensor student, Tensor teacher, Tensor log_u, Tensor weights, Tensor pairs, "
          "float student_temp, float teacher_temp) -> (Tensor losses, Tensor grad)");
    m.def("assignment_loss_(Tensor(a!) student, Tensor teacher, Tensor log_u, Tensor weights, Tensor pairs, "
          "float student_temp, float teacher_temp) -> Tensor");
    m.def("rope_attention(Tensor qkv, Tensor[] tables, int[] n_images, int heads) -> (Tensor, Tensor)");
    m.def("rope_attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor[] tables, int[] n_images, "
          "int heads) -> Tensor");
    m.def("cut(Tensor image, int[] box, bool flip, int size) -> Tensor");
    m.def("colours(Tensor crops, Tensor table, float[] mean, float[] std) -> Tensor");
}

static void implement(torch::Library& m) {  // each looks at its tensors' device itself
    m.impl("sinkhorn_pass", sinkhorn_pass);
    m.impl("sinkhorn_targets", sinkhorn_targets);
    m.impl("assignment_loss", assignment_loss);
    m.impl("assignment_loss_", assignment_loss_);
    m.impl("rope_attention", rope_attention);
    m.impl("colours", colours);
}

TORCH_LIBRARY_IMPL(nanodino, CPU, m) {
    implement(m);
    m.impl("cut", cut);
    m.impl("sinkhorn", sinkhorn);
    m.impl("rope_attention_backward", rope_attention_backward);
}
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(nanodino, CUDA, m) { implement(m); }
#endif

// so that `import nanodino_C` runs the registrations above
PyMODINIT_FUNC PyInit_nanodino_C() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "nanodino_C", nullptr, -1, nullptr};
    return PyModule_Create(&module);
}
