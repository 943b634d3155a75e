// The kernels of edge_agent/gpu.cu compiled for the CPU: a grid is a loop, a block is threads and a barrier.
// What can go wrong between a real GPU's threads is not seen here; what they compute is.
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

struct Index { unsigned x, y, z; };
static thread_local Index threadIdx;
static Index blockIdx, blockDim;
static std::barrier<>* block_barrier;

#define __device__ static inline
#define __forceinline__
#define __global__
#define __shared__ static
#define __syncthreads() block_barrier->arrive_and_wait()
static inline unsigned atomicAdd(unsigned* at, unsigned by) { return __atomic_fetch_add(at, by, __ATOMIC_RELAXED); }

typedef unsigned char uint8;
struct half_bits { unsigned short bits; };
static inline half_bits to_half(float value) {
    _Float16 half = (_Float16)value;
    half_bits out;
    memcpy(&out, &half, 2);
    return out;
}
static inline float to_float(half_bits bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}
static inline unsigned bits_of(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static inline float float_of(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline float exact_product(float a, float b) { return a * b; }

#include GPU_CU

// Runs a kernel whose threads do not wait for each other.
template <typename F> static void loop(Index grid, Index block, F kernel) {
    blockDim = block;
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++)
                for (threadIdx.y = 0; threadIdx.y < block.y; threadIdx.y++)
                    for (threadIdx.x = 0; threadIdx.x < block.x; threadIdx.x++) kernel();
}

// Runs a kernel whose threads wait for each other, a block at a time; as the block's size does not matter to it,
// by fewer threads.
template <typename F> static void together(Index grid, F kernel) {
    blockDim = {16, 1, 1};
    blockIdx = {0, 0, 0};
    for (; blockIdx.x < grid.x; blockIdx.x++) {
        std::barrier<> barrier(blockDim.x);
        block_barrier = &barrier;
        std::vector<std::thread> threads;
        for (unsigned i = 0; i < blockDim.x; i++)
            threads.emplace_back([=] {
                threadIdx = {i, 0, 0};
                kernel();
            });
        for (auto& thread : threads) thread.join();
    }
}

#define AS(type, i) (*(type*)arguments[i])

// As cuLaunchKernel: arguments are pointers to values. 0 if there is no such kernel.
extern "C" int run_kernel(const char* name, Index* grid, Index* block, void** arguments) {
#define LETTERBOX(kind, type)                                                                                       \
    if (!strcmp(name, "letterbox_" kind))                                                                           \
        return loop(*grid, *block, [=] { letterbox(AS(const Picture*, 0), AS(type*, 1), AS(Style, 2)); }), 1;
#define REDUCE(kind, type)                                                                                          \
    if (!strcmp(name, "score_cells_" kind))                                                                         \
        return loop(*grid, *block, [=] {                                                                            \
            score_cells(AS(const type*, 0), AS(Head, 1), AS(unsigned*, 2), AS(uint64*, 3), AS(int*, 4));            \
        }), 1;                                                                                                      \
    if (!strcmp(name, "gather_" kind))                                                                              \
        return together(*grid, [=] {                                                                                \
            gather(AS(const type*, 0), AS(Head, 1), AS(const unsigned*, 2), AS(const uint64*, 3),                   \
                   AS(const int*, 4), AS(unsigned*, 5), AS(unsigned*, 6), AS(Candidates, 7));                       \
        }), 1;
    LETTERBOX("float32", float)
    LETTERBOX("float16", half_bits)
    LETTERBOX("uint8", uint8)
    LETTERBOX("int32", int)
    REDUCE("float32", float)
    REDUCE("float16", half_bits)
    return 0;
}
