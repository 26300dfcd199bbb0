// The products z = x D and y = z S for few tokens, and S with its zeros for many.
//
// Compile options: -std=c++17 and the architecture, sm_80 or later; no -D and no include path is needed.
//
// The text is free of includes, so that NVRTC compiles it without a CUDA toolkit.  The tests compile the same text for
// the CPU after an emulator that defines EMULATED; only the small wrappers of the first section differ there.
//
// x, z and y are row-major, one row per token, 16-bit (bfloat16 or float16, kept as u16).  D has atoms as rows.  S is
// cut into slabs of 16 columns by 64 atoms, as layout.py writes them: 32 words of mask bits, then its values by
// ascending bit.  In mma.m16n8k16 the columns of S (or the atoms of D) are the rows of A, the tokens the columns of B.
// Which number a lane calls its k-th is free as long as A and B agree; so that its numbers lie next to each other in
// memory, lane 4 g + q of a warp owns the atoms 16 q to 16 q + 15 of a slab, four for each of the four products.
//
// Every sum has a fixed order: the same input gives the same bits.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

// ---------------------------------------------------------------------------------------------------------------------
// Wrappers: all that differs between the GPU and the emulator.

#ifdef EMULATED
#define DYNAMIC_SHARED(name) u8* const name = emulator::dynamic_shared()
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]
#endif

// Begin to copy 16 bytes to shared memory; they are there after copies_wait and a barrier.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#ifdef EMULATED
  emulator::copy_async(to, from);
#else
  u32 address;
  asm("{ .reg .u64 p; cvta.to.shared.u64 p, %1; cvt.u32.u64 %0, p; }" : "=r"(address) : "l"(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#endif
}

__device__ __forceinline__ void copies_commit() {
#ifdef EMULATED
  emulator::copies_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most N of the calling thread's committed groups are under way.
template <int N>
__device__ __forceinline__ void copies_wait() {
#ifdef EMULATED
  emulator::copies_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Load what is used once, past the first-level cache, which is for what the warps share.
__device__ __forceinline__ uint4 load_once(const uint4* from) {
#ifdef EMULATED
  return *from;
#else
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from));
  return v;
#endif
}

struct BFloat16 {
  // c (16 x 8) += a (16 x 16) b (16 x 8)
  static __device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#ifdef EMULATED
    emulator::multiply_add(c, a, b0, b1, emulator::from_bfloat16);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
  }

  // Two numbers, each rounded to nearest even, the first one in the low half.
  static __device__ __forceinline__ u32 pair(float low, float high) {
#ifdef EMULATED
    return emulator::to_bfloat16(low) | emulator::to_bfloat16(high) << 16;
#else
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#endif
  }
};

struct Float16 {
  static __device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#ifdef EMULATED
    emulator::multiply_add(c, a, b0, b1, emulator::from_float16);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
  }

  static __device__ __forceinline__ u32 pair(float low, float high) {
#ifdef EMULATED
    return emulator::to_float16(low) | emulator::to_float16(high) << 16;
#else
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#endif
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Values: four neighbouring entries of S, of which some are stored, as two registers of 16-bit pairs.

// Byte i of four signed ones, as a float.  2^23 + 128 + v has v + 128 as its lowest byte.
__device__ __forceinline__ float float_of_byte(u32 four, u32 i) {
  return __uint_as_float(__byte_perm(four ^ 0x80808080u, 0x4B000000u, 0x7440u | i)) - 8388736.0f;
}

// Four signed bytes as two registers of pairs; exact in both 16-bit types.
template <class Element>
__device__ __forceinline__ void widen(u32 four, u32& low, u32& high) {
  low = Element::pair(float_of_byte(four, 0), float_of_byte(four, 1));
  high = Element::pair(float_of_byte(four, 2), float_of_byte(four, 3));
}

struct SixteenBit {
  SixteenBit() = default;
  __device__ __forceinline__ SixteenBit(float, float) {}  // scales are for bytes

  // The entries that the four bits name; the first stored one is the value at `place`.  `half` tells the two columns of
  // a lane apart.
  __device__ __forceinline__ void expand(int, const u8* values, u32 place, u32 bits, u32& low, u32& high) const {
    const u16* value = (const u16*)values + place;
    u32 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 stored = (bits >> i) & 1u;
      v[i] = 0u;
      if (stored) v[i] = *value;
      value += stored;
    }
    low = v[0] | v[1] << 16;
    high = v[2] | v[3] << 16;
  }
};

// Four bytes, zero where nothing is stored.  Reads eight bytes from the word of the first value on.
__device__ __forceinline__ u32 select_bytes(const u8* values, u32 place, u32 bits) {
  const u32* words = (const u32*)values + (place >> 2);
  const u32 window = __funnelshift_r(words[0], words[1], (place & 3u) * 8u);
  // Byte i of `one` is bit i; byte i of `source` is the number of stored entries before it, plus 4 if it is not stored
  // itself: as a selector of bytes it then names one of the second operand, which are zero.
  const u32 one = (bits * 0x00204081u) & 0x01010101u;
  const u32 source = one * 0x010100FCu + 0x04040404u;
  return __byte_perm(window, 0u, __byte_perm(source | source >> 4, 0u, 0x4420u));
}

template <class Element>
struct EightBit {
  __device__ __forceinline__ void expand(int, const u8* values, u32 place, u32 bits, u32& low, u32& high) const {
    widen<Element>(select_bytes(values, place, bits), low, high);
  }
};

template <class Element>
struct ScaledEightBit {
  const float scales[2];

  __device__ __forceinline__ ScaledEightBit(float own, float other) : scales{own, other} {}

  __device__ __forceinline__ void expand(int half, const u8* values, u32 place, u32 bits, u32& low, u32& high) const {
    const u32 four = select_bytes(values, place, bits);
    low = Element::pair(float_of_byte(four, 0) * scales[half], float_of_byte(four, 1) * scales[half]);
    high = Element::pair(float_of_byte(four, 2) * scales[half], float_of_byte(four, 3) * scales[half]);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Slabs

constexpr int MASK_BYTES = 128;
constexpr int SLAB_ATOMS = 64;
constexpr int TILE = 16;   // columns of S, or atoms of D, of one product
constexpr int TOKENS = 8;  // tokens of one product
constexpr int STAGES = 3;  // slabs of a warp in shared memory: one in use, the others on their way

// Begin to copy a slab, mask first, by one warp.
__device__ __forceinline__ void fetch_slab(u8* stage, const u32* masks, const u8* values, i64 slab, int begin,
                                           int end) {
  const int lane = threadIdx.x & 31;
  if (lane < MASK_BYTES / 16) copy_async(stage + lane * 16, masks + slab * 32 + lane * 4);
  for (int i = lane; i < end - begin; i += 32) copy_async(stage + MASK_BYTES + i * 16, values + (i64)(begin + i) * 16);
}

// The slab as the A operands of four products.  Every lane of the warp must call.
template <class Values>
__device__ __forceinline__ void read_slab(const u8* stage, const Values& values, u32 (&a)[4][4]) {
  const int lane = threadIdx.x & 31;
  const u32 word = ((const u32*)stage)[lane];
  const u32 count = __popc(word);
  u32 before = count;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u32 other = __shfl_up_sync(0xffffffffu, before, step);
    if (lane >= step) before += other;
  }
  before -= count;
  const int shift = (lane & 7) * 4;
  const u32 lower = (1u << shift) - 1u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int holder = (2 * i + half) * 4 + (lane >> 3);
      const u32 bits = __shfl_sync(0xffffffffu, word, holder);
      const u32 place = __shfl_sync(0xffffffffu, before, holder) + __popc(bits & lower);
      values.expand(half, stage + MASK_BYTES, place, (bits >> shift) & 15u, a[i][half], a[i][half + 2]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums: the warps of a block add up what each of them has, then a second kernel what blocks have.

// Where the results go: rounded to `out`, or as they are to `partial` if that is not null.
struct Results {
  u16* out;
  float* partial;
  const float* scales;  // null: all one
  int n_tokens;
  int width;    // of a row
  int n_valid;  // columns from here on are zero
};

__device__ __forceinline__ float scaled(const Results& results, int column, float sum) {
  if (column >= results.n_valid) return 0.0f;
  return results.scales ? sum * results.scales[column] : sum;
}

__device__ __forceinline__ void keep_tile(float* sums, int row_length, int row, int column, const float (&c)[4]) {
  const int lane = threadIdx.x & 31;
  float* at = sums + (row + (lane & 3) * 2) * row_length + column + (lane >> 2);
  at[0] = c[0];
  at[row_length] = c[1];
  at[8] = c[2];
  at[row_length + 8] = c[3];
}

template <class Element>
__device__ __forceinline__ void give(const Results& results, int token, int column, float sum) {
  const i64 place = (i64)token * results.width + column;
  if (results.partial) {
    results.partial[(i64)blockIdx.z * results.n_tokens * results.width + place] = sum;
  } else {
    results.out[place] = (u16)Element::pair(scaled(results, column, sum), 0.0f);
  }
}

// Shares of n things: share i of m begins here.
__device__ __forceinline__ int share(int n, int i, int m) { return (int)((i64)n * i / m); }

// Eight numbers of a row; zeros where there is no row.
__device__ __forceinline__ uint4 load_eight(const u16* row, int at) {
  return row ? *(const uint4*)(row + at) : make_uint4(0u, 0u, 0u, 0u);
}

// Add the shares of split sums in their order.  Grid: one thread per number.
template <class Element>
__device__ __forceinline__ void finish(const float* partial, const Results& results, int n_splits) {
  const i64 count = (i64)results.n_tokens * results.width;
  const i64 place = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (place >= count) return;
  float sum = 0.0f;
  for (int i = 0; i < n_splits; ++i) sum += partial[i * count + place];
  results.out[place] = (u16)Element::pair(scaled(results, (int)(place % results.width), sum), 0.0f);
}

// ---------------------------------------------------------------------------------------------------------------------
// z = x D.  Grid: tiles of 16 atoms (padding included), groups of 8 N tokens, shares of in_features.
// D and x have rows of `row_length` numbers, whole 16 bytes, that are zero beyond in_features.

constexpr int AHEAD = 4;  // pairs of 16-byte loads of D that a lane has under way

template <class Element, int N>
struct Wide {  // D in the type of x: a lane owns 8 of 32 numbers
  static constexpr int LANE = 8;
  uint4 d[2], x[N];

  __device__ __forceinline__ void load(bool inside, const u8* const (&rows)[2], const u16* const (&tokens)[N], int at) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      d[r] = inside ? load_once((const uint4*)(rows[r] + (i64)at * 2)) : make_uint4(0u, 0u, 0u, 0u);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = load_eight(inside ? tokens[n] : nullptr, at);
  }

  __device__ __forceinline__ void multiply(float (&c)[N][4]) const {
    const u32 first[4] = {d[0].x, d[1].x, d[0].y, d[1].y}, second[4] = {d[0].z, d[1].z, d[0].w, d[1].w};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      Element::multiply_add(c[n], first, x[n].x, x[n].y);
      Element::multiply_add(c[n], second, x[n].z, x[n].w);
    }
  }
};

template <class Element, int N>
struct Narrow {  // D in bytes: a lane owns 16 of 64 numbers
  static constexpr int LANE = 16;
  uint4 d[2], x[N][2];

  __device__ __forceinline__ void load(bool inside, const u8* const (&rows)[2], const u16* const (&tokens)[N], int at) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      d[r] = inside ? load_once((const uint4*)(rows[r] + at)) : make_uint4(0u, 0u, 0u, 0u);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      x[n][0] = load_eight(inside ? tokens[n] : nullptr, at);
      x[n][1] = load_eight(inside ? tokens[n] : nullptr, at + 8);
    }
  }

  __device__ __forceinline__ void multiply(float (&c)[N][4]) const {
    const u32 words[2][4] = {{d[0].x, d[0].y, d[0].z, d[0].w}, {d[1].x, d[1].y, d[1].z, d[1].w}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 a[4];
      widen<Element>(words[0][i], a[0], a[2]);
      widen<Element>(words[1][i], a[1], a[3]);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const uint4 half = x[n][i / 2];
        Element::multiply_add(c[n], a, i % 2 ? half.z : half.x, i % 2 ? half.w : half.y);
      }
    }
  }
};

template <class Element, class Chunk, int N>
__device__ __forceinline__ void project(const u8* dictionary, const u16* x, const Results& results, int n_atoms,
                                        int row_length, int row_bytes) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
  const int group = lane >> 2, quarter = lane & 3;
  const int token = blockIdx.y * TOKENS * N;
  const u8* rows[2];
  const u16* tokens[N];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Beyond the last atom its row is read once more; `give` writes zeros there.
    const int atom = min((int)blockIdx.x * TILE + r * 8 + group, n_atoms - 1);
    rows[r] = dictionary + (i64)atom * row_bytes;
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int t = token + n * TOKENS + group;
    tokens[n] = t < results.n_tokens ? x + (i64)t * row_length : nullptr;
  }
  float c[N][4] = {};
  constexpr int STEP = 4 * Chunk::LANE;
  const int n_chunks = (row_length + STEP - 1) / STEP, n_shares = n_warps * gridDim.z;
  const int own = blockIdx.z * n_warps + warp;
  const int stop = share(n_chunks, own + 1, n_shares);
  for (int chunk = share(n_chunks, own, n_shares); chunk < stop; chunk += AHEAD) {
    Chunk parts[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int at = (chunk + i) * STEP + quarter * Chunk::LANE;
      parts[i].load(chunk + i < stop && at < row_length, rows, tokens, at);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) parts[i].multiply(c);
  }
  float* sums = (float*)shared;
#pragma unroll
  for (int n = 0; n < N; ++n) keep_tile(sums, TILE, (warp * N + n) * TOKENS, 0, c[n]);
  __syncthreads();
  for (int i = threadIdx.x; i < N * TOKENS * TILE; i += blockDim.x) {
    if (token + i / TILE >= results.n_tokens) continue;
    float sum = 0.0f;
    for (int w = 0; w < n_warps; ++w) sum += sums[w * N * TOKENS * TILE + i];
    give<Element>(results, token + i / TILE, blockIdx.x * TILE + i % TILE, sum);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// y = z S.  Grid: W tiles of 16 columns, groups of 8 N tokens, shares of the slabs.  W warps lie side by side over the
// columns, so that they share z in the first-level cache; the rest of the block shares the slabs of a tile.

struct Slabs {
  const u32* masks;
  const int* offsets;  // of the values of each slab, in units of 16 bytes; ends with their number
  const u8* values;
  const int* columns;  // where the columns of each tile begin in y; ends with their number
  int n_slabs;         // of a tile
  int first_tile;      // of those wanted
  int n_tiles;         // wanted
  int stage_bytes;     // room for a slab in shared memory
};

template <class Element, class Values, int N, int W>
__device__ __forceinline__ void combine(const Slabs& slabs, const u16* z, const Results& results) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_parts = (blockDim.x >> 5) / W;
  const int side = warp % W, part = warp / W;
  const int token = blockIdx.y * TOKENS * N;
  const int tile = blockIdx.x * W + side;
  float c[N][4] = {};
  if (tile < slabs.n_tiles) {
    const int n_shares = n_parts * gridDim.z, own = blockIdx.z * n_parts + part;
    const int start = share(slabs.n_slabs, own, n_shares), stop = share(slabs.n_slabs, own + 1, n_shares);
    const i64 base = (i64)(slabs.first_tile + tile) * slabs.n_slabs;
    u8* const stages = shared + (i64)warp * STAGES * slabs.stage_bytes;
    const int row = slabs.n_slabs * SLAB_ATOMS;
    const u16* tokens[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int t = token + n * TOKENS + (lane >> 2);
      tokens[n] = t < results.n_tokens ? z + (i64)t * row + (lane & 3) * 16 : nullptr;
    }
    // The end of the slab that comes next is loaded one step ahead, so that no copy waits for an address.
    int next = start, slot = 0, begin = 0, end = 0;
    if (start < stop) {
      begin = slabs.offsets[base + start];
      end = slabs.offsets[base + start + 1];
    }
    auto fetch = [&]() {
      if (next < stop) {
        fetch_slab(stages + slot * slabs.stage_bytes, slabs.masks, slabs.values, base + next, begin, end);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        begin = end;
        if (++next < stop) end = slabs.offsets[base + next + 1];
      }
      copies_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) fetch();
    int current = 0;
    for (int slab = start; slab < stop; ++slab) {
      // Of few tokens z is loaded while the slab is still on its way; of many it would take too many registers.
      constexpr bool EARLY = N <= 2;
      uint4 early[EARLY ? N : 1][2];
#pragma unroll
      for (int n = 0; EARLY && n < N; ++n) {
        early[n][0] = load_eight(tokens[n], slab * SLAB_ATOMS);
        early[n][1] = load_eight(tokens[n], slab * SLAB_ATOMS + 8);
      }
      fetch();
      copies_wait<STAGES - 1>();
      __syncwarp();
      u32 a[4][4];
      read_slab(stages + current * slabs.stage_bytes, Values(), a);
      current = current + 1 == STAGES ? 0 : current + 1;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const uint4 low = EARLY ? early[EARLY ? n : 0][0] : load_eight(tokens[n], slab * SLAB_ATOMS);
        const uint4 high = EARLY ? early[EARLY ? n : 0][1] : load_eight(tokens[n], slab * SLAB_ATOMS + 8);
        Element::multiply_add(c[n], a[0], low.x, low.y);
        Element::multiply_add(c[n], a[1], low.z, low.w);
        Element::multiply_add(c[n], a[2], high.x, high.y);
        Element::multiply_add(c[n], a[3], high.z, high.w);
      }
      __syncwarp();  // the next copy goes to the stage that was read here
    }
  }
  __syncthreads();  // the sums take the place of the stages
  float* sums = (float*)shared;
#pragma unroll
  for (int n = 0; n < N; ++n) keep_tile(sums, W * TILE, (part * N + n) * TOKENS, side * TILE, c[n]);
  __syncthreads();
  const int size = N * TOKENS * W * TILE, start = slabs.columns[slabs.first_tile];
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const int t = token + i / (W * TILE), column = i % TILE, wanted = blockIdx.x * W + i % (W * TILE) / TILE;
    if (t >= results.n_tokens || wanted >= slabs.n_tiles) continue;
    const int first = slabs.columns[slabs.first_tile + wanted];
    if (first + column >= slabs.columns[slabs.first_tile + wanted + 1]) continue;
    float sum = 0.0f;
    for (int p = 0; p < n_parts; ++p) sum += sums[p * size + i];
    give<Element>(results, t, first - start + column, sum);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// S with its zeros: the transpose, rows of whole slabs.  Grid: tiles, groups of as many slabs as a block has warps.

template <class Values>
__device__ __forceinline__ void densify(const Slabs& slabs, const float* scales, u16* dense) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int slab = blockIdx.y * (blockDim.x >> 5) + warp;
  if (slab >= slabs.n_slabs) return;  // the whole warp; no barrier of the block follows
  const int tile = slabs.first_tile + blockIdx.x;
  const i64 index = (i64)tile * slabs.n_slabs + slab;
  u8* const stage = shared + (i64)warp * slabs.stage_bytes;
  fetch_slab(stage, slabs.masks, slabs.values, index, slabs.offsets[index], slabs.offsets[index + 1]);
  copies_commit();
  const int first = slabs.columns[tile] - slabs.columns[slabs.first_tile];
  const int n_columns = slabs.columns[tile + 1] - slabs.columns[tile];
  const int group = lane >> 2;
  const float own = scales && group < n_columns ? scales[first + group] : 1.0f;
  const float other = scales && group + 8 < n_columns ? scales[first + group + 8] : 1.0f;
  copies_wait<0>();
  __syncwarp();
  u32 a[4][4];
  read_slab(stage, Values(own, other), a);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = group + 8 * half;
    if (column >= n_columns) continue;
    const i64 row = (i64)(first + column) * slabs.n_slabs * SLAB_ATOMS;
    uint4* const at = (uint4*)(dense + row + slab * SLAB_ATOMS + (lane & 3) * 16);
    at[0] = make_uint4(a[0][half], a[0][half + 2], a[1][half], a[1][half + 2]);
    at[1] = make_uint4(a[2][half], a[2][half + 2], a[3][half], a[3][half + 2]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Entry points: KIND_TYPE_BITS_TOKENS, with the type of x, the bits of a value of D or S, and the tokens of a block.

#define KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads, 1) name

#define PROJECT(name, Element, Chunk, N)                                                                           \
  KERNEL(name, 512)(const u8* dictionary, const float* scales, const u16* x, u16* z, float* partial, int n_tokens, \
                    int n_atoms, int width, int row_length, int row_bytes) {                                       \
    project<Element, Chunk<Element, N>, N>(dictionary, x, Results{z, partial, scales, n_tokens, width, n_atoms},   \
                                           n_atoms, row_length, row_bytes);                                        \
  }

#define COMBINE(name, Element, Values, N, W)                                                                          \
  KERNEL(name, N > 2 ? 256 : 512)(const u32* masks, const int* offsets, const u8* values, const int* columns,         \
                                  const float* scales, const u16* z, u16* y, float* partial, int n_slabs,             \
                                  int first_tile, int n_tiles, int stage_bytes, int n_tokens, int width) {            \
    combine<Element, Values, N, W>(Slabs{masks, offsets, values, columns, n_slabs, first_tile, n_tiles, stage_bytes}, \
                                   z, Results{y, partial, scales, n_tokens, width, width});                           \
  }

#define DENSIFY(name, Values)                                                                                          \
  KERNEL(name, 256)(const u32* masks, const int* offsets, const u8* values, const int* columns, const float* scales,   \
                    u16* dense, int n_slabs, int first_tile, int n_tiles, int stage_bytes) {                           \
    densify<Values>(Slabs{masks, offsets, values, columns, n_slabs, first_tile, n_tiles, stage_bytes}, scales, dense); \
  }

#define KERNELS(type, Element)                                                                                \
  PROJECT(project_##type##_16_8, Element, Wide, 1)                                                            \
  PROJECT(project_##type##_16_16, Element, Wide, 2)                                                           \
  PROJECT(project_##type##_8_8, Element, Narrow, 1)                                                           \
  PROJECT(project_##type##_8_16, Element, Narrow, 2)                                                          \
  COMBINE(combine_##type##_16_8, Element, SixteenBit, 1, 1)                                                   \
  COMBINE(combine_##type##_16_16, Element, SixteenBit, 2, 2)                                                  \
  COMBINE(combine_##type##_16_32, Element, SixteenBit, 4, 4)                                                  \
  COMBINE(combine_##type##_16_64, Element, SixteenBit, 8, 4)                                                  \
  COMBINE(combine_##type##_8_8, Element, EightBit<Element>, 1, 1)                                             \
  COMBINE(combine_##type##_8_16, Element, EightBit<Element>, 2, 2)                                            \
  COMBINE(combine_##type##_8_32, Element, EightBit<Element>, 4, 4)                                            \
  COMBINE(combine_##type##_8_64, Element, EightBit<Element>, 8, 4)                                            \
  DENSIFY(densify_##type##_16, SixteenBit)                                                                    \
  DENSIFY(densify_##type##_8, ScaledEightBit<Element>)                                                        \
  KERNEL(finish_##type, 256)(const float* partial, const float* scales, u16* out, int n_splits, int n_tokens, \
                             int width, int n_valid) {                                                        \
    finish<Element>(partial, Results{out, nullptr, scales, n_tokens, width, n_valid}, n_splits);              \
  }

KERNELS(bf16, BFloat16)
KERNELS(f16, Float16)
