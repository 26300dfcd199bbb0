// Kernels with one fault each, which the emulator must find.

extern "C" void reads_without_barrier(u32* out) {
  DYNAMIC_SHARED(shared);
  ((u32*)shared)[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = ((u32*)shared)[(threadIdx.x + 32) % blockDim.x];
}

extern "C" void reads_with_barrier(u32* out) {
  DYNAMIC_SHARED(shared);
  ((u32*)shared)[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = ((u32*)shared)[(threadIdx.x + 32) % blockDim.x];
}

extern "C" void reads_copy_too_early(const u32* in, u32* out) {
  DYNAMIC_SHARED(shared);
  copy_async(shared + threadIdx.x * 16, in + threadIdx.x * 4);
  copies_commit();
  copies_wait<1>();
  out[threadIdx.x] = ((u32*)shared)[threadIdx.x * 4];
}

extern "C" void copies_from_odd_address(const u32* in, u32* out) {
  DYNAMIC_SHARED(shared);
  copy_async(shared, in + 1);
  out[threadIdx.x] = 0;
}

extern "C" void reads_beyond_the_end(const u32* in, u32* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

extern "C" void reads_beyond_shared(u32* out) {
  DYNAMIC_SHARED(shared);
  ((u32*)shared)[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = ((u32*)shared)[threadIdx.x + 1];
}

extern "C" void leaves_before_barrier(u32* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

extern "C" void half_a_warp_at_a_barrier(u32* out) {
  if (threadIdx.x % 2) __syncthreads();
  out[threadIdx.x] = 0;
}

extern "C" void shuffles_in_a_branch(u32* out) {
  u32 found;
  if (threadIdx.x % 2) {
    found = __shfl_sync(0xffffffffu, threadIdx.x, 0);
  } else {
    found = __shfl_up_sync(0xffffffffu, threadIdx.x, 1);
  }
  out[threadIdx.x] = found;
}
