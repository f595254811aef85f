// boxes.cu -- a box of a tensor of 1 to 5 axes into shared memory, its bytes as they lie there, and out again.
//
//   out = the box of `from` at `load`, `bytes` of it, as it lies in shared memory, `skipped` bytes after its beginning
//   the box of `to` at `store` = the same, as the other map has it

#include "sm90.cuh"

struct Start {
  int at[5];
};

#define TEXT(x) #x
#define COORDINATES(s) "r"(s.at[0]), "r"(s.at[1]), "r"(s.at[2]), "r"(s.at[3]), "r"(s.at[4])

#define BOXES(RANK, AXES)                                                                                              \
  extern "C" __global__ void __launch_bounds__(64)                                                                     \
      boxes##RANK(const __grid_constant__ Map from, const __grid_constant__ Map to, u32* out, Start load, Start store, \
                  int skipped, int bytes) {                                                                            \
    extern __shared__ __align__(1024) u32 memory[];                                                                    \
    __shared__ u64 full;                                                                                               \
    u32* tile = memory + skipped / 4;                                                                                  \
    if (threadIdx.x == 0) {                                                                                            \
      init(&full, 1);                                                                                                  \
      fence_init();                                                                                                    \
      arrive_expecting(&full, bytes);                                                                                  \
      asm volatile("prefetch.tensormap [%0];" ::"l"(&from) : "memory");                                                \
      asm volatile("cp.async.bulk.tensor." TEXT(RANK) "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "    \
                   "[%0], [%1, " AXES "], [%2];"                                                                       \
                   ::"r"(shared_address(tile)), "l"(&from), "r"(shared_address(&full)), COORDINATES(load)              \
                   : "memory");                                                                                        \
    }                                                                                                                  \
    __syncthreads();                                                                                                   \
    wait(&full, 0);                                                                                                    \
    for (int i = threadIdx.x; i < bytes / 4; i += 64) out[i] = tile[i];                                                \
    if (threadIdx.x == 0) {                                                                                            \
      asm volatile("cp.async.bulk.tensor." TEXT(RANK) "d.global.shared::cta.tile.bulk_group [%1, " AXES "], [%0];"     \
                   ::"r"(shared_address(tile)), "l"(&to), "r"(0), COORDINATES(store) : "memory");                      \
      commit_stores();                                                                                                 \
      wait_until_written<0>();                                                                                         \
    }                                                                                                                  \
  }

BOXES(1, "{%3}")
BOXES(2, "{%3, %4}")
BOXES(3, "{%3, %4, %5}")
BOXES(4, "{%3, %4, %5, %6}")
BOXES(5, "{%3, %4, %5, %6, %7}")

// Plain bytes there and back:  y = x, n of them, a multiple of 16 and at most 1024.
extern "C" __global__ void bytes(const u32* x, u32* y, u32 n) {
  __shared__ alignas(128) u32 tile[256];
  __shared__ u64 full;
  if (threadIdx.x == 0) {
    init(&full, 1);
    fence_init();
    arrive_expecting(&full, n);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(tile)), "l"(x), "r"(n), "r"(shared_address(&full)) : "memory");
    wait(&full, 0);
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 ::"l"(y), "r"(shared_address(tile)), "r"(n) : "memory");
    commit_stores();
    wait_until_read<0>();
#ifdef BUG_OUTPUT_WAIT
    y[0] = y[1];
#endif
  }
}
