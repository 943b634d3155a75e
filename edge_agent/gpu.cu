// The CUDA twins of `imaging.Preprocessor` and of the numpy reduction of dense heads (`families/_dense.py`).
//
// Compiled by NVRTC for the GPU that is there (`gpu.py`). Plain C++ apart from the built-in variables, so that
// the tests can also compile it for the CPU and compare it with its twins where there is no GPU.

#ifdef __CUDACC_RTC__
typedef unsigned char uint8;
struct half_bits { unsigned short bits; };
__device__ __forceinline__ half_bits to_half(float value) {
    half_bits half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
    return half;
}
__device__ __forceinline__ float to_float(half_bits half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half.bits));
    return value;
}
__device__ __forceinline__ unsigned bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_of(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ float exact_product(float a, float b) { return __fmul_rn(a, b); }
#endif

typedef unsigned long long uint64;

__device__ __forceinline__ float to_float(float value) { return value; }

// One picture of a batch: [height, width, 3] uint8 BGR, and the rectangle of the input that shows it.
struct Picture {
    const uint8* pixels;
    int width, height;
    int left, top, fit_width, fit_height;
};

// How pixels become numbers: value * scale - shift, by channel of the input; `swap`: the input is RGB.
struct Style {
    int width, height;
    int swap, interleaved, pad;
    float scale[3], shift[3];
};

__device__ __forceinline__ void store(float* out, float value) { *out = value; }
__device__ __forceinline__ void store(half_bits* out, float value) { *out = to_half(value); }
__device__ __forceinline__ void store(uint8* out, float value) { *out = (uint8)value; }
__device__ __forceinline__ void store(int* out, float value) { *out = (int)value; }

// Where pixel `at` of `fit` pixels lies among `size`, as OpenCV's INTER_LINEAR has it: pixels have their centre
// in the middle. `share` is the weight of `next`.
__device__ __forceinline__ void sample(int at, int fit, int size, int* first, int* next, float* share) {
    float position = (at + 0.5f) * ((float)size / fit) - 0.5f;
    position = fminf(fmaxf(position, 0.0f), (float)(size - 1));
    *first = (int)position;
    *next = *first + 1 < size ? *first + 1 : *first;
    *share = position - *first;
}

// One thread a pixel of the input, one z a picture. What lies outside a picture's rectangle is padding.
template <typename T>
__device__ __forceinline__ void letterbox(const Picture* pictures, T* out, const Style& style) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= style.width || y >= style.height) return;
    const Picture picture = pictures[blockIdx.z];
    int column = x - picture.left, row = y - picture.top;
    float color[3] = {(float)style.pad, (float)style.pad, (float)style.pad};
    if (column >= 0 && row >= 0 && column < picture.fit_width && row < picture.fit_height) {
        int left, right, above, below;
        float across, down;
        sample(column, picture.fit_width, picture.width, &left, &right, &across);
        sample(row, picture.fit_height, picture.height, &above, &below, &down);
        const uint8* upper = picture.pixels + (uint64)above * picture.width * 3;
        const uint8* lower = picture.pixels + (uint64)below * picture.width * 3;
        for (int channel = 0; channel < 3; channel++) {
            float top = upper[left * 3 + channel] * (1.0f - across) + upper[right * 3 + channel] * across;
            float bottom = lower[left * 3 + channel] * (1.0f - across) + lower[right * 3 + channel] * across;
            // Rounded to a whole level, as OpenCV rounds it.
            color[channel] = floorf(top * (1.0f - down) + bottom * down + 0.5f);
        }
    }
    uint64 plane = (uint64)style.width * style.height;
    uint64 pixel = (uint64)y * style.width + x;
    T* base = out + (uint64)blockIdx.z * plane * 3;
    for (int channel = 0; channel < 3; channel++) {
        float value = color[style.swap ? 2 - channel : channel] * style.scale[channel] - style.shift[channel];
        store(base + (style.interleaved ? pixel * 3 + channel : channel * plane + pixel), value);
    }
}

extern "C" __global__ void letterbox_float32(const Picture* pictures, float* out, Style style) {
    letterbox(pictures, out, style);
}
extern "C" __global__ void letterbox_float16(const Picture* pictures, half_bits* out, Style style) {
    letterbox(pictures, out, style);
}
extern "C" __global__ void letterbox_uint8(const Picture* pictures, uint8* out, Style style) {
    letterbox(pictures, out, style);
}
extern "C" __global__ void letterbox_int32(const Picture* pictures, int* out, Style style) {
    letterbox(pictures, out, style);
}

// A dense head: value `row` of cell `cell` of picture b lies at b * cells * rows + row * row_step + cell * cell_step.
// Rows 0..3 are the box; `objectness` is a row or -1; the classes follow from `first_class` on.
struct Head {
    int cells, rows, row_step, cell_step;
    int objectness, first_class, classes;
    float threshold;
    int most;  // candidates of a picture at most
};

// The cells of each picture that are worth a look, `most` places a picture, in the host's memory.
struct Candidates {
    long long* cells;
    long long* class_ids;
    float* scores;
    float* boxes;
};

// Orders scores as unsigned numbers do, and equal scores by their cells, the first one highest.
__device__ __forceinline__ uint64 rank(float score, int cell) {
    unsigned bits = bits_of(score + 0.0f);
    bits ^= (bits >> 31) ? 0xffffffffu : 0x80000000u;
    return ((uint64)bits << 32) | (0xffffffffu - (unsigned)cell);
}

// One thread a cell, one y a picture: the best class of each cell, and a list of those above the threshold.
// NaN is never above it. `found` must be 0 before.
template <typename T>
__device__ __forceinline__ void score_cells(const T* heads, const Head& head, unsigned* found, uint64* ranks, int* class_ids) {
    int cell = blockIdx.x * blockDim.x + threadIdx.x, picture = blockIdx.y;
    if (cell >= head.cells) return;
    const T* values = heads + (uint64)picture * head.cells * head.rows + (uint64)cell * head.cell_step;
    float certainty = 1.0f;
    if (head.objectness >= 0) {
        certainty = to_float(values[(uint64)head.objectness * head.row_step]);
        if (!(certainty >= head.threshold)) return;
    }
    float best = 0.0f;
    int class_id = -1;
    for (int i = 0; i < head.classes; i++) {
        float score = to_float(values[(uint64)(head.first_class + i) * head.row_step]);
        if (head.objectness >= 0) score = exact_product(score, certainty);
        if (class_id < 0 || score > best || (score != score && best == best)) {
            best = score;
            class_id = i;
        }
    }
    if (!(best >= head.threshold)) return;
    unsigned place = atomicAdd(found + picture, 1u);
    ranks[(uint64)picture * head.cells + place] = rank(best, cell);
    class_ids[(uint64)picture * head.cells + cell] = class_id;
}

extern "C" __global__ void score_cells_float32(const float* heads, Head head, unsigned* found, uint64* ranks, int* class_ids) {
    score_cells(heads, head, found, ranks, class_ids);
}
extern "C" __global__ void score_cells_float16(const half_bits* heads, Head head, unsigned* found, uint64* ranks, int* class_ids) {
    score_cells(heads, head, found, ranks, class_ids);
}

// One block a picture: writes what was found, or the `most` best of it, into the host's memory, in the order of the
// cells. The least rank that still counts is found digit by digit, eight bits at a time, from the highest down; the
// place of a survivor is the number of survivors in cells before its own. `survivors` holds 2 * most numbers a picture.
template <typename T>
__device__ __forceinline__ void gather(const T* heads, const Head& head, const unsigned* found, const uint64* ranks,
                                       const int* class_ids, unsigned* survivors, unsigned* counts, const Candidates& out) {
    __shared__ unsigned histogram[256];
    __shared__ uint64 least;
    __shared__ unsigned wanted, taken;
    int picture = blockIdx.x;
    unsigned count = found[picture], most = head.most;
    ranks += (uint64)picture * head.cells;
    class_ids += (uint64)picture * head.cells;
    if (threadIdx.x == 0) {
        least = 0;
        wanted = most;
        taken = 0;
    }
    __syncthreads();
    if (count > most) {
        for (int shift = 56; shift >= 0; shift -= 8) {
            for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) histogram[i] = 0;
            __syncthreads();
            uint64 above = shift == 56 ? 0 : ~0ull << (shift + 8);
            for (unsigned i = threadIdx.x; i < count; i += blockDim.x)
                if ((ranks[i] & above) == least) atomicAdd(histogram + ((ranks[i] >> shift) & 255), 1u);
            __syncthreads();
            if (threadIdx.x == 0) {
                unsigned digit = 255;
                while (histogram[digit] < wanted) wanted -= histogram[digit--];
                least |= (uint64)digit << shift;
            }
            __syncthreads();
        }
    }
    unsigned* unordered = survivors + (uint64)picture * 2 * most;
    unsigned* ordered = unordered + most;
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x)
        if (ranks[i] >= least) unordered[atomicAdd(&taken, 1u)] = i;
    __syncthreads();
    unsigned kept = taken;
    for (unsigned i = threadIdx.x; i < kept; i += blockDim.x) {
        unsigned cell = (unsigned)ranks[unordered[i]], place = 0;  // the first cell has the highest number
        for (unsigned j = 0; j < kept; j++) place += (unsigned)ranks[unordered[j]] > cell;
        ordered[place] = unordered[i];
    }
    __syncthreads();
    const T* values = heads + (uint64)picture * head.cells * head.rows;
    for (unsigned i = threadIdx.x; i < kept; i += blockDim.x) {
        uint64 rank = ranks[ordered[i]], place = (uint64)picture * most + i;
        unsigned cell = 0xffffffffu - (unsigned)rank, bits = (unsigned)(rank >> 32);
        bits ^= (bits >> 31) ? 0x80000000u : 0xffffffffu;
        out.cells[place] = cell;
        out.class_ids[place] = class_ids[cell];
        out.scores[place] = float_of(bits);
        for (int row = 0; row < 4; row++)
            out.boxes[4 * place + row] = to_float(values[(uint64)row * head.row_step + (uint64)cell * head.cell_step]);
    }
    if (threadIdx.x == 0) counts[picture] = kept;
}

extern "C" __global__ void gather_float32(const float* heads, Head head, const unsigned* found, const uint64* ranks,
                                          const int* class_ids, unsigned* survivors, unsigned* counts, Candidates out) {
    gather(heads, head, found, ranks, class_ids, survivors, counts, out);
}
extern "C" __global__ void gather_float16(const half_bits* heads, Head head, const unsigned* found, const uint64* ranks,
                                          const int* class_ids, unsigned* survivors, unsigned* counts, Candidates out) {
    gather(heads, head, found, ranks, class_ids, survivors, counts, out);
}
