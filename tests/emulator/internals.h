// internals.h -- what runtime.cpp shares with tensor_copies.cpp and warpgroup.cpp.

#pragma once
#include "runtime.h"

#include <vector>

namespace emulator {

// ---- scheduling -------------------------------------------------------------------------------------------------

enum State { READY, AT_BARRIER, AT_MEETING, AT_MBARRIER, AT_CLUSTER, AT_REGISTERS, DONE };

extern u32 threads;        // of the blocks that run together: a cluster
extern u32 block_threads;
extern bool random_order;  // the seed is not 0
u32 random_below(u32 n);
void wait(State, int site);  // the running thread, until it is woken
void wake(u32 thread);
[[noreturn]] void abort_launch();
__attribute__((format(printf, 4, 5))) void report(const char* kind, int site, const Thread*, const char* format, ...);

// ---- the detector -----------------------------------------------------------------------------------------------

// A clock has an entry for each thread, for each engine, and again for each thread: up to when its writes are known to
// be visible to engines. An engine is what works on its own, in an order of its own: the copies that count on one
// mbarrier, the copies of one thread into global memory, the products of one warpgroup.
u32* clock_of(u32 thread);
extern u32 clock_size;
enum Engine { ARRIVALS, READS_OF_STORES, WRITES_OF_STORES, PRODUCTS };
u32 engine(Engine, u32 number);  // its entry in the clocks, a new one at first use; only where TRACE is set

// Who accesses memory, and what is ordered before it.
struct Actor {
  const Thread* thread;  // as reports name it: itself, or who asked the engine
  const u32* seen;       // a clock
  u32 id, now;           // its own entry there, and what that is when the access happens
  bool engine;
};
Actor actor_of(const Thread&);

// Memory as an actor accesses it; null: reported. Up to 128 bytes of shared memory, any number of global memory.
u8* shared_access(const Actor&, int site, u32 at, u32 bytes, Kind);
u8* global_access(const Actor&, int site, u64 address, u64 bytes, Kind);
bool aligned(const Thread&, int site, u64 address, u32 bytes);
u32 canonical(const Thread&, u64 shared_address);  // with its block, as other blocks have it
u8* memory_of(u32 canonical);                     // the shared memory of that block
bool in_parameters(u64 address, u64 bytes);
extern const u8* parameters;
extern const KernelInfo* kernel;  // that runs

// ---- mbarriers --------------------------------------------------------------------------------------------------

// A copy that counts on an mbarrier begins, and ends; by its canonical address.
Actor begin_transaction(Thread&, int site, u32 mbarrier, u32 bytes);
void complete_transaction(const Thread&, int site, u32 mbarrier, u32 bytes);

// ---- engines, as runtime.cpp drives them ------------------------------------------------------------------------

void reset_copies();
bool advance_copy();            // one of those under way; false: none is
void finish_copies();           // the blocks have ended
void reset_products();
bool advance_product();
void leave_products(Thread&);   // the thread exits

}  // namespace emulator
