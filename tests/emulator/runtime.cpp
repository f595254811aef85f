// runtime.cpp -- fibers, scheduling, memory, the detector and the counters.
//
// Clusters of blocks run one after the other; within one, a thread runs until it waits for others. The seed sets the
// order of clusters, warps and lanes and the moment an asynchronous copy lands; seed 0 is ascending order and the
// latest moment.
//
// The detector keeps a vector clock for each thread and, for every two bytes of memory, who wrote last and two of those
// who read since. Two accesses race when one writes, they are not both atomic or strong, and no barrier orders them;
// nothing orders two blocks. What copies and multiplies on its own has entries in the clocks like a thread.

#include "collectives.h"
#include "internals.h"

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <numeric>
#include <string>
#include <sys/mman.h>
#include <tuple>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

constexpr u32 SHARED_LIMIT = 227 * 1024;  // bytes a block may have
constexpr u32 REDZONE = 1024;             // bytes behind the dynamic array, as the translator leaves between others
constexpr u32 PENDING = 0xffffffffu;      // clock of a write whose asynchronous copy has not been waited for

Index ntid, nctaid;
u32 dynamic_shared_bytes, branches, shared_size, block_warps, cluster_size;
Extent* last_extent;
u8 *shared_memory, *shared_valid;
const u8* parameters;
const KernelInfo* kernel;
u32 threads, block_threads, clock_size;
bool random_order;

// ---- state ------------------------------------------------------------------------------------------------------

struct Copy {
  u8* to;
  const u8* from;  // null: the source was out of bounds
  u32 bytes, source_bytes, shared;
  bool landed;
};
struct Logged {
  u32 counter;                             // index in `traffic`
  u64 address;
  u32 bytes;
};
struct Fiber {
  Thread thread;
#ifdef __x86_64__
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  u8* stack;
  State state;
  int site;                                // where it waits
  u32 id, reduced, waits_for;               // number of the barrier, or address of the mbarrier
  u64 phase;
  u32 cluster_phase;                       // that it waits for at the barrier of the cluster; 0: it has not arrived
  std::vector<Copy> open;                  // copies since the last commit
  std::vector<std::vector<Copy>> groups;   // committed, oldest first
  std::vector<Logged> log;
};
struct Barrier {
  u32 rank, arrived, expected, popc, all, any;
  int site;
  std::vector<u32> clock;
};
struct Mbarrier {
  u32 count, pending;              // arrivals of a phase, and how many are missing
  long expected, under_way;        // bytes that are to come in this phase, and that copies are bringing
  u64 phase;
  u32 initialised_by;
  bool visible;                    // to the copy engine
  std::vector<u32> arrived, over;  // clocks: of all who have arrived, of those who had in the phases that are over
};
struct Cell {
  u32 write_block, write_clock, read_block[2], read_clock[2];
  u16 writer, reader[2];
  u8 strong_write, strong_read[2], written;
};
struct Report {
  std::string kind, text;
  int site;
  u64 count;
};
struct Traffic {
  u64 requests, bytes, sectors, least_sectors, wavefronts, least_wavefronts;
};

static std::vector<Fiber> fibers;
static std::vector<std::array<Meeting, 32>> meetings;  // by warp; arrived == 0: free
constexpr u32 BARRIERS = 16;                           // of a block
static std::vector<Barrier> barriers;                  // [block, number]
static struct {
  u32 phase, arrived;
  std::vector<u32> arrivals, over;                     // clocks
} cluster_barrier;
static std::map<u32, Mbarrier> mbarriers;
static std::vector<Extent> extents, hints;
static std::vector<u8> shared_flags;
static std::vector<u32> clocks;                        // [thread, thread]
static std::vector<Cell> shared_cells;
static Cell* global_cells;
static std::vector<Report> reports;
static std::vector<Traffic> traffic;                   // two a site: global, shared
static u64 touched;                                    // bytes of global memory that something has read or written
static std::map<std::pair<u32, u32>, u32> engines;     // (kind, number) -> entry in the clocks
static Fiber* running;
static u32 live, stack_bytes;
static std::vector<u32> live_in;                       // by block of the cluster
static Index first_ctaid;                              // of the cluster
static u64 parameter_bytes;
static u32 block_number;                               // 1 for the first cluster that runs
static bool aborted;
static bool turn_over;                                 // other warps go first, this one may be waiting for them
static bool idle;                                      // the thread that ran last has only asked again
static u64 random_state;
static const u64* chosen_blocks;                       // null: all of the grid
static u64 block_count;
static std::vector<u32> block_order;                   // empty: an arithmetic progression modulo the count
static u64 first_block, block_stride;
static double time_limit;
static std::chrono::steady_clock::time_point start;

u32 random_below(u32 n) {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return u32((random_state >> 11) % n);
}

// The cluster that runs as number i, as an index into the grid of clusters.
static u64 block_at(u64 i) {
  if (!block_order.empty()) i = block_order[i];
  else i = u64((first_block + (unsigned __int128)i * block_stride) % block_count);
  return chosen_blocks ? chosen_blocks[i] : i;
}

// ---- reports ----------------------------------------------------------------------------------------------------

void report(const char* kind, int site, const Thread* thread, const char* format, ...) {
  for (Report& r : reports)
    if (r.site == site && r.kind == kind) {
      r.count++;
      return;
    }
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  int length = std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (thread && length < int(sizeof text))
    std::snprintf(text + length, sizeof text - length, "; thread (%u, %u, %u) of block (%u, %u, %u)", thread->tid.x,
                  thread->tid.y, thread->tid.z, thread->ctaid.x, thread->ctaid.y, thread->ctaid.z);
  reports.push_back({kind, text, site, 1});
}

// ---- fibers -----------------------------------------------------------------------------------------------------

#ifdef __x86_64__
static void* scheduler_stack_pointer;
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static void to_scheduler() { emulator_switch(&running->stack_pointer, scheduler_stack_pointer); }
static void to_fiber() { emulator_switch(&scheduler_stack_pointer, running->stack_pointer); }
static void prepare(Fiber& f, void (*entry)()) {
  void** top = reinterpret_cast<void**>(f.stack + stack_bytes - 64);  // 16-byte aligned at the call of `entry`
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  f.stack_pointer = top - 6;  // the six saved registers
}
#else
static ucontext_t scheduler_context;
static void to_scheduler() { swapcontext(&running->context, &scheduler_context); }
static void to_fiber() { swapcontext(&scheduler_context, &running->context); }
static void prepare(Fiber& f, void (*entry)()) {
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = stack_bytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, entry, 0);
}
#endif

void wait(State state, int site) {
  running->state = state;
  running->site = site;
  to_scheduler();
}
void wake(u32 thread) { fibers[thread].state = READY; }

// Ends the launch. The fiber is never resumed, so nothing on its stack may need a destructor.
void abort_launch() {
  aborted = true;
  to_scheduler();
  __builtin_unreachable();
}

void trap(Thread& self, int site) {
  report("trap", site, &self, "the kernel executed trap");
  abort_launch();
}

static bool out_of_time(int site, const Thread* self) {
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (seconds > time_limit) report("hang", site, self, "still running after %.3g s", time_limit);
  return seconds > time_limit;
}

void watch(Thread& self, int site) {
  if (out_of_time(site, &self)) abort_launch();
  turn_over = idle = true;
  wait(READY, site);
}

// ---- clocks -----------------------------------------------------------------------------------------------------

u32* clock_of(u32 thread) { return &clocks[u64(thread) * clock_size]; }
static void join(u32* into, const u32* from) {
  for (u32 i = 0; i < clock_size; i++) into[i] = std::max(into[i], from[i]);
}
static void publish(u32 thread, std::vector<u32>& to) {
  if (!TRACE) return;
  join(to.data(), clock_of(thread));
  clock_of(thread)[thread]++;
}
static void receive(u32 thread, const std::vector<u32>& from) {
  if (TRACE) join(clock_of(thread), from.data());
}

u32 engine(Engine kind, u32 number) {
  const auto found = engines.find({kind, number});
  if (found != engines.end()) return found->second;
  if (engines.size() == engine_limit) {
    report("launch", -1, nullptr, "more than %u mbarriers, warpgroups and threads that copy", engine_limit);
    abort_launch();
  }
  return engines[{kind, number}] = threads + u32(engines.size());
}

static std::string name_of_actor(u32 id) {
  if (id < threads) return "thread " + std::to_string(id);
  for (const auto& [key, entry] : engines) {
    const std::string number = std::to_string(key.first == ARRIVALS ? key.second % WINDOW : key.second);
    if (entry != id) continue;
    if (key.first == ARRIVALS) return "a copy that counts on the mbarrier at shared address " + number;
    if (key.first == PRODUCTS) return "the products of warpgroup " + number;
    return "a bulk copy of thread " + number;
  }
  return "nobody";
}

Actor actor_of(const Thread& self) {
  if (!TRACE) return {&self, nullptr, self.id, 0, false};
  const u32* clock = clock_of(self.id);
  return {&self, clock, self.id, clock[self.id], false};
}

// What the thread knows of is visible to engines from now on.
void fence_async(Thread& self) {
  for (auto& [address, b] : mbarriers) b.visible |= b.initialised_by == self.id;
  if (!TRACE || !engine_limit) return;
  u32* clock = clock_of(self.id);
  u32* visible = clock + threads + engine_limit;
  for (u32 i = 0; i < threads; i++) visible[i] = std::max(visible[i], clock[i]);
}

void fence_mbarrier_init(Thread& self) {
  for (auto& [address, b] : mbarriers) b.visible |= b.initialised_by == self.id;
}

// ---- the detector -----------------------------------------------------------------------------------------------

static const Extent shared_extent{};  // stands for shared memory: nothing is there when a block starts

struct Name {
  char text[24];
};
static Name name_of(const Extent& e) {
  Name n{"a module variable"};
  if (&e == &shared_extent) return {"shared memory"};
  if (e.argument >= 0) std::snprintf(n.text, sizeof n.text, "argument %d", e.argument);
  return n;
}

static bool unordered(const Actor& by, u32 block, u32 clock, u32 other) {
  if (clock == 0) return false;
  return block != block_number || clock == PENDING || by.seen[other] < clock;
}

static void check(const Actor& by, int site, Cell& c, Kind kind, const Extent& where) {
  const bool writes = kind != READ && kind != STRONG_READ, reads = !writes || kind == ATOMIC;
  const bool strong = kind == ATOMIC || kind == STRONG_READ || kind == STRONG_WRITE;
  const char* what = writes ? "write to" : "read of";
  if (!(strong && c.strong_write) && unordered(by, c.write_block, c.write_clock, c.writer)) {
    if (c.write_clock == PENDING && c.write_block == block_number)
      report("pending", site, by.thread, "%s %s before the copy that thread %u started was waited for", what,
             name_of(where).text, c.writer);
    else
      report("race", site, by.thread, "%s %s races with a write by %s of block %llu", what, name_of(where).text,
             name_of_actor(c.writer).c_str(), (unsigned long long)block_at(c.write_block - 1) * cluster_size);
  } else if (by.engine && &where == &shared_extent && c.write_block == block_number && c.writer < threads &&
             by.seen[threads + engine_limit + c.writer] < c.write_clock) {
    report("fence", site, by.thread, "an engine's %s what thread %u wrote, with no fence.proxy.async in between", what,
           c.writer);
  }
  if (reads && !c.written && where.initialised != ALWAYS)
    report("uninitialised", site, by.thread, "read of %s, never written", name_of(where).text);
  if (writes) {
    for (int i = 0; i < 2; i++)
      if (!(strong && c.strong_read[i]) && unordered(by, c.read_block[i], c.read_clock[i], c.reader[i]))
        report("race", site, by.thread, "write to %s races with a read by %s of block %llu", name_of(where).text,
               name_of_actor(c.reader[i]).c_str(), (unsigned long long)block_at(c.read_block[i] - 1) * cluster_size);
    c.write_block = block_number;
    c.write_clock = kind == ASYNC_WRITE ? PENDING : by.now;
    c.writer = u16(by.id);
    c.strong_write = strong;
    c.written = 1;
  } else {
    if (c.reader[0] == by.id && c.read_clock[0] == by.now && c.read_block[0] == block_number &&
        c.strong_read[0] == strong)
      return;
    // A read that this one is ordered after can be forgotten: what races with it races with this one too.
    int slot = 0;
    while (slot < 2 && unordered(by, c.read_block[slot], c.read_clock[slot], c.reader[slot])) slot++;
    if (slot == 2) slot = int(random_state = random_state * 6364136223846793005u + 1) < 0;
    c.read_block[slot] = block_number;
    c.read_clock[slot] = by.now;
    c.reader[slot] = u16(by.id);
    c.strong_read[slot] = strong;
  }
}

// ---- the counters -----------------------------------------------------------------------------------------------

constexpr u32 BANKS = 32, SECTOR = 32;

template <class T>
static u32 distinct(T* first, T* last) {
  if (!std::is_sorted(first, last)) std::sort(first, last);
  return u32(std::unique(first, last) - first);
}

// Wavefronts of lanes that are served at once: the most distinct words in a bank.
static u32 wavefronts(const Logged* first, const Logged* last) {
  u64 words[BANKS][BANKS];  // a lane has at most 32 bytes, together 128
  u32 in_bank[BANKS] = {}, most = 1;
  for (; first != last; first++)
    for (u64 w = first->address / 4; w <= (first->address + first->bytes - 1) / 4; w++) {
      u32& n = in_bank[w % BANKS];
      if (std::find(words[w % BANKS], words[w % BANKS] + n, w) != words[w % BANKS] + n) continue;
      words[w % BANKS][n++] = w;
      most = std::max(most, n);
    }
  return most;
}

// One instruction, executed once by lanes of a warp.
static void count_request(const Logged* first, const Logged* last) {
  Traffic& t = traffic[first->counter];
  const u32 bytes = first->bytes, lanes = u32(last - first);
  t.requests++;
  t.bytes += u64(bytes) * lanes;
  if (first->counter % 2) {
    const u32 together = bytes <= 4 ? 32 : std::max(1u, 128 / bytes);  // lanes served at once: 128 bytes
    for (u32 i = 0; i < lanes; i += together) {
      t.wavefronts += wavefronts(first + i, first + std::min(lanes, i + together));
      t.least_wavefronts++;
    }
  } else {
    u64 elements[32], sectors[64], *e = elements, *s = sectors;  // aligned accesses of at most 32 bytes
    for (; first != last; first++) {
      *e++ = first->address;
      for (u64 n = first->address / SECTOR; n <= (first->address + bytes - 1) / SECTOR; n++) *s++ = n;
    }
    t.sectors += distinct(sectors, s);
    t.least_sectors += (distinct(elements, e) * bytes + SECTOR - 1) / SECTOR;
  }
}

// Lanes meet in a request by the count of how often each has executed the instruction since the last flush.
static void flush_counters(u32 rank) {
  if (!TRACE) return;
  struct Request {
    u32 lanes;
    Logged log[32];
  };
  static std::vector<u32> most, executed, base, used;  // by counter, and the counters that occur
  static std::vector<Request> requests;
  most.resize(traffic.size()), executed.resize(traffic.size()), base.resize(traffic.size());
  for (u32 warp = rank * block_warps; warp < (rank + 1) * block_warps; warp++) {
    const u32 low = warp * 32, high = std::min(threads, low + 32);
    u32 count = 0;
    used.clear();
    for (u32 i = low; i < high; i++) {
      for (const Logged& l : fibers[i].log) {
        if (most[l.counter] == 0 && executed[l.counter] == 0) used.push_back(l.counter);
        executed[l.counter]++;
      }
      for (u32 c : used) most[c] = std::max(most[c], executed[c]), executed[c] = 0;
    }
    for (u32 c : used) base[c] = count, count += most[c], most[c] = 0;
    if (requests.size() < count) requests.resize(count);
    for (u32 r = 0; r < count; r++) requests[r].lanes = 0;
    for (u32 i = low; i < high; i++) {
      for (const Logged& l : fibers[i].log) {
        Request& r = requests[base[l.counter] + executed[l.counter]++];
        r.log[r.lanes++] = l;
      }
      for (u32 c : used) executed[c] = 0;
      fibers[i].log.clear();
    }
    for (u32 r = 0; r < count; r++) count_request(requests[r].log, requests[r].log + requests[r].lanes);
  }
}

// ---- memory -----------------------------------------------------------------------------------------------------

static void check_all(const Actor& by, int site, Cell* cells, u64 bytes, Kind kind, const Extent& where) {
  for (u64 i = 0; i <= (bytes - 1) / cell_bytes; i++) check(by, site, cells[i], kind, where);
}

static const char* name_of(Kind kind) { return kind == READ || kind == STRONG_READ ? "read" : "write"; }

u32 canonical(const Thread& self, u64 address) {
  return u32(address) < WINDOW ? in_block(u32(address), self.rank) : u32(address);
}

u8* memory_of(u32 address) { return shared_memory + u64(address / WINDOW - 1) * shared_size; }

// Whether the block of a canonical address can be reached.
static bool is_there(const Thread& self, int site, u32 place) {
  const u32 rank = place / WINDOW - 1;
  if (rank == self.rank || (rank < cluster_size && live_in[rank])) return true;
  report("bounds", site, &self, "shared memory of block %u of the cluster, which %s", rank,
         rank < cluster_size ? "has ended" : "is not there");
  return false;
}

u8* shared_access(const Actor& by, int site, u32 address, u32 bytes, Kind kind) {
  const u32 place = canonical(*by.thread, address), at = place % WINDOW;
  if (!is_there(*by.thread, site, place)) return nullptr;
  // Between two arrays lie more bytes than an access has.
  if (u64(at) + bytes > shared_size || !shared_valid[at] || !shared_valid[at + bytes - 1]) {
    long nearest = 1l << 40;
    u32 array = 0;
    const auto distance = [&](u32 low, u32 size, u32 index) {
      const long d = long(at) - (at >= low ? long(low + size) : long(low));
      if (std::labs(d) < std::labs(nearest)) nearest = d, array = index;
    };
    for (u32 i = 0; i < kernel->array_count; i++) distance(kernel->arrays[i].offset, kernel->arrays[i].size, i);
    distance(kernel->dynamic_offset, dynamic_shared_bytes, kernel->array_count);
    report("bounds", site, by.thread, "%s of %u bytes, %ld bytes %s shared array %u%s", name_of(kind), bytes,
           std::labs(nearest), nearest < 0 ? "before" : "past the end of", array,
           array == kernel->array_count ? " (dynamic)" : "");
    return nullptr;
  }
  u8* const memory = memory_of(place);
  if (TRACE) check_all(by, site, &shared_cells[(memory - shared_memory + at) / cell_bytes], bytes, kind, shared_extent);
  return memory + at;
}

static u8* resolve_shared(Thread& self, int site, u32 at, u32 bytes, Kind kind) {
  u8* p = shared_access(actor_of(self), site, at, bytes, kind);
  if (TRACE && p) self.fiber->log.push_back({2 * u32(site) + 1, at % WINDOW, bytes});
  return p;
}

static bool find_extent(const Thread& self, int site, u64 address, u64 bytes, Kind kind) {
  const bool reads = kind == READ || kind == STRONG_READ;
  const auto holds = [&](const Extent& e) {
    return address >= e.low && address + bytes <= e.high && (reads || e.writable);
  };
  if (holds(last_extent[site])) return true;
  const auto found = std::find_if(extents.begin(), extents.end(), holds);
  if (found != extents.end()) {
    last_extent[site] = *found;
    return true;
  }
  for (const Extent& e : extents)
    if (address >= e.low && address + bytes <= e.high) {
      report("read-only", site, &self, "write to %s, which is read-only", name_of(e).text);
      return false;
    }
  long nearest = std::numeric_limits<long>::max();
  Name name{"anything"};
  for (const Extent& e : extents) {
    const long d = address >= e.high ? long(address - e.high) : address < e.low ? long(address - e.low) : 0;
    if (std::labs(d) < std::labs(nearest)) nearest = d, name = name_of(e);
  }
  report("bounds", site, &self, "%s of %llu bytes, %ld bytes %s %s", name_of(kind), (unsigned long long)bytes,
         std::labs(nearest), nearest < 0 ? "before" : "past the end of", name.text);
  return false;
}

static void check_global(const Actor& by, int site, u64 address, u64 bytes, Kind kind) {
  const Extent& e = last_extent[site];
  check_all(by, site, global_cells + e.shadow + (address - e.low) / cell_bytes, bytes, kind, e);
}

static u8* resolve_global(Thread& self, int site, u64 address, u32 bytes, Kind kind) {
  if (!find_extent(self, site, address, bytes, kind)) return nullptr;
  if (TRACE) {
    check_global(actor_of(self), site, address, bytes, kind);
    self.fiber->log.push_back({2 * u32(site), address, bytes});
  }
  return reinterpret_cast<u8*>(address);
}

// One line of what an engine copies; it is counted as a request.
u8* global_access(const Actor& by, int site, u64 address, u64 bytes, Kind kind) {
  if (!find_extent(*by.thread, site, address, bytes, kind)) return nullptr;
  if (TRACE) {
    check_global(by, site, address, bytes, kind);
    Traffic& t = traffic[2 * site];
    t.requests++, t.bytes += bytes;
    t.sectors += (address + bytes - 1) / SECTOR - address / SECTOR + 1;
    t.least_sectors += (bytes + SECTOR - 1) / SECTOR;
  }
  return reinterpret_cast<u8*>(address);
}

bool aligned(const Thread& self, int site, u64 address, u32 bytes) {
  if (!(address & (bytes - 1))) return true;  // a power of two
  report("alignment", site, &self, "address is no multiple of %u bytes", bytes);
  return false;
}

bool in_parameters(u64 address, u64 bytes) {
  return address >= u64(parameters) && address + bytes <= u64(parameters) + parameter_bytes;
}

u8* resolve(Thread& self, int site, Space space, u64 address, u32 bytes, Kind kind) {
  const u64 stack = u64(self.fiber->stack);
  const bool on_stack = address >= stack && address + bytes <= stack + stack_bytes;
  if (space == GENERIC) {
    const bool shared = address - u64(shared_memory) < u64(shared_size) * cluster_size;
    if (shared) space = SHARED, address = shared_from_generic(self, address);
    else space = on_stack ? LOCAL : GLOBAL;
  }
  if (!aligned(self, site, address, bytes)) return nullptr;
  if (space == SHARED) return resolve_shared(self, site, u32(address), bytes, kind);
  if (space == GLOBAL) return resolve_global(self, site, address, bytes, kind);
  if (on_stack) return reinterpret_cast<u8*>(address);
  report("bounds", site, &self, "%s of %u bytes outside of local memory", name_of(kind), bytes);
  return nullptr;
}

// ---- barriers and meetings --------------------------------------------------------------------------------------

static void release(Barrier& b) {
  for (Fiber& f : fibers) {
    if (f.state != AT_BARRIER || f.waits_for != u32(&b - barriers.data())) continue;
    f.state = READY;
    f.reduced = b.popc | b.all << 16 | b.any << 17;
    receive(f.id, b.clock);
  }
  if (b.expected == 0) flush_counters(b.rank);
  b.arrived = 0;
}

// A barrier of the whole block opens when all threads that are left have arrived; that some had exited is reported.
static bool complete(const Barrier& b) {
  if (b.expected) return b.arrived >= b.expected;
  const u32 left = live_in[b.rank];
  if (b.arrived < left) return false;
  if (left < block_threads)
    report("divergence", b.site, nullptr, "%u threads wait at the barrier, %u have exited; block (%u, %u, %u)", left,
           block_threads - left, first_ctaid.x + b.rank, first_ctaid.y, first_ctaid.z);
  return true;
}

u32 barrier(Thread& self, int site, u32 id, u32 count, bool waits, Reduction reduction, u32 value) {
  if (id >= BARRIERS || count % 32 || count > block_threads) {
    report("barrier", site, &self, "barrier %u of %u threads is not possible in a block of %u", id, count,
           block_threads);
    abort_launch();
  }
  id += self.rank * BARRIERS;
  Barrier& b = barriers[id];
  if (b.arrived == 0) {
    b.expected = count, b.site = site, b.popc = b.any = 0, b.all = 1;
    if (TRACE) b.clock.assign(clock_size, 0);
  } else if (b.expected != count || (count == 0 && b.site != site)) {
    report("divergence", site, &self, "threads of one block wait at two different barriers");
  }
  b.arrived++, b.popc += value != 0, b.all &= value != 0, b.any |= value != 0;
  publish(self.id, b.clock);
  if (waits) self.fiber->waits_for = id, self.fiber->state = AT_BARRIER;
  if (complete(b)) release(b);
  if (!waits) return 0;
  if (self.fiber->state == AT_BARRIER) wait(AT_BARRIER, site);
  const u32 r = self.fiber->reduced;
  return reduction == POPC ? r & 0xffff : reduction == AND ? r >> 16 & 1 : r >> 17;
}

// The barrier of a cluster opens when all threads that are left have arrived.
static void open_cluster() {
  if (!cluster_barrier.arrived || cluster_barrier.arrived < live) return;
  cluster_barrier.arrived = 0, cluster_barrier.phase++;
  if (TRACE) join(cluster_barrier.over.data(), cluster_barrier.arrivals.data());
}

void arrive_in_cluster(Thread& self, int site, bool releases) {
  if (self.fiber->cluster_phase) {
    report("barrier", site, &self, "the thread arrives a second time before it has waited for the cluster");
    abort_launch();
  }
  if (releases) publish(self.id, cluster_barrier.arrivals);
  self.fiber->cluster_phase = cluster_barrier.phase + 1;
  cluster_barrier.arrived++;
  open_cluster();
}

void wait_for_cluster(Thread& self, int site) {
  if (!self.fiber->cluster_phase) {
    report("barrier", site, &self, "the thread waits for the cluster before it has arrived");
    abort_launch();
  }
  if (cluster_barrier.phase < self.fiber->cluster_phase) wait(AT_CLUSTER, site);
  self.fiber->cluster_phase = 0;
  receive(self.id, cluster_barrier.over);
}

void leave(Thread& self) {
  leave_products(self);
  self.fiber->state = DONE;
  live--, live_in[self.rank]--;
  for (Barrier& b : barriers)
    if (b.rank == self.rank && b.arrived && b.expected == 0 && live_in[b.rank] && complete(b)) release(b);
  open_cluster();
  to_scheduler();
  __builtin_unreachable();
}

u32 active_mask(Thread& self) {
  u32 mask = 0;
  for (u32 l = 0; l < 32; l++) {
    const u32 i = self.warp * 32 + l;
    if (i < threads && fibers[i].state != DONE) mask |= 1u << l;
  }
  return mask;
}

void meet(Thread& self, int site, u32 mask, const void* in, void* out, Combine combine, bool orders_memory) {
  if (!(mask >> self.lane & 1)) {
    report("divergence", site, &self, "the mask 0x%08x does not name the lane that executes", mask);
    abort_launch();
  }
  Meeting* m = nullptr;
  for (Meeting& each : meetings[self.warp])
    if (each.arrived && each.mask == mask) m = &each;
  if (!m) {
    for (Meeting& each : meetings[self.warp])
      if (!each.arrived) m = &each;
    m->mask = mask, m->site = site;
  } else if (m->site != site) {
    report("divergence", site, &self, "lanes of one warp execute different instructions together");
    abort_launch();
  }
  m->arrived |= 1u << self.lane;
  m->threads[self.lane] = &self, m->in[self.lane] = in, m->out[self.lane] = out;
  if (m->arrived != mask) return wait(AT_MEETING, site);
  combine(*m);
  if (orders_memory && TRACE) {
    static std::vector<u32> clock;
    clock.assign(clock_size, 0);
    for (u32 l = 0; l < 32; l++)
      if (mask >> l & 1) publish(m->threads[l]->id, clock);
    for (u32 l = 0; l < 32; l++)
      if (mask >> l & 1) receive(m->threads[l]->id, clock);
  }
  for (u32 l = 0; l < 32; l++)
    if (mask >> l & 1) m->threads[l]->fiber->state = READY;
  m->arrived = 0;
}

// ---- asynchronous copies ----------------------------------------------------------------------------------------

static void land(Copy& c) {
  if (c.landed) return;
  const u32 n = c.from ? c.source_bytes : 0;
  if (n) std::memcpy(c.to, c.from, n);
  std::memset(c.to + n, 0, c.bytes - n);
  c.landed = true;
}

void copy_async(Thread& self, int site, u64 shared, u64 global, u32 bytes, u32 source_bytes) {
  if (!aligned(self, site, global, bytes) || !aligned(self, site, shared, bytes)) return;
  if (source_bytes > bytes) {
    report("bounds", site, &self, "copy of %u bytes from a source of %u", bytes, source_bytes);
    return;
  }
  Copy c{nullptr, nullptr, bytes, source_bytes, u32(shared), false};
  if (source_bytes) c.from = resolve_global(self, site, global, source_bytes, READ);
  c.to = resolve_shared(self, site, c.shared, bytes, ASYNC_WRITE);
  if (!c.to) return;
  if (random_order && random_below(2)) land(c);
  self.fiber->open.push_back(c);
}

void commit_group(Thread& self) {
  self.fiber->groups.push_back(std::move(self.fiber->open));
  self.fiber->open.clear();
}

static void finish(Thread& self, std::vector<Copy>& group) {
  for (Copy& c : group) {
    land(c);
    if (!TRACE) continue;
    for (u32 i = 0; i < c.bytes / cell_bytes; i++) {
      Cell& cell = shared_cells[c.shared / cell_bytes + i];
      if (cell.writer == self.id && cell.write_clock == PENDING) cell.write_clock = clock_of(self.id)[self.id];
    }
  }
}

void wait_group(Thread& self, u32 groups_left) {
  auto& groups = self.fiber->groups;
  while (groups.size() > groups_left) {
    finish(self, groups.front());
    groups.erase(groups.begin());
  }
  // Groups that need not be complete may be.
  if (random_order)
    for (auto& group : groups)
      for (Copy& c : group)
        if (random_below(2)) land(c);
}

void wait_all(Thread& self) {
  commit_group(self);
  wait_group(self, 0);
}

// ---- mbarriers --------------------------------------------------------------------------------------------------

static Mbarrier& mbarrier_at(Thread& self, int site, u64 address) {
  const u32 place = canonical(self, address);
  if (!is_there(self, site, place)) abort_launch();
  const auto found = mbarriers.find(place);
  if (found == mbarriers.end()) {
    report("barrier", site, &self, "mbarrier used before it is initialised");
    abort_launch();
  }
  return found->second;
}

void mbarrier_init(Thread& self, int site, u64 address, u32 count) {
  if (!access(self, site, SHARED, address, 8, STRONG_WRITE)) abort_launch();
  const std::vector<u32> clock(clock_size);
  mbarriers[canonical(self, address)] = {count, count, 0, 0, 0, self.id, false, clock, clock};
}

void mbarrier_invalidate(Thread& self, int site, u64 address) {
  mbarrier_at(self, site, address);
  mbarriers.erase(canonical(self, address));
}

static void end_phase(const Thread& self, int site, Mbarrier& b) {
  if (b.pending || b.expected) return;
  if (b.under_way)
    report("barrier", site, &self,
           "a phase of an mbarrier ends while copies bring it %ld bytes: more come than expected", b.under_way);
  b.phase++, b.pending = b.count;
  if (TRACE) join(b.over.data(), b.arrived.data());
}

constexpr u32 MOST_BYTES = (1 << 20) - 1;  // that a phase can expect

void mbarrier_expect(Thread& self, int site, u64 address, u32 bytes) {
  Mbarrier& b = mbarrier_at(self, site, address);
  b.expected += bytes;
  if (bytes > MOST_BYTES || b.expected > long(MOST_BYTES)) {
    report("barrier", site, &self, "an mbarrier expects %ld bytes, %u are possible", b.expected, MOST_BYTES);
    abort_launch();
  }
}

void mbarrier_complete(Thread& self, int site, u64 address, u32 bytes) {
  Mbarrier& b = mbarrier_at(self, site, address);
  b.expected -= bytes;
  end_phase(self, site, b);
}

u64 mbarrier_arrive(Thread& self, int site, u64 address, u32 count) {
  Mbarrier& b = mbarrier_at(self, site, address);
  if (count > b.pending) {
    report("barrier", site, &self, "more arrivals at an mbarrier than it was initialised for");
    abort_launch();
  }
  const u64 phase = b.phase;
  publish(self.id, b.arrived);
  b.pending -= count;
  end_phase(self, site, b);
  return phase;
}

Actor begin_transaction(Thread& self, int site, u32 address, u32 bytes) {
  Mbarrier& b = mbarrier_at(self, site, address);
  if (!b.visible)
    report("fence", site, &self, "a copy counts on an mbarrier with no fence.mbarrier_init after its initialisation");
  b.under_way += bytes;
  if (!TRACE) return actor_of(self);
  return {&self, clock_of(self.id), engine(ARRIVALS, address), u32(b.phase) + 1, true};
}

void complete_transaction(const Thread& self, int site, u32 address, u32 bytes) {
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) return report("barrier", site, &self, "an mbarrier that a copy counts on is gone");
  Mbarrier& b = found->second;
  b.under_way -= bytes, b.expected -= bytes;
  end_phase(self, site, b);
}

static bool passed(u64 current, u64 phase, bool parity) {
  return parity ? (current & 1) != (phase & 1) : current > phase;
}

bool mbarrier_test(Thread& self, int site, u64 address, u64 phase, bool parity, bool waits) {
  if (!passed(mbarrier_at(self, site, address).phase, phase, parity)) {
    if (waits) {
      self.fiber->waits_for = canonical(self, address);
      self.fiber->phase = phase << 1 | parity;
    }
    turn_over = idle = true;
    wait(waits ? AT_MBARRIER : READY, site);
  }
  Mbarrier& b = mbarrier_at(self, site, address);
  if (!passed(b.phase, phase, parity)) return false;
  receive(self.id, b.over);
  if (TRACE)
    if (const auto found = engines.find({ARRIVALS, canonical(self, address)}); found != engines.end()) {
      u32& seen = clock_of(self.id)[found->second];
      seen = std::max(seen, u32(b.phase));
    }
  return true;
}

static bool can_run(Fiber& f) {
  if (f.state == AT_MBARRIER) {
    const auto found = mbarriers.find(f.waits_for);
    if (found == mbarriers.end() || passed(found->second.phase, f.phase >> 1, f.phase & 1)) f.state = READY;
  }
  if (f.state == AT_CLUSTER && cluster_barrier.phase >= f.cluster_phase) f.state = READY;
  return f.state == READY;
}

// ---- launch -----------------------------------------------------------------------------------------------------

static void run_fiber() {
  kernel->run(running->thread, parameters);
  leave(running->thread);
}

static void shuffle_order(std::vector<u32>& order) {
  if (!random_order) return;
  for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_below(u32(i))]);
}

static std::vector<u32> ascending(u32 n) {
  std::vector<u32> order(n);
  for (u32 i = 0; i < n; i++) order[i] = i;
  return order;
}

static void report_deadlock() {
  u32 waiting[DONE + 1] = {};
  int site = -1;
  std::string missing;
  for (const Fiber& f : fibers) {
    waiting[f.state]++;
    if (f.state != DONE) site = f.site;
    if (f.state != AT_MBARRIER || !missing.empty()) continue;
    const Mbarrier& b = mbarriers.at(f.waits_for);
    missing = ", which lacks " + std::to_string(b.pending) + " arrivals and " + std::to_string(b.expected) + " bytes";
  }
  if (waiting[AT_CLUSTER]) missing += ", " + std::to_string(waiting[AT_CLUSTER]) + " for their cluster";
  if (waiting[AT_REGISTERS]) missing += ", " + std::to_string(waiting[AT_REGISTERS]) + " for registers";
  report("deadlock", site, nullptr,
         "%u threads wait at a barrier, %u for lanes of their warp, %u at an mbarrier%s, %u have exited; "
         "block (%u, %u, %u)",
         waiting[AT_BARRIER], waiting[AT_MEETING], waiting[AT_MBARRIER], missing.c_str(), waiting[DONE],
         first_ctaid.x, first_ctaid.y, first_ctaid.z);
}

static void reset_cluster() {
  std::memset(shared_memory, POISON, u64(shared_size) * cluster_size);
  if (TRACE) {
    clocks.assign(u64(threads) * clock_size, 0);
    for (u32 i = 0; i < threads; i++) clock_of(i)[i] = 1;
    shared_cells.assign(u64(shared_size) * cluster_size / cell_bytes + 1, Cell{});
  }
  barriers.resize(cluster_size * BARRIERS);
  for (u32 i = 0; i < barriers.size(); i++) barriers[i].rank = i / BARRIERS, barriers[i].arrived = 0;
  cluster_barrier.phase = cluster_barrier.arrived = 0;
  cluster_barrier.arrivals.assign(clock_size, 0), cluster_barrier.over.assign(clock_size, 0);
  for (auto& warp : meetings)
    for (Meeting& m : warp) m.arrived = 0;
  mbarriers.clear();
  engines.clear();
  reset_copies();
  reset_products();
  for (Fiber& f : fibers) {
    f.state = READY;
    f.cluster_phase = 0;
    f.thread.ctaid = {first_ctaid.x + f.thread.rank, first_ctaid.y, first_ctaid.z};
    f.open.clear(), f.groups.clear(), f.log.clear();
    prepare(f, run_fiber);
  }
  live = threads;
  live_in.assign(cluster_size, block_threads);
}

static void run_cluster() {
  reset_cluster();
  std::vector<u32> warps = ascending(u32(meetings.size())), lanes = ascending(32);
  while (live) {
    bool any = false, busy = false;
    shuffle_order(warps);
    for (u32 warp : warps) {
      turn_over = false;
      for (bool again = true; again && !turn_over;) {
        again = false;
        shuffle_order(lanes);
        for (u32 lane : lanes) {
          const u32 i = warp * 32 + lane;
          if (i >= threads || !can_run(fibers[i])) continue;
          running = &fibers[i];
          idle = false;
          to_fiber();
          if (aborted) return;
          any = again = true;
          busy |= !idle;
        }
        turn_over |= random_order && random_below(4) == 0;
      }
    }
    const bool now = !busy || (engine_limit && random_order && random_below(2));
    if (now && (advance_copy() || advance_product())) continue;
    if (!any) {
      report_deadlock();
      aborted = true;
      return;
    }
  }
  finish_copies();
  for (u32 rank = 0; rank < cluster_size; rank++) flush_counters(rank);
}

struct Request {
  u32 kernel, grid[3], block[3], shared_bytes;
  const u8* parameters;
  u64 parameter_bytes;
  const Extent* extents;
  u64 extent_count, shadow_cells;
  const u64* blocks;  // clusters; null: the whole grid
  u64 block_count, seed;
  double timeout;
};

static bool lay_out_shared() {
  u32 used = dynamic_shared_bytes;
  for (u32 i = 0; i < kernel->array_count; i++) used += kernel->arrays[i].size;
  if (used > SHARED_LIMIT) {
    report("launch", -1, nullptr, "%u bytes of shared memory, %u are possible", used, SHARED_LIMIT);
    return false;
  }
  shared_size = (kernel->dynamic_offset + dynamic_shared_bytes + REDZONE + 1023) / 1024 * 1024;
  static u8* memory = nullptr;
  std::free(memory);
  memory = static_cast<u8*>(std::aligned_alloc(1024, u64(shared_size) * cluster_size));
  shared_memory = memory;
  shared_flags.assign(shared_size, 0);
  shared_valid = shared_flags.data();
  for (u32 i = 0; i < kernel->array_count; i++)
    std::memset(shared_valid + kernel->arrays[i].offset, 1, kernel->arrays[i].size);
  std::memset(shared_valid + kernel->dynamic_offset, 1, dynamic_shared_bytes);
  return true;
}

static void* map_zeros(u64 bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

static void order_blocks(const Request& r) {
  chosen_blocks = r.blocks;
  block_count = r.block_count;
  first_block = 0, block_stride = 1;
  block_order.clear();
  if (!random_order) return;
  if (block_count <= 1u << 20) {
    block_order = ascending(u32(block_count));
    shuffle_order(block_order);
  } else {
    first_block = random_below(1u << 20);
    for (block_stride = 1 + random_below(1u << 20); std::gcd(block_stride, block_count) != 1;) block_stride++;
  }
}

// Marks the cells whose word is not poison as written.
static void find_written(const Extent& e) {
  for (u64 word = e.low / 4 * 4; word < e.high; word += 4) {
    bool written = false;
    const u64 low = std::max(word, e.low), high = std::min(word + 4, e.high);
    for (u64 at = low; at < high; at++) written |= *reinterpret_cast<const u8*>(at) != POISON;
    if (!written) continue;
    for (u64 at = low; at < high; at++) global_cells[e.shadow + (at - e.low) / cell_bytes].written = 1;
  }
}

static void launch(const Request& r) {
  reports.clear();
  traffic.assign(2 * site_count, Traffic{});
  touched = 0;
  aborted = false, branches = 0;
  start = std::chrono::steady_clock::now();
  time_limit = r.timeout;
  kernel = &kernels[r.kernel];
  parameters = r.parameters;
  parameter_bytes = r.parameter_bytes;
  ntid = {r.block[0], r.block[1], r.block[2]};
  nctaid = {r.grid[0], r.grid[1], r.grid[2]};
  block_threads = ntid.x * ntid.y * ntid.z;
  block_warps = (block_threads + 31) / 32;
  cluster_size = kernel->cluster_size;
  threads = block_threads * cluster_size;
  clock_size = threads + (engine_limit ? engine_limit + threads : 0);
  dynamic_shared_bytes = r.shared_bytes;
  random_order = r.seed != 0;
  random_state = 0x9e3779b97f4a7c15u * (r.seed + 1);
  if (cluster_size > 1 && (block_threads % 32 || nctaid.x % cluster_size))
    return report("launch", -1, nullptr, "a cluster of %u blocks needs whole warps, and whole clusters along x",
                  cluster_size);
  if (!lay_out_shared()) return;

  extents.assign(r.extents, r.extents + r.extent_count);
  u64 cells = r.shadow_cells;
  for (u32 i = 0; i < module_variable_count; i++) {
    const ModuleVariable& v = module_variables[i];
    extents.push_back({u64(v.address), u64(v.address) + v.size, cells, -1, v.writable, 1});
    cells += v.size / cell_bytes + 1;
  }
  hints.assign(site_count, Extent{});
  last_extent = hints.data();

  stack_bytes = u32(kernel->stack_bytes);
  u8* stacks = static_cast<u8*>(map_zeros(u64(threads) * stack_bytes));
  const u64 shadow_bytes = TRACE ? (cells + 1) * sizeof(Cell) : 0;
  global_cells = TRACE ? static_cast<Cell*>(map_zeros(shadow_bytes)) : nullptr;
  if (!stacks || (TRACE && !global_cells)) return report("launch", -1, nullptr, "out of memory");

  order_blocks(r);
  if (TRACE)
    for (const Extent& e : extents)
      if (e.initialised == IF_NOT_POISON) find_written(e);

  fibers = std::vector<Fiber>(threads);
  meetings.resize((threads + 31) / 32);
  for (u32 i = 0; i < threads; i++) {
    fibers[i].id = i;
    fibers[i].stack = stacks + u64(i) * stack_bytes;
    const u32 n = i % block_threads, rank = i / block_threads;
    const Index tid{n % ntid.x, n / ntid.x % ntid.y, n / (ntid.x * ntid.y)};
    fibers[i].thread = {tid, {}, i, i % 32, i / 32, rank, shared_memory + u64(rank) * shared_size, &fibers[i]};
  }
  for (u64 i = 0; i < block_count; i++) {
    const u64 b = block_at(i) * cluster_size, rows = b / nctaid.x;
    first_ctaid = {u32(b % nctaid.x), u32(rows % nctaid.y), u32(rows / nctaid.y)};
    block_number = u32(i) + 1;
    if (out_of_time(-1, nullptr)) break;
    run_cluster();
    if (aborted) break;
  }
  munmap(stacks, u64(threads) * stack_bytes);
  if (!global_cells) return;
  for (u64 i = 0; i < cells; i++)
    if (global_cells[i].write_block || global_cells[i].read_block[0] || global_cells[i].read_block[1]) touched += cell_bytes;
  munmap(global_cells, shadow_bytes);
}

}  // namespace emulator

// Runs a kernel. Returns a line for each report and each instruction that accessed memory, and one for all of it; valid
// until the next launch.
extern "C" __attribute__((visibility("default"))) const char* emulator_launch(const emulator::Request* request) {
  using namespace emulator;
  static std::string text;
  text.clear();
  launch(*request);
  for (const Report& r : reports)
    text += "report\t" + r.kind + '\t' + std::to_string(r.site) + '\t' + std::to_string(r.count) + '\t' + r.text + '\n';
  for (u32 i = 0; i < traffic.size(); i++) {
    const Traffic& t = traffic[i];
    if (!t.requests) continue;
    text += "traffic\t" + std::to_string(i / 2) + (i % 2 ? "\tshared" : "\tglobal");
    for (u64 value : {t.requests, t.bytes, t.sectors, t.least_sectors, t.wavefronts, t.least_wavefronts})
      text += '\t' + std::to_string(value);
    text += '\n';
  }
  text += "touched\t" + std::to_string(touched) + '\n';
  return text.c_str();
}
