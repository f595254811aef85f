// runtime.h -- what a translated kernel calls. One thread of a block is a fiber; runtime.cpp schedules them.
//
// Every access and every collective carries its site: the index of its instruction in the module, by which reports
// and counters are attributed to source lines. TRACE=1 adds the detector and the counters; bounds are checked always,
// and an access that is out of bounds is reported and not performed (a load gives 0).

#pragma once
#include "arithmetic.h"

namespace emulator {

// Kernels are long and run briefly: without optimisation they build in a third of the time, and what they call is
// optimised in any case.
#ifdef __clang__
#define KERNEL __attribute__((optnone, noinline))
#else
#define KERNEL __attribute__((optimize("O0")))
#endif

struct Index {
  u32 x, y, z;
};

struct Fiber;
struct Thread {
  Index tid, ctaid;
  u32 id, lane, warp;  // the first and the last one counted over the blocks of the cluster
  u32 rank;            // of the block in its cluster
  u8* shared;          // memory of the block
  Fiber* fiber;
};
extern Index ntid, nctaid;
extern u32 dynamic_shared_bytes, block_warps, cluster_size;

enum Space { GENERIC, GLOBAL, SHARED, LOCAL };
// Strong: volatile, relaxed, acquire, release.
enum Kind { READ, WRITE, ATOMIC, ASYNC_WRITE, STRONG_READ, STRONG_WRITE };

// ---- memory -----------------------------------------------------------------------------------------------------

// The bytes [low, high) that an argument or a module variable may be accessed in.
struct Extent {
  u64 low, high;
  u64 shadow;        // index of the first shadow cell
  int argument;      // -1: a variable of the module
  u8 writable, initialised;  // ALWAYS ...
};
enum { NEVER, ALWAYS, IF_NOT_POISON };
constexpr u8 POISON = 0xff;  // in every byte: NaN in every float type
extern Extent* last_extent;  // by site: where its previous access went, most often the right one again
extern u8* shared_memory;    // of all blocks of the cluster, `shared_size` bytes each
extern u8* shared_valid;     // one flag a byte: inside a shared array
extern u32 shared_size;

u8* resolve(Thread&, int site, Space, u64 address, u32 bytes, Kind);  // null: reported

inline u8* access(Thread& self, int site, Space space, u64 address, u32 bytes, Kind kind) {
#if !TRACE
  if (space == GLOBAL) {
    const Extent& e = last_extent[site];
    if (address >= e.low && address + bytes <= e.high && address % bytes == 0) return reinterpret_cast<u8*>(address);
  } else if (space == SHARED) {
    const u32 at = u32(address);
    if (u64(at) + bytes <= shared_size && shared_valid[at] && shared_valid[at + bytes - 1] && at % bytes == 0)
      return self.shared + at;
  }
#endif
  return resolve(self, site, space, address, bytes, kind);
}

template <class T, int N>
inline std::array<T, N> load(Thread& self, int site, Space space, u64 address, Kind kind = READ) {
  std::array<T, N> v{};
  if (const u8* p = access(self, site, space, address, sizeof v, kind)) std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T, int N>
inline void store(Thread& self, int site, Space space, u64 address, std::array<T, N> v, Kind kind = WRITE) {
  if (u8* p = access(self, site, space, address, sizeof v, kind)) std::memcpy(p, &v, sizeof v);
}
// Parameters of kernels and functions: memory of the host, of known layout.
template <class T, int N>
inline std::array<T, N> load_parameter(u64 address) {
  std::array<T, N> v;
  std::memcpy(&v, reinterpret_cast<const void*>(address), sizeof v);
  return v;
}

template <class T, size_t N>
inline void store_parameter(u64 address, std::array<T, N> v) {
  std::memcpy(reinterpret_cast<void*>(address), &v, sizeof v);
}

// Fibers switch only at calls into the runtime, so a plain read-modify-write is atomic.
template <class T, class F>
inline T atomic(Thread& self, int site, Space space, u64 address, F update) {
  u8* p = access(self, site, space, address, sizeof(T), ATOMIC);
  if (!p) return T{};
  T before;
  std::memcpy(&before, p, sizeof before);
  const T after = update(before);
  std::memcpy(p, &after, sizeof after);
  return before;
}

// Shared memory of other blocks of the cluster begins at a multiple of WINDOW, that of the own block at 0 as well.
constexpr u32 WINDOW = 1 << 24;
inline u32 in_block(u32 address, u32 rank) { return address % WINDOW + (rank + 1) * WINDOW; }
inline u64 generic_from_shared(Thread& self, u64 address) {
  const u32 at = u32(address), rank = at < WINDOW ? self.rank : at / WINDOW - 1;
  return u64(shared_memory) + u64(rank) * shared_size + at % WINDOW;
}
inline u64 shared_from_generic(Thread& self, u64 address) {
  const u64 offset = address - u64(shared_memory);
  const u32 rank = u32(offset / shared_size), at = u32(offset % shared_size);
  return rank == self.rank ? at : in_block(at, rank);
}

// ---- control ----------------------------------------------------------------------------------------------------

void watch(Thread&, int site);  // every 4096 backward branches: the watchdog, and a turn for the others
[[noreturn]] void leave(Thread&);
[[noreturn]] void trap(Thread&, int site);
extern u32 branches;
inline void backward(Thread& self, int site) {
  if (++branches % 4096 == 0) watch(self, site);
}

// ---- barriers and collectives -----------------------------------------------------------------------------------

enum Reduction { POPC, AND, OR };
// `threads` 0: the whole block. Returns the reduction of `value` over the threads.
u32 barrier(Thread&, int site, u32 id, u32 threads, bool wait = true, Reduction = POPC, u32 value = 0);
void arrive_in_cluster(Thread&, int site, bool releases);
void wait_for_cluster(Thread&, int site);

// Lanes of a warp meet: the last one to arrive computes from all inputs to all outputs.
struct Meeting {
  u32 mask, arrived;
  int site;
  Thread* threads[32];
  const void* in[32];
  void* out[32];
};
using Combine = void (*)(Meeting&);
void meet(Thread&, int site, u32 mask, const void* in, void* out, Combine, bool orders_memory = false);
u32 active_mask(Thread&);

// ---- asynchronous copies and mbarriers --------------------------------------------------------------------------

void copy_async(Thread&, int site, u64 shared, u64 global, u32 bytes, u32 source_bytes);
void commit_group(Thread&);
void wait_group(Thread&, u32 groups_left);
void wait_all(Thread&);

void mbarrier_init(Thread&, int site, u64 address, u32 count);
void mbarrier_invalidate(Thread&, int site, u64 address);
void mbarrier_expect(Thread&, int site, u64 address, u32 bytes);
void mbarrier_complete(Thread&, int site, u64 address, u32 bytes);
u64 mbarrier_arrive(Thread&, int site, u64 address, u32 count);  // returns the phase arrived in
bool mbarrier_test(Thread&, int site, u64 address, u64 phase, bool parity, bool wait);

// ---- bulk copies (tensor_copies.cpp) ----------------------------------------------------------------------------

// Coordinates innermost first. Loads count on an mbarrier, stores belong to a group of their thread.
void load_box(Thread&, int site, u64 shared, u64 map, const s32* start, u32 rank, u64 mbarrier, u32 blocks);
void store_box(Thread&, int site, u64 map, const s32* start, u32 rank, u64 shared);
void load_bytes(Thread&, int site, u64 shared, u64 global, u32 bytes, u64 mbarrier, u32 blocks);
void store_bytes(Thread&, int site, u64 global, u64 shared, u32 bytes);
void commit_stores(Thread&);
void wait_stores(Thread&, u32 groups_left, bool until_read);
void fence_async(Thread&);
void fence_mbarrier_init(Thread&);

// ---- warpgroups (warpgroup.cpp) ---------------------------------------------------------------------------------

enum Element { HALF, BFLOAT, TF32 };
struct Multiply {
  Element element;
  u32 columns;
  bool transposed_a, transposed_b, negated_a, negated_b;
};
// D [64, columns] += A [64, 32 bytes] B [32 bytes, columns]. `a` null: A lies in shared memory. `d` is given back as
// tokens, for which wait_products() puts the sums into registers.
void multiply(Thread&, int site, const Multiply&, const u32* a, u64 descriptor_a, u64 descriptor_b, bool adds, u32* d);
void commit_products(Thread&);
void wait_products(Thread&, u32 groups_left, u32* const* registers, u32 count);
void read_token(Thread&, int site);
void change_registers(Thread&, int site, u32 count, bool more);

// A NaN that no instruction makes; its lower bits number a sum of the thread.
constexpr u32 TOKEN = 0x7fa00000, TOKENS = 1 << 20;
inline bool is_token(u32 bits) { return bits - TOKEN < TOKENS; }
// What an ordinary instruction reads of a register that can be a sum.
template <class T>
inline T settled(Thread& self, int site, T v) {
  if (is_token(std::bit_cast<u32>(v))) read_token(self, site);
  return v;
}

// ---- the module, as the translator writes it --------------------------------------------------------------------

struct SharedArray {
  u32 offset, size;
};
struct KernelInfo {
  void (*run)(Thread&, const u8* parameters);
  const SharedArray* arrays;
  u32 array_count, dynamic_offset;
  u64 stack_bytes;
  u32 most_threads, least_blocks, most_registers;  // its launch bounds; 0 where the text has none
  u32 cluster_size;
};
struct ModuleVariable {
  u8* address;
  u64 size;
  bool writable;
};
extern const KernelInfo kernels[];
extern const ModuleVariable module_variables[];
extern const u32 module_variable_count, site_count;
extern const u32 engine_limit;  // 0 where the module has nothing that an engine does
extern const u32 cell_bytes;  // of memory that share a shadow cell: 1 if the module accesses single bytes, else 2

}  // namespace emulator
