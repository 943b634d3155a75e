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

static Index tiles(int x, int y, int z, Index block) {
    return {(x + block.x - 1) / block.x, (y + block.y - 1) / block.y, (unsigned)z};
}

extern "C" {
void run_letterbox(int kind, const Picture* pictures, void* out, const Style* style, int batch) {
    Index block = {32, 8, 1};
    loop(tiles(style->width, style->height, batch, block), block, [&] {
        if (kind == 0) letterbox_float32(pictures, (float*)out, *style);
        if (kind == 1) letterbox_float16(pictures, (half_bits*)out, *style);
        if (kind == 2) letterbox_uint8(pictures, (uint8*)out, *style);
    });
}

void run_reduce(int kind, const void* heads, const Head* head, int batch, unsigned* counts, Candidate* candidates) {
    std::vector<unsigned> found(batch);
    std::vector<uint64> ranks((size_t)batch * head->cells);
    std::vector<int> class_ids((size_t)batch * head->cells);
    Index block = {128, 1, 1};
    loop(tiles(head->cells, batch, 1, block), block, [&] {
        if (kind == 0) score_cells_float32((const float*)heads, *head, found.data(), ranks.data(), class_ids.data());
        if (kind == 1) score_cells_float16((const half_bits*)heads, *head, found.data(), ranks.data(), class_ids.data());
    });
    blockDim = {16, 1, 1};
    blockIdx = {0, 0, 0};
    for (; blockIdx.x < (unsigned)batch; blockIdx.x++) {
        std::barrier<> barrier(blockDim.x);
        block_barrier = &barrier;
        std::vector<std::thread> threads;
        for (unsigned i = 0; i < blockDim.x; i++)
            threads.emplace_back([=, &found, &ranks, &class_ids] {
                threadIdx = {i, 0, 0};
                if (kind == 0) gather_float32((const float*)heads, *head, found.data(), ranks.data(), class_ids.data(), counts, candidates);
                if (kind == 1) gather_float16((const half_bits*)heads, *head, found.data(), ranks.data(), class_ids.data(), counts, candidates);
            });
        for (auto& thread : threads) thread.join();
    }
}
}
