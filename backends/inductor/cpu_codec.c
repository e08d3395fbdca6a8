/* FP4 codecs for CPUs: quantise, dequantise, fake-quantise, tensor scale and Hadamard, bit for bit the plain
 * torch reference (fp4compile/codec.py says what every step computes; this file says how to do it fast).
 *
 * A tensor is a logical [batch, lanes, size] view; blocks run along `size`. In memory the result is either
 * [batch, lanes, size] ("rows": blocked along the last axis) or [batch, size, lanes] ("columns"). Threads
 * take tiles of whole blocks. A tile is fp32 in cache, [cells][run]: run = 1 for rows, a vector of lanes for
 * columns, so that every step below is one flat loop, which compilers vectorise:
 *
 *   load -> Hadamard -> block maxima (by halving) -> scales -> round each element -> store or pack
 *
 * Maxima are taken of bit patterns, as integers: they order like the values, and NaN and Inf come out on
 * top. To be compiled without -ffast-math, with -ffp-contract=off (every operation is rounded once, as
 * written) and with -fno-strict-aliasing (tiles are read as floats and as bits). */

#include <fenv.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { OP_FAKE_QUANTIZE, OP_QUANTIZE, OP_DEQUANTIZE, OP_TENSOR_SCALE, OP_HADAMARD };
enum { F32, BF16, F16, U8 };
enum { E6M2, E8M0, E4M3 };
enum { E2M1, UNIFORM };

/* Every field is eight bytes wide; cpu.py holds the same list. */
typedef struct {
    const void *x;             /* values, or packed codes */
    void *y;                   /* values or packed codes; tensor scale: one float */
    void *scales;              /* stored scales, written or (dequantise) read */
    const float *scale_in;     /* tensor scale that divides, or NULL */
    const float *scale_out;    /* tensor scale that multiplies the result, or NULL */
    const int64_t *seed;       /* of stochastic rounding, or NULL: round to nearest */
    const int64_t *sign_seed;  /* of the Hadamard signs, or NULL: seed 0 */
    int64_t op, x_dtype, y_dtype;
    int64_t batch, lanes, size, padded;        /* padded: size after the Hadamard transform */
    int64_t batch_stride, lane_stride, stride; /* of x, in elements */
    int64_t columns;           /* the result is [batch, size, lanes] */
    int64_t hadamard;          /* size of the transform, or 0 */
    int64_t stream, sign_stream;
    int64_t scaling, element, block, edge;     /* edge: of square blocks, or 0 */
    int64_t blocks;            /* stored along size, per lane */
    int64_t truncation_free;
    /* E8M0: exponent of the largest element; fraction of the maximum from which k moves up; cap of k */
    int64_t emax, up_from, k_max;
    int64_t threads;
    double top, unit;          /* the element's largest magnitude, its least step; OP_TENSOR_SCALE: divisor */
    double hadamard_scale;     /* 1 / sqrt(hadamard) */
    double scale_max;          /* of E6M2: seven times it is finite in the result's dtype */
    int64_t magnitudes;        /* eight nibbles: magnitude / unit of each code */
} Job;

/* The fork-join entry of the OpenMP runtime that torch itself runs on; NULL: one thread. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
static Parallel parallel_entry;

void fp4_set_parallel(Parallel entry) { parallel_entry = entry; }

#define INF_BITS 0x7F800000
#define ABS_MASK 0x7FFFFFFF
#define SIGN_BIT 0x80000000u
/* The reciprocal of a smaller one times that of a block scale can be infinite. */
#define TENSOR_SCALE_MIN 0x1p-121f

INLINE uint32_t to_bits(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
INLINE float to_float(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
INLINE int32_t max32(int32_t a, int32_t b) { return a > b ? a : b; }

/* --- dtypes --------------------------------------------------------------------------------------------- */

INLINE uint32_t widen_f32(uint32_t b) { return b; }
INLINE uint32_t widen_bf16(uint16_t b) { return (uint32_t)b << 16; }
INLINE uint32_t widen_f16(uint16_t h) {
    /* Exponents move by an exact multiply, which also normalises subnormals; Inf and NaN get theirs back. */
    uint32_t magnitude = (uint32_t)(h & 0x7FFF) << 13;
    uint32_t bits = to_bits(to_float(magnitude) * 0x1p112f);
    bits = magnitude >= 0x0F800000 ? magnitude | INF_BITS : bits;
    return bits | (uint32_t)(h & 0x8000) << 16;
}

INLINE uint32_t narrow_f32(float x) { return to_bits(x); }
INLINE uint16_t narrow_bf16(float x) {
    uint32_t b = to_bits(x);
    uint32_t rounded = (b + 0x7FFF + (b >> 16 & 1)) >> 16;
    return (uint16_t)((b & ABS_MASK) > INF_BITS ? 0x7FC0 : rounded);
}
INLINE uint16_t narrow_f16(float x) {
    uint32_t b = to_bits(x), magnitude = b & ABS_MASK;
    /* Below the normal range adding 0.5 leaves the rounded subnormal in the low bits of the sum. */
    uint32_t subnormal = to_bits(to_float(magnitude) + 0.5f) - 0x3F000000;
    uint32_t normal = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    uint32_t rounded = magnitude < 0x38800000 ? subnormal : normal;
    rounded = magnitude >= 0x477FF000 ? 0x7C00 : rounded;
    rounded = magnitude > INF_BITS ? 0x7E00 : rounded;
    return (uint16_t)(rounded | (b >> 16 & 0x8000));
}
INLINE uint8_t widen_u8(uint8_t b) { return b; }

/* out[i * out_outer + j * out_inner] = x[i * x_outer + j * x_inner], widened; unit strides are vectorised. */
#define DEFINE_COPY(name, source, target, widen)                                                             \
    static void name(target *restrict out, int64_t out_outer, int64_t out_inner, const void *from,           \
                     int64_t offset, int64_t x_outer, int64_t x_inner, int64_t outer, int64_t inner) {       \
        const source *restrict x = (const source *)from + offset;                                            \
        for (int64_t i = 0; i < outer; i++, x += x_outer, out += out_outer)                                  \
            if (out_inner == 1 && x_inner == 1)                                                              \
                for (int64_t j = 0; j < inner; j++) out[j] = widen(x[j]);                                    \
            else                                                                                             \
                for (int64_t j = 0; j < inner; j++) out[j * out_inner] = widen(x[j * x_inner]);              \
    }
DEFINE_COPY(copy_f32, uint32_t, uint32_t, widen_f32)
DEFINE_COPY(copy_bf16, uint16_t, uint32_t, widen_bf16)
DEFINE_COPY(copy_f16, uint16_t, uint32_t, widen_f16)
DEFINE_COPY(copy_u8, uint8_t, uint8_t, widen_u8)

#define DEFINE_STORE(name, target, narrow)                                                                   \
    static void name(void *to, int64_t offset, const float *restrict x, int64_t n) {                         \
        target *restrict y = (target *)to + offset;                                                          \
        for (int64_t i = 0; i < n; i++) y[i] = narrow(x[i]);                                                 \
    }
DEFINE_STORE(store_f32, uint32_t, narrow_f32)
DEFINE_STORE(store_bf16, uint16_t, narrow_bf16)
DEFINE_STORE(store_f16, uint16_t, narrow_f16)

typedef void (*Copy)(uint32_t *, int64_t, int64_t, const void *, int64_t, int64_t, int64_t, int64_t, int64_t);
typedef void (*Store)(void *, int64_t, const float *, int64_t);
static const Copy COPY[] = {copy_f32, copy_bf16, copy_f16};
static const Store STORE[] = {store_f32, store_bf16, store_f16};

/* --- tiles ---------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t lanes, size;           /* of a tile; whole blocks along size */
    int64_t lane_tiles, size_tiles;
    int64_t cells, run;            /* its memory: [cells][run] */
    int64_t lane_step, size_step;  /* in that memory */
} Shape;

typedef struct {
    int64_t batch, lane, at;       /* where a tile starts ... */
    int64_t lanes, size;           /* ... and how much of it lies inside the logical (padded) tensor */
} Place;

typedef struct {
    float *x, *u;                  /* values; random numbers */
    float *multiply, *shift, *decode;                 /* factors, per group of elements */
    float *multiply_each, *shift_each, *decode_each;  /* rows: the same, spread over the elements */
    float *scale_each;             /* E6M2 scales, spread over groups of four */
    int32_t *maxima, *maxima8, *maxima4, *scratch;    /* bit patterns; per block, per 8 and per 4 elements */
    int32_t *stored, *bad;
    uint8_t *codes, *bytes;
    void *memory;
} Work;

static const int64_t ROW_TILE = 1024, COLUMN_TILE = 64;

static int64_t unit_of(const Job *job) { return max64(job->block, job->hadamard); }

static Shape tile_shape(const Job *job) {
    int64_t unit = unit_of(job), edge = max64(job->edge, 1);
    int64_t size = round_up(job->padded, unit), lanes = job->lanes;
    Shape s;
    if (job->columns) {
        lanes = round_up(min64(lanes, unit > COLUMN_TILE ? 16 : COLUMN_TILE), 16);
        size = min64(size, round_up(COLUMN_TILE, unit));
    } else {
        /* A transposed input is read along the lanes: a square tile then uses whole cache lines. */
        int64_t square = job->stride != 1 && job->lane_stride == 1 ? 32 : 1;
        int64_t wanted = max64(edge, min64(square, lanes));
        size = min64(size, round_up(max64(ROW_TILE / wanted, 1), unit));
        lanes = min64(lanes, max64(wanted, ROW_TILE / max64(size, 1)));
    }
    s.lanes = round_up(max64(lanes, 1), edge);
    s.size = max64(size, unit);
    s.lane_tiles = (job->lanes + s.lanes - 1) / s.lanes;
    s.size_tiles = (job->padded + s.size - 1) / s.size;
    s.run = job->columns ? s.lanes : 1;
    s.cells = job->columns ? s.size : s.lanes * s.size;
    s.lane_step = job->columns ? 1 : s.size;
    s.size_step = job->columns ? s.lanes : 1;
    return s;
}

static Place tile_place(const Job *job, const Shape *s, int64_t index) {
    /* Columns go along the lanes first, so that neighbouring tiles share memory pages; rows along the row. */
    int64_t tiles = s->lane_tiles * s->size_tiles, in_batch = index % tiles;
    Place p;
    p.batch = index / tiles;
    p.lane = (job->columns ? in_batch % s->lane_tiles : in_batch / s->size_tiles) * s->lanes;
    p.at = (job->columns ? in_batch / s->lane_tiles : in_batch % s->size_tiles) * s->size;
    p.lanes = min64(s->lanes, job->lanes - p.lane);
    p.size = min64(s->size, job->padded - p.at);
    return p;
}

/* Element (lane, at) of the contiguous logical result. */
static int64_t position(const Job *job, const Place *p, int64_t lane, int64_t at) {
    lane += p->lane, at += p->at;
    return job->columns ? (p->batch * job->padded + at) * job->lanes + lane
                        : (p->batch * job->lanes + lane) * job->padded + at;
}

static void load(const Job *job, const Shape *s, const Place *p, Work *w) {
    int64_t size = max64(min64(p->size, job->size - p->at), 0);
    int64_t offset = p->batch * job->batch_stride + p->lane * job->lane_stride + p->at * job->stride;
    uint32_t *x = (uint32_t *)w->x;
    if (size < s->size || p->lanes < s->lanes) memset(x, 0, (size_t)(s->cells * s->run) * 4);
    Copy copy = COPY[job->x_dtype];
    int along_size = job->columns ? job->lane_stride != 1 && job->stride == 1
                                  : job->stride == 1 || job->lane_stride != 1;
    if (along_size)
        copy(x, s->lane_step, s->size_step, job->x, offset, job->lane_stride, job->stride, p->lanes, size);
    else
        copy(x, s->size_step, s->lane_step, job->x, offset, job->stride, job->lane_stride, size, p->lanes);
}

/* Write the tile's fp32 values, the part inside the tensor, to the contiguous result. */
static void store(const Job *job, const Shape *s, const Place *p, const Work *w) {
    Store put = STORE[job->y_dtype];
    if (job->columns)
        for (int64_t k = 0; k < p->size; k++)
            put(job->y, position(job, p, 0, k), w->x + k * s->run, p->lanes);
    else
        for (int64_t l = 0; l < p->lanes; l++)
            put(job->y, position(job, p, l, 0), w->x + l * s->size, p->size);
}

/* --- Philox4x32-7 --------------------------------------------------------------------------------------- */

#define PHILOX_ROUND                                                                                         \
    {                                                                                                        \
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;                           \
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;                                              \
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;                                              \
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;                                                                \
    }

/* The words of counters first, first + 1, ...: 4 * count of them. */
static void philox(uint32_t *restrict words, uint64_t first, int64_t count, int64_t seed, int64_t stream) {
    uint32_t low = (uint32_t)first, high = (uint32_t)(first >> 32), top = (uint32_t)((uint64_t)seed >> 32);
    for (int64_t i = 0; i < count; i++) {
        uint32_t c0 = low + (uint32_t)i, c1 = high + (c0 < low), c2 = top, c3 = 0;
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)stream;
        PHILOX_ROUND PHILOX_ROUND PHILOX_ROUND PHILOX_ROUND
        PHILOX_ROUND PHILOX_ROUND PHILOX_ROUND
        words[4 * i] = c0, words[4 * i + 1] = c1, words[4 * i + 2] = c2, words[4 * i + 3] = c3;
    }
}

/* n uniform numbers from logical index `first` on; `words` has room for n + 8. */
static void uniform(float *restrict u, uint32_t *restrict words, int64_t first, int64_t n, int64_t seed,
                    int64_t stream) {
    int64_t skip = first % 4;
    philox(words, (uint64_t)(first / 4), (skip + n + 3) / 4, seed, stream);
    for (int64_t i = 0; i < n; i++) u[i] = (float)(int32_t)(words[skip + i] >> 8) * 0x1p-24f;
}

static void load_random(const Job *job, const Shape *s, const Place *p, Work *w) {
    int64_t runs = job->columns ? p->size : p->lanes, n = job->columns ? p->lanes : p->size;
    int64_t step = job->columns ? s->run : s->size;
    if (p->size < s->size || p->lanes < s->lanes) memset(w->u, 0, (size_t)(s->cells * s->run) * 4);
    for (int64_t i = 0; i < runs; i++) {
        int64_t first = job->columns ? position(job, p, 0, i) : position(job, p, i, 0);
        uniform(w->u + i * step, (uint32_t *)w->scratch, first, n, *job->seed, job->stream);
    }
}

/* --- Hadamard ------------------------------------------------------------------------------------------- */

INLINE void butterflies(float *t, int64_t n, int64_t stride) {
    for (int64_t i = 0; i < n; i += 2 * stride)
        for (int64_t j = 0; j < stride; j++) {
            float a = t[i + j], b = t[i + j + stride];
            t[i + j] = a + b;
            t[i + j + stride] = a - b;
        }
}

/* The transform of every run of `size` cells; signs holds 0 or the sign bit for each of them. */
static void hadamard(float *t, int64_t cells, int64_t run, int64_t size, const uint32_t *signs, float scale) {
    uint32_t *bits = (uint32_t *)t;
    int64_t n = cells * run;
    if (run == 1)
        for (int64_t i = 0; i < n; i += size)
            for (int64_t k = 0; k < size; k++) bits[i + k] ^= signs[k];
    else
        for (int64_t k = 0; k < cells; k++)
            for (int64_t l = 0; l < run; l++) bits[k * run + l] ^= signs[k % size];
    for (int64_t stride = run; stride < size * run; stride *= 2) switch (stride) {
        case 1: butterflies(t, n, 1); break;
        case 2: butterflies(t, n, 2); break;
        case 4: butterflies(t, n, 4); break;
        case 8: butterflies(t, n, 8); break;
        default: butterflies(t, n, stride & ~(int64_t)15);
        }
    for (int64_t i = 0; i < n; i++) t[i] *= scale;
}

static void sign_bits(const Job *job, uint32_t *signs) {
    philox(signs, 0, (job->hadamard + 3) / 4, job->sign_seed ? *job->sign_seed : 0, job->sign_stream);
    for (int64_t i = 0; i < job->hadamard; i++) signs[i] &= SIGN_BIT;
}

static void transform(const Job *job, const Shape *s, const Place *p, Work *w) {
    if (!job->hadamard) return;
    uint32_t *signs = (uint32_t *)w->scratch;
    sign_bits(job, signs);
    hadamard(w->x, s->cells, s->run, job->hadamard, signs, (float)job->hadamard_scale);
    if (p->size == s->size) return;
    /* What pads the last block is +0, and the transform of zeros is not. */
    for (int64_t l = 0; l < (job->columns ? 1 : s->lanes); l++)
        memset(w->x + l * s->size * s->run + p->size * s->run, 0, (size_t)((s->size - p->size) * s->run) * 4);
}

/* --- maxima and spreading ------------------------------------------------------------------------------- */

/* Cells 2i and 2i + 1 -> their maximum, lane by lane; `mask` strips signs. */
INLINE void halve_run(int32_t *restrict out, const int32_t *restrict x, int64_t cells, int64_t run,
                      int32_t mask) {
    for (int64_t i = 0; i < cells / 2; i++)
        for (int64_t l = 0; l < run; l++)
            out[i * run + l] = max32(x[2 * i * run + l] & mask, x[(2 * i + 1) * run + l] & mask);
}

static void halve(int32_t *out, const int32_t *x, int64_t cells, int64_t run, int32_t mask) {
    if (run == 1) halve_run(out, x, cells, 1, mask);
    else halve_run(out, x, cells, run & ~(int64_t)15, mask);
}

/* Groups of `group` cells (a power of two) -> their maxima; the halvings alternate between two buffers. */
static void group_maxima(int32_t *out, int32_t *other, const int32_t *x, int64_t cells, int64_t run,
                         int64_t group) {
    int odd = 0;
    for (int64_t g = group; g > 1; g /= 2) odd = !odd;
    for (int64_t g = 1; g < group; g *= 2, cells /= 2, odd = !odd) {
        int32_t *to = odd ? out : other;
        halve(to, x, cells, run, ABS_MASK);
        x = to;
    }
}

INLINE void spread_by(uint32_t *restrict out, const uint32_t *restrict x, int64_t n, int64_t times) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < times; j++) out[i * times + j] = x[i];
}

/* Rows: each of n numbers, `times` times. */
static void spread(void *out, const void *x, int64_t n, int64_t times) {
    switch (times) {
    case 2: spread_by(out, x, n, 2); break;
    case 4: spread_by(out, x, n, 4); break;
    case 8: spread_by(out, x, n, 8); break;
    case 16: spread_by(out, x, n, 16); break;
    case 32: spread_by(out, x, n, 32); break;
    case 64: spread_by(out, x, n, 64); break;
    default: spread_by(out, x, n, times);
    }
}

/* Square blocks: the maximum over `edge` lanes becomes the maximum of each of them. */
static void share_over_lanes(int32_t *maxima, int64_t lanes, int64_t blocks, int64_t lane_step,
                             int64_t block_step, int64_t edge) {
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t l = 0; l < lanes; l += edge) {
            int32_t *m = maxima + b * block_step + l * lane_step, most = 0;
            for (int64_t i = 0; i < edge; i++) most = max32(most, m[i * lane_step]);
            for (int64_t i = 0; i < edge; i++) m[i * lane_step] = most;
        }
}

/* --- scales --------------------------------------------------------------------------------------------- */
/* Each reads the maxima of n groups and writes the factors of encoding and decoding and the stored byte. */

static void scale_e8m0(const Job *job, int64_t n, Work *w) {
    int32_t emax = (int32_t)job->emax, up_from = (int32_t)job->up_from, k_max = (int32_t)job->k_max;
    const int32_t *restrict maxima = w->maxima;
    float *restrict multiply = w->multiply, *restrict decode = w->decode;
    int32_t *restrict stored = w->stored;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits = maxima[i], subnormal = bits < 0x00800000;
        int32_t normal = subnormal ? (int32_t)to_bits((float)bits) : bits; /* exact: below 2^23 */
        int32_t f = (normal >> 23) - (subnormal ? 127 + 149 : 127);
        int32_t k = f - emax + ((normal & 0x7FFFFF) >= up_from);
        k = k > k_max ? k_max : k;
        k = k < -127 || bits == 0 ? -127 : k;
        multiply[i] = to_float(k == 127 ? 0x00400000u : (uint32_t)(127 - k) << 23);
        decode[i] = to_float(k == -127 ? 0x00400000u : (uint32_t)(127 + k) << 23);
        stored[i] = k + 127;
    }
}

static void scale_e4m3(const Job *job, int64_t n, Work *w) {
    float top = (float)job->top, tensor = job->scale_in ? *job->scale_in : 1.0f, one = 1.0f / tensor;
    uint32_t up = job->truncation_free ? 0xFFFFF : 0x7FFFF, tie = job->truncation_free ? 0 : 1;
    const int32_t *restrict maxima = w->maxima;
    float *restrict multiply = w->multiply, *restrict decode = w->decode;
    int32_t *restrict stored = w->stored;
    for (int64_t i = 0; i < n; i++) {
        float scale = to_float((uint32_t)maxima[i]) / top / tensor;
        scale = scale < 0x1p-6f ? 0x1p-6f : scale;
        scale = scale > 448.0f ? 448.0f : scale;
        uint32_t bits = to_bits(scale), rounded = (bits + up + (bits >> 20 & tie)) >> 20;
        decode[i] = to_float(rounded << 20);
        multiply[i] = one / decode[i];
        stored[i] = (int32_t)rounded - ((127 - 7) << 3);
    }
}

INLINE float round_bf16(float x) { /* finite, not negative */
    uint32_t b = to_bits(x);
    return to_float((b + 0x7FFF + (b >> 16 & 1)) & 0xFFFF0000u);
}

/* n blocks: the E6M2 scale (into decode), the factor or divisor of encoding, the low byte of the word. */
static void scale_e6m2(const Job *job, int64_t n, Work *w) {
    const float seventh = 0x1.24p-3f; /* bf16(1/7) */
    int exact = (int)job->truncation_free;
    float scale_max = (float)job->scale_max;
    const int32_t *restrict maxima = w->maxima;
    float *restrict multiply = w->multiply, *restrict decode = w->decode;
    int32_t *restrict stored = w->stored;
    for (int64_t i = 0; i < n; i++) {
        float v = to_float((uint32_t)maxima[i]);
        float s = exact ? v / 7.0f : round_bf16(v * seventh);
        s = s < 0x1p-48f ? 0x1p-48f : s;
        s = s > scale_max ? scale_max : s;
        uint32_t bits = to_bits(s), rounded = (bits + (exact ? 0x1FFFFF : 0xFFFFF + (bits >> 21 & 1))) >> 21;
        float scale = to_float(rounded << 21);
        decode[i] = scale;
        multiply[i] = exact ? scale : round_bf16(1.0f / scale);
        stored[i] = (int32_t)rounded - ((127 - 48) << 2);
    }
}

/* Cell g of `out` is cell g / times of x. */
static void repeat(void *to, const void *from, int64_t cells, int64_t run, int64_t times) {
    if (run == 1) {
        spread(to, from, cells, times);
        return;
    }
    for (int64_t g = 0; g < cells * times; g++)
        memcpy((uint32_t *)to + g * run, (const uint32_t *)from + g / times * run, (size_t)run * 4);
}

/* Bit `first + i` of each word from the i-th of its `count` flags. */
INLINE void collect_run(int32_t *word, const int32_t *flags, int64_t blocks, int64_t run, int count,
                        int first) {
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t l = 0; l < run; l++) {
            uint32_t bits = 0;
            for (int i = 0; i < count; i++)
                bits |= (uint32_t)flags[(b * count + i) * run + l] << (first + i);
            word[b * run + l] |= (int32_t)bits;
        }
}

static void collect(int32_t *word, const int32_t *flags, int64_t blocks, int64_t run, int count, int first) {
    if (run == 1 && count == 8) collect_run(word, flags, blocks, 1, 8, first);
    else if (run == 1) collect_run(word, flags, blocks, 1, 16, first);
    else collect_run(word, flags, blocks, run & ~(int64_t)15, count, first);
}

/* n flags of level 2, one per eight elements: does the group's maximum need the next power of two? */
INLINE void flag_eights(int32_t *restrict e8, const int32_t *restrict maxima, const float *restrict factor,
                        int64_t n, int exact) {
    for (int64_t i = 0; i < n; i++) {
        float v = to_float((uint32_t)maxima[i]);
        e8[i] = exact ? v / factor[i] > 3.5f : v * factor[i] >= 4.0f;
    }
}

/* n flags of level 3, one per four elements; shift = 2^-(e8 + e16), decode = scale / shift. */
INLINE void flag_fours(int32_t *restrict e16, const int32_t *restrict e8, const int32_t *restrict maxima,
                       const float *restrict factor, const float *restrict scale, float *restrict shift,
                       float *restrict decode, int64_t n, int exact) {
    for (int64_t i = 0; i < n; i++) {
        float v = to_float((uint32_t)maxima[i]), half = to_float((uint32_t)(127 - e8[i]) << 23);
        e16[i] = exact ? v / factor[i] * half > 1.75f : v * factor[i] * half >= 2.0f;
        uint32_t down = (uint32_t)(127 - e8[i] - e16[i]) << 23;
        shift[i] = to_float(down);
        decode[i] = scale[i] * to_float((254u << 23) - down);
    }
}

/* The two levels of exponent bits below E6M2: shift and decode per four elements, and the word. */
static void scale_levels(const Job *job, const Shape *s, Work *w) {
    int64_t run = s->run, fours = s->cells / 4 * run, eights = fours / 2, blocks = s->cells / 64;
    int32_t *e8 = (int32_t *)w->multiply_each, *e16 = (int32_t *)w->shift_each, *e8_of_4 = w->scratch;
    float *factor = w->decode_each, *scale = w->scale_each;
    repeat(factor, w->multiply, blocks, run, 8);
    if (job->truncation_free) flag_eights(e8, w->maxima8, factor, eights, 1);
    else flag_eights(e8, w->maxima8, factor, eights, 0);
    repeat(e8_of_4, e8, s->cells / 8, run, 2);
    repeat(factor, w->multiply, blocks, run, 16);
    repeat(scale, w->decode, blocks, run, 16);
    const int32_t *maxima4 = w->maxima4;
    if (job->truncation_free) flag_fours(e16, e8_of_4, maxima4, factor, scale, w->shift, w->decode, fours, 1);
    else flag_fours(e16, e8_of_4, maxima4, factor, scale, w->shift, w->decode, fours, 0);
    if (job->op == OP_FAKE_QUANTIZE) return;
    collect(w->stored, e8, blocks, run, 8, 8);
    collect(w->stored, e16, blocks, run, 16, 16);
}

/* The group of elements that shares one decode factor. */
static int64_t decode_group(const Job *job) { return job->scaling == E6M2 ? 4 : job->block; }

static void block_maxima(const Job *job, const Shape *s, Work *w) {
    const int32_t *x = (const int32_t *)w->x;
    int64_t blocks = s->size / job->block;
    if (job->scaling == E6M2) {
        group_maxima(w->maxima4, w->scratch, x, s->cells, s->run, 4);
        halve(w->maxima8, w->maxima4, s->cells / 4, s->run, ABS_MASK);
        group_maxima(w->maxima, w->scratch, w->maxima8, s->cells / 8, s->run, job->block / 8);
    } else
        group_maxima(w->maxima, w->scratch, x, s->cells, s->run, job->block);
    if (job->edge && job->columns) share_over_lanes(w->maxima, s->lanes, blocks, 1, s->lanes, job->edge);
    else if (job->edge) share_over_lanes(w->maxima, s->lanes, blocks, blocks, 1, job->edge);
}

/* Blocks that hold NaN or Inf become zero and are remembered in `bad`; returns whether there are any. */
static int clear_bad(const Job *job, const Shape *s, Work *w) {
    int64_t n = s->cells / job->block * s->run;
    const int32_t *maxima = w->maxima;
    int32_t most = 0;
    for (int64_t i = 0; i < n; i++) most = max32(most, maxima[i]);
    if (most < INF_BITS) return 0;
    for (int64_t i = 0; i < n; i++) w->bad[i] = maxima[i] >= INF_BITS;
    for (int64_t c = 0; c < s->cells; c++)
        for (int64_t l = 0; l < s->run; l++)
            if (w->bad[c / job->block * s->run + l]) w->x[c * s->run + l] = 0.0f;
    block_maxima(job, s, w);
    return 1;
}

static void mark_bad(const Job *job, const Shape *s, Work *w) {
    static const int32_t nan[] = {[E6M2] = 0xFF, [E8M0] = 0xFF, [E4M3] = 0x7F};
    int64_t blocks = s->cells / job->block, groups = job->block / decode_group(job);
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t l = 0; l < s->run; l++)
            if (w->bad[b * s->run + l]) {
                w->stored[b * s->run + l] = nan[job->scaling];
                for (int64_t g = b * groups; g < (b + 1) * groups; g++)
                    w->decode[g * s->run + l] = to_float(0x7FC00000);
            }
}

static void scales(const Job *job, const Shape *s, Work *w) {
    int64_t n = s->cells / job->block * s->run;
    block_maxima(job, s, w);
    int bad = clear_bad(job, s, w);
    if (job->scaling == E8M0) scale_e8m0(job, n, w);
    else if (job->scaling == E4M3) scale_e4m3(job, n, w);
    else {
        scale_e6m2(job, n, w);
        scale_levels(job, s, w);
    }
    if (bad) mark_bad(job, s, w);
}

/* --- elements ------------------------------------------------------------------------------------------- */

enum { MULTIPLY, MULTIPLY_SHIFT, DIVIDE_SHIFT }; /* how t = |x| / scale is reached */

typedef struct {
    float *x;
    const float *multiply, *shift, *decode, *u;
    uint8_t *codes;
    float scale, top, unit;
    int64_t n;
} Elements;

/* x -> fp32 values in place, or codes. All but `e` are constants where it is instantiated. */
INLINE void round_elements(const Elements *e, int reach, int even, int stochastic, int packed) {
    float *restrict x = e->x;
    const float *restrict multiply = e->multiply, *restrict shift = e->shift, *restrict decode = e->decode;
    const float *restrict u = e->u;
    uint8_t *restrict codes = e->codes;
    float scale = e->scale, top = e->top, unit = e->unit, per_unit = 1.0f / unit;
    int64_t n = e->n;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = to_bits(x[i]), sign = bits & SIGN_BIT;
        float t = to_float(bits & ABS_MASK), q;
        t = reach == DIVIDE_SHIFT ? t / multiply[i] : t * multiply[i];
        if (reach == DIVIDE_SHIFT) t = t > 7.0f ? 7.0f : t;
        if (reach != MULTIPLY) t *= shift[i];
        int32_t code = 0;
        if (!even && !stochastic) {
            float nearest = t * per_unit + 0.5f;
            code = (int32_t)(nearest > 7.0f ? 7.0f : nearest);
            q = (float)code * unit;
        } else {
            t = t > top ? top : t;
            /* E2M1 doubles its step at 2 and at 4. */
            uint32_t power = (uint32_t)max32((int32_t)(to_bits(t) & INF_BITS), 0x3F800000);
            float step = even ? to_float(power - (1u << 23)) : unit;
            if (stochastic) {
                float steps = t * (even ? to_float((255u << 23) - power) : per_unit);
                float whole = (float)(int32_t)steps;
                q = (whole + (u[i] < steps - whole ? 1.0f : 0.0f)) * step;
            } else {
                float magic = to_float(power + (22u << 23)); /* its unit in the last place is the step */
                q = t + magic - magic;
            }
            if (packed) {
                int32_t low = (int32_t)(q * per_unit), high = (int32_t)(to_bits(q) >> 22) - 252;
                code = even && q >= 1.0f ? high : low;
            }
        }
        if (packed) codes[i] = (uint8_t)(code | (int32_t)(sign >> 28));
        else x[i] = to_float(to_bits(q * decode[i] * scale) | sign);
    }
}

#define DEFINE_ROUND(name, reach, even)                                                                      \
    static void name##_nearest(const Elements *e) { round_elements(e, reach, even, 0, 0); }                  \
    static void name##_nearest_codes(const Elements *e) { round_elements(e, reach, even, 0, 1); }            \
    static void name##_stochastic(const Elements *e) { round_elements(e, reach, even, 1, 0); }               \
    static void name##_stochastic_codes(const Elements *e) { round_elements(e, reach, even, 1, 1); }
#define ROUND_ROW(name) {{name##_nearest, name##_nearest_codes}, {name##_stochastic, name##_stochastic_codes}}
DEFINE_ROUND(e2m1, MULTIPLY, 1)
DEFINE_ROUND(flat, MULTIPLY, 0)
DEFINE_ROUND(s1p2, MULTIPLY_SHIFT, 0)
DEFINE_ROUND(s1p2_exact, DIVIDE_SHIFT, 0)

typedef void (*Round)(const Elements *);
static const Round ROUND[][2][2] = {ROUND_ROW(e2m1), ROUND_ROW(flat), ROUND_ROW(s1p2), ROUND_ROW(s1p2_exact)};

static Round rounder(const Job *job) {
    int64_t row = job->scaling == E6M2 ? 2 + job->truncation_free : job->element;
    return ROUND[row][job->seed != NULL][job->op == OP_QUANTIZE];
}

static void round_tile(const Job *job, const Shape *s, Work *w) {
    Round round = rounder(job);
    int64_t block = job->block, group = decode_group(job), levels = job->scaling == E6M2;
    Elements e = {w->x, w->multiply, w->shift, w->decode, w->u, w->codes,
                  job->scale_out ? *job->scale_out : 1.0f, (float)job->top, (float)job->unit, s->run};
    if (job->columns) {
        for (int64_t c = 0; c < s->cells; c++, e.x += s->run, e.u += s->run, e.codes += s->run) {
            e.multiply = w->multiply + c / block * s->run;
            e.decode = w->decode + c / group * s->run;
            e.shift = w->shift + c / 4 * s->run;
            round(&e);
        }
        return;
    }
    spread(w->multiply_each, w->multiply, s->cells / block, block);
    spread(w->decode_each, w->decode, s->cells / group, group);
    if (levels) spread(w->shift_each, w->shift, s->cells / 4, 4);
    e.multiply = w->multiply_each, e.decode = w->decode_each, e.shift = w->shift_each, e.n = s->cells;
    round(&e);
}

/* --- packed storage ------------------------------------------------------------------------------------- */

static int64_t bytes_per_lane(const Job *job) { return job->blocks * job->block / 2; }

static void store_codes(const Job *job, const Shape *s, const Place *p, Work *w) {
    int64_t row = bytes_per_lane(job), bytes = s->size / 2, used = min64(bytes, row - p->at / 2);
    uint8_t *y = (uint8_t *)job->y + (p->batch * job->lanes + p->lane) * row + p->at / 2;
    const uint8_t *restrict codes = w->codes;
    if (!job->columns) {
        for (int64_t l = 0; l < p->lanes; l++, y += row, codes += s->size)
            for (int64_t i = 0; i < used; i++) y[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
        return;
    }
    for (int64_t i = 0; i < bytes; i++, codes += 2 * s->run)
        for (int64_t l = 0; l < s->run; l++)
            w->bytes[i * s->run + l] = (uint8_t)(codes[l] | codes[s->run + l] << 4);
    copy_u8(y, row, 1, w->bytes, 0, 1, s->run, p->lanes, used);
}

static void load_codes(const Job *job, const Shape *s, const Place *p, Work *w) {
    int64_t row = bytes_per_lane(job), used = min64(s->size / 2, row - p->at / 2);
    int64_t offset = (p->batch * job->lanes + p->lane) * row + p->at / 2;
    uint8_t *restrict codes = w->codes, *restrict bytes = w->bytes;
    if (!job->columns) {
        for (int64_t l = 0; l < p->lanes; l++, codes += s->size, offset += row) {
            const uint8_t *restrict x = (const uint8_t *)job->x + offset;
            for (int64_t i = 0; i < used; i++) codes[2 * i] = x[i] & 15, codes[2 * i + 1] = x[i] >> 4;
        }
        return;
    }
    copy_u8(bytes, 1, s->run, job->x, offset, row, 1, p->lanes, used);
    for (int64_t i = 0; i < used; i++, codes += 2 * s->run, bytes += s->run)
        for (int64_t l = 0; l < s->run; l++) codes[l] = bytes[l] & 15, codes[s->run + l] = bytes[l] >> 4;
}

/* Where the stored scale of (lane, block) of a tile lies. */
static int64_t scale_at(const Job *job, const Place *p, int64_t lane, int64_t block) {
    int64_t edge = max64(job->edge, 1), rows = (job->lanes + edge - 1) / edge;
    return (p->batch * rows + (p->lane + lane) / edge) * job->blocks + p->at / job->block + block;
}

static int64_t blocks_inside(const Job *job, const Place *p) {
    return (p->size + job->block - 1) / job->block;
}

static void store_scales(const Job *job, const Shape *s, const Place *p, const Work *w) {
    int64_t blocks = blocks_inside(job, p), per_lane = job->columns ? 1 : s->size / job->block;
    int64_t per_block = job->columns ? s->run : 1;
    for (int64_t l = 0; l < p->lanes; l += max64(job->edge, 1)) {
        int64_t at = scale_at(job, p, l, 0);
        for (int64_t b = 0; b < blocks; b++) {
            int32_t stored = w->stored[l * per_lane + b * per_block];
            if (job->scaling == E6M2) ((int32_t *)job->scales)[at + b] = stored;
            else ((uint8_t *)job->scales)[at + b] = (uint8_t)stored;
        }
    }
}

static void load_scales(const Job *job, const Shape *s, const Place *p, Work *w) {
    int64_t blocks = blocks_inside(job, p), per_lane = job->columns ? 1 : s->size / job->block;
    int64_t per_block = job->columns ? s->run : 1;
    for (int64_t l = 0; l < p->lanes; l++) {
        int64_t at = scale_at(job, p, l, 0);
        for (int64_t b = 0; b < blocks; b++)
            w->stored[l * per_lane + b * per_block] = job->scaling == E6M2
                                                          ? ((const int32_t *)job->scales)[at + b]
                                                          : ((const uint8_t *)job->scales)[at + b];
    }
}

static void decode_e8m0(float *restrict decode, const int32_t *restrict stored, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t byte = (uint32_t)stored[i], bits = byte ? byte << 23 : 0x00400000u;
        decode[i] = to_float(byte == 0xFF ? 0x7FC00000u : bits);
    }
}

static void decode_e4m3(float *restrict decode, const int32_t *restrict stored, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t byte = (uint32_t)stored[i], magnitude = byte & 0x7F;
        float subnormal = (float)(int32_t)magnitude * 0x1p-9f;
        uint32_t bits = magnitude < 8 ? to_bits(subnormal) : (magnitude << 20) + ((127 - 7) << 23);
        bits = magnitude == 0x7F ? 0x7FC00000u : bits;
        decode[i] = to_float(bits | (byte & 0x80) << 24);
    }
}

/* Four-element group g of a block, from the words of `run` lanes. */
INLINE void decode_e6m2(float *restrict decode, const int32_t *restrict words, int64_t run, int g) {
    for (int64_t l = 0; l < run; l++) {
        uint32_t word = (uint32_t)words[l], byte = word & 0xFF;
        uint32_t exponent = (word >> (8 + g / 2) & 1) + (word >> (16 + g) & 1);
        float scale = to_float(byte == 0xFF ? 0x7FC00000u : (byte << 21) + ((127 - 48) << 23));
        decode[l] = scale * to_float((127 + exponent) << 23);
    }
}

static void decode_words(float *decode, const int32_t *words, int64_t blocks, int64_t run) {
    for (int64_t b = 0; b < blocks; b++)
        for (int g = 0; g < 16; g++) {
            if (run == 1) decode_e6m2(decode + b * 16 + g, words + b, 1, g);
            else decode_e6m2(decode + (b * 16 + g) * run, words + b * run, run & ~(int64_t)15, g);
        }
}

static void decode_scales(const Job *job, const Shape *s, Work *w) {
    int64_t n = s->cells / job->block * s->run;
    if (job->scaling == E8M0) decode_e8m0(w->decode, w->stored, n);
    else if (job->scaling == E4M3) decode_e4m3(w->decode, w->stored, n);
    else decode_words(w->decode, w->stored, s->cells / 64, s->run);
}

static void decode_run(float *restrict y, const uint8_t *restrict codes, const float *restrict decode,
                       int64_t n, uint32_t magnitudes, float unit, float scale) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t code = codes[i];
        float value = (float)(int32_t)(magnitudes >> 4 * (code & 7) & 15) * unit;
        value = to_float(to_bits(value) | (code & 8) << 28);
        y[i] = value * decode[i] * scale;
    }
}

static void decode_tile(const Job *job, const Shape *s, Work *w) {
    int64_t group = decode_group(job);
    uint32_t magnitudes = (uint32_t)job->magnitudes;
    float unit = (float)job->unit, scale = job->scale_out ? *job->scale_out : 1.0f;
    if (!job->columns) {
        spread(w->decode_each, w->decode, s->cells / group, group);
        decode_run(w->x, w->codes, w->decode_each, s->cells, magnitudes, unit, scale);
        return;
    }
    for (int64_t c = 0; c < s->cells; c++)
        decode_run(w->x + c * s->run, w->codes + c * s->run, w->decode + c / group * s->run, s->run,
                   magnitudes, unit, scale);
}

/* --- one tile of each op -------------------------------------------------------------------------------- */

static void tile_quantize(const Job *job, const Shape *s, const Place *p, Work *w) {
    load(job, s, p, w);
    transform(job, s, p, w);
    scales(job, s, w);
    if (job->seed) load_random(job, s, p, w);
    round_tile(job, s, w);
    if (job->op == OP_FAKE_QUANTIZE) {
        store(job, s, p, w);
        return;
    }
    store_codes(job, s, p, w);
    store_scales(job, s, p, w);
}

static void tile_dequantize(const Job *job, const Shape *s, const Place *p, Work *w) {
    load_codes(job, s, p, w);
    load_scales(job, s, p, w);
    decode_scales(job, s, w);
    decode_tile(job, s, w);
    store(job, s, p, w);
}

static void tile_hadamard(const Job *job, const Shape *s, const Place *p, Work *w) {
    load(job, s, p, w);
    transform(job, s, p, w);
    store(job, s, p, w);
}

/* Raise *(int32_t *)y to the largest finite magnitude. */
static void raise_to(void *y, int32_t most) {
    enum { ORDER = __ATOMIC_RELAXED };
    int32_t seen = __atomic_load_n((int32_t *)y, ORDER);
    while (most > seen && !__atomic_compare_exchange_n((int32_t *)y, &seen, most, 0, ORDER, ORDER)) {
    }
}

static void tile_amax(const Job *job, const Shape *s, const Place *p, Work *w) {
    load(job, s, p, w);
    transform(job, s, p, w);
    const int32_t *bits = (const int32_t *)w->x;
    int32_t most = 0;
    for (int64_t i = 0; i < s->cells * s->run; i++) {
        int32_t magnitude = bits[i] & ABS_MASK;
        most = max32(most, magnitude & -(magnitude < INF_BITS));
    }
    raise_to(job->y, most);
}

/* Without a transform the maximum needs no layout and no conversion: magnitudes order like their bits. */
#define DEFINE_AMAX(name, type, inf, widen)                                                                  \
    static uint32_t name(const void *from, int64_t n) {                                                      \
        const type *restrict x = (const type *)from;                                                         \
        type most = 0;                                                                                       \
        for (int64_t i = 0; i < n; i++) {                                                                    \
            type magnitude = (type)(x[i] & ((type)-1 >> 1));                                                 \
            magnitude &= (type)-(magnitude < inf);                                                           \
            most = most > magnitude ? most : magnitude;                                                      \
        }                                                                                                    \
        return widen(most);                                                                                  \
    }
DEFINE_AMAX(amax_f32, uint32_t, INF_BITS, widen_f32)
DEFINE_AMAX(amax_bf16, uint16_t, 0x7F80, widen_bf16)
DEFINE_AMAX(amax_f16, uint16_t, 0x7C00, widen_f16)

#define AMAX_CHUNK 65536

static void tile_amax_flat(const Job *job, int64_t index) {
    static uint32_t (*const amax[])(const void *, int64_t) = {amax_f32, amax_bf16, amax_f16};
    int64_t first = index * AMAX_CHUNK, n = min64(AMAX_CHUNK, job->size - first);
    uint32_t most = amax[job->x_dtype]((const char *)job->x + first * (job->x_dtype == F32 ? 4 : 2), n);
    raise_to(job->y, (int32_t)most);
}

/* --- threads -------------------------------------------------------------------------------------------- */

typedef struct {
    const Job *job;
    Shape shape;
    int64_t tiles, chunk, next, failed;
} Pool;

static int work_allocate(Work *w, const Job *job, const Shape *s) {
    int64_t n = s->cells * s->run, fours = n / 4 + 16, words = max64(n, job->hadamard) + 32;
    int64_t each = job->columns ? n / 4 + 16 : n + 16; /* columns need no spreading, only room for flags */
    float **floats[] = {&w->x, &w->u, &w->multiply_each, &w->shift_each, &w->decode_each,
                        &w->multiply, &w->shift, &w->decode, &w->scale_each};
    int32_t **ints[] = {&w->maxima, &w->maxima8, &w->maxima4, &w->scratch, &w->stored, &w->bad};
    int64_t float_sizes[] = {n, n + 8, each, each, each, n / 2 + 16, fours, n / 2 + 16, fours};
    int64_t int_sizes[] = {n / 2 + 16, n / 2 + 16, n / 2 + 16, words, n / 2 + 16, n / 2 + 16};
    size_t total = (size_t)(2 * n) + 256;
    for (int i = 0; i < 9; i++) total += (size_t)round_up(float_sizes[i] * 4, 64);
    for (int i = 0; i < 6; i++) total += (size_t)round_up(int_sizes[i] * 4, 64);
    w->memory = malloc(total);
    if (!w->memory) return 0;
    char *at = (char *)(((uintptr_t)w->memory + 63) & ~(uintptr_t)63);
    for (int i = 0; i < 9; i++) *floats[i] = (float *)at, at += round_up(float_sizes[i] * 4, 64);
    for (int i = 0; i < 6; i++) *ints[i] = (int32_t *)at, at += round_up(int_sizes[i] * 4, 64);
    w->codes = (uint8_t *)at;
    w->bytes = w->codes + n;
    return 1;
}

typedef void (*Tile)(const Job *, const Shape *, const Place *, Work *);
static const Tile TILE[] = {tile_quantize, tile_quantize, tile_dequantize, tile_amax, tile_hadamard};

static int is_flat(const Job *job) { return job->op == OP_TENSOR_SCALE && !job->hadamard; }

static void run_tiles(Pool *pool, Work *w) {
    const Job *job = pool->job;
    for (;;) {
        int64_t first = __atomic_fetch_add(&pool->next, pool->chunk, __ATOMIC_RELAXED);
        if (first >= pool->tiles) return;
        for (int64_t i = first; i < min64(first + pool->chunk, pool->tiles); i++) {
            if (is_flat(job)) {
                tile_amax_flat(job, i);
                continue;
            }
            Place place = tile_place(job, &pool->shape, i);
            TILE[job->op](job, &pool->shape, &place, w);
        }
    }
}

static void worker(void *arg) {
    Pool *pool = (Pool *)arg;
    Work w;
    fenv_t saved;
    /* A caller may have set flush-to-zero; the formats count subnormals. */
    fegetenv(&saved);
    fesetenv(FE_DFL_ENV);
    if (work_allocate(&w, pool->job, &pool->shape)) {
        run_tiles(pool, &w);
        free(w.memory);
    } else
        __atomic_store_n(&pool->failed, 1, __ATOMIC_RELAXED);
    fesetenv(&saved);
}

static void tensor_scale_of(const Job *job) {
    float amax = *(float *)job->y, scale = amax / (float)job->top;
    scale = scale < TENSOR_SCALE_MIN ? TENSOR_SCALE_MIN : scale;
    *(float *)job->y = amax == 0.0f ? 1.0f : scale;
}

/* Rows that hold whole blocks and follow one another without a gap are one long row. */
static void merge_rows(Job *job) {
    int dense = job->batch_stride == job->lanes * job->size || job->batch == 1;
    if (job->op == OP_DEQUANTIZE) dense = 1;
    else dense = dense && job->stride == 1 && (job->lane_stride == job->size || job->lanes == 1);
    int whole = job->size % unit_of(job) == 0 && job->padded == job->size;
    int stored = job->op == OP_HADAMARD || job->blocks * job->block == job->size;
    if (job->columns || job->edge || !dense || !whole || !stored) return;
    job->size *= job->lanes * job->batch;
    job->blocks *= job->lanes * job->batch;
    job->padded = job->size;
    job->lanes = job->batch = 1;
}

#define SERIAL_ELEMENTS 32768

#define HUGE_PAGE (2 << 20)

/* A large result is fresh memory: without huge pages its page faults cost more than its arithmetic. */
static void ask_for_huge_pages(void *y, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    uintptr_t first = ((uintptr_t)y + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1);
    uintptr_t last = ((uintptr_t)y + (uintptr_t)bytes) & ~(uintptr_t)(HUGE_PAGE - 1);
    if (bytes >= 2 * HUGE_PAGE && last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)y, (void)bytes;
#endif
}

static int64_t result_bytes(const Job *job, int64_t elements) {
    if (job->op == OP_TENSOR_SCALE) return 0;
    if (job->op == OP_QUANTIZE) return elements / 2;
    return elements * (job->y_dtype == F32 ? 4 : 2);
}

/* Returns 0, or 1 where the reference must be asked: no memory, or a tensor scale so extreme that zeros would
 * meet an infinite reciprocal. */
int fp4_run(Job *job) {
    if (job->scale_in && !(*job->scale_in >= TENSOR_SCALE_MIN && *job->scale_in <= 0x1.fffffep127f)) return 1;
    Pool pool = {.job = job};
    merge_rows(job);
    pool.shape = tile_shape(job);
    pool.tiles = is_flat(job) ? (job->size + AMAX_CHUNK - 1) / AMAX_CHUNK
                              : job->batch * pool.shape.lane_tiles * pool.shape.size_tiles;
    int64_t elements = job->batch * job->lanes * job->padded;
    ask_for_huge_pages(job->y, result_bytes(job, elements));
    int serial = elements <= SERIAL_ELEMENTS || !parallel_entry;
    unsigned threads = serial ? 1 : (unsigned)min64(job->threads, pool.tiles);
    pool.chunk = max64(1, pool.tiles / (threads * 16));
    if (job->op == OP_TENSOR_SCALE) *(float *)job->y = 0.0f;
    if (threads > 1) parallel_entry(worker, &pool, threads, 0);
    else worker(&pool);
    if (job->op == OP_TENSOR_SCALE) tensor_scale_of(job);
    return (int)pool.failed;
}
