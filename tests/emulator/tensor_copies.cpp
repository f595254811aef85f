// tensor_copies.cpp -- the copy engine: boxes of tensors and plain bytes, between global and shared memory.
//
// A copy is checked when it is asked for and moves its bytes later: with seed 0 when nothing else can go on or somebody
// waits for it, with other seeds at any moment from its beginning on, in any order.
//
// A box lies in shared memory row by row without gaps, and under a swizzle piece by piece of 16 bytes elsewhere: where,
// depends on the address alone. Pieces of warpgroup.cpp are found by code of its own, from other words of the manual.

#include "internals.h"

#include <algorithm>
#include <memory>

namespace emulator {

// As tensor_map.py packs it.
struct TensorMap {
  char magic[8];
  u64 address;
  u64 strides[4];   // bytes, of the axes from 1 on
  u32 last[5];      // size of an axis less one
  u16 box[5];
  u8 steps[5], rank, type, swizzle, fill;
  u8 unused[41];
};
static_assert(sizeof(TensorMap) == 128);
constexpr char MAGIC[9] = "cuconv\0\1";

constexpr u8 ELEMENT_BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // by CUtensorMapDataType
constexpr u8 TFLOAT32 = 11;
constexpr u32 PIECE = 16;

// A float as the nearest TF32, ties to even, on its way to shared memory; infinities and NaN stay as they are.
static void round_to_tf32(u8* at) {
  u32 bits;
  std::memcpy(&bits, at, sizeof bits);
  if ((bits >> 23 & 0xff) == 0xff) return;
  bits = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu;
  std::memcpy(at, &bits, sizeof bits);
}

struct Line {
  u64 global;         // what of it is in bounds ...
  u32 begin, bytes;   // ... and where that lies in the row of the box
};

struct BulkCopy {
  const Thread* thread;
  int site;
  bool loads;
  u32 mbarrier;             // of a load; canonical, as the next one
  u32 shared, row_bytes, swizzle;
  std::vector<Line> rows;   // one each, `bytes` 0 where it is outside
  u8 fill;
  bool rounds;              // floats, to TF32
  std::vector<u8> read;     // what a store has read
  bool has_read, done, waited_for;

  u32 bytes() const { return row_bytes * u32(rows.size()); }

  // Where byte `at` of the box lies: pieces of a line of 128 bytes are exchanged, by the number of that line.
  u32 place(u32 at) const {
    const u32 address = shared + at, line = address / 128, piece = address / PIECE % 8;
    const u32 lines = swizzle == 3 ? 8 : swizzle == 2 ? 4 : swizzle == 1 ? 2 : 1;  // until the pattern repeats
    return line * 128 + (piece ^ line % lines) * PIECE + address % PIECE;
  }

  void load() {
    for (u32 r = 0; r < rows.size(); r++) {
      const Line& line = rows[r];
      const u8* from = reinterpret_cast<const u8*>(line.global);
      for (u32 at = 0; at < row_bytes; at += PIECE) {
        u8* to = memory_of(shared) + place(r * row_bytes + at) % WINDOW;
        for (u32 i = 0; i < PIECE; i++) to[i] = at + i - line.begin < line.bytes ? from[at + i - line.begin] : fill;
        for (u32 i = 0; rounds && i < PIECE; i += 4) round_to_tf32(to + i);
      }
    }
  }
  void read_shared() {
    read.resize(bytes());
    const u8* memory = memory_of(shared);
    for (u32 at = 0; at < bytes(); at += PIECE) std::memcpy(&read[at], memory + place(at) % WINDOW, PIECE);
    has_read = true;
  }
  void write_global() {
    for (u32 r = 0; r < rows.size(); r++)
      if (const Line& line = rows[r]; line.bytes)
        std::memcpy(reinterpret_cast<void*>(line.global), &read[r * row_bytes + line.begin], line.bytes);
  }

  void advance() {
    if (loads) {
      load();
      done = true;
      complete_transaction(*thread, site, mbarrier, bytes());
    } else if (!has_read) {
      read_shared();
    } else {
      write_global();
      done = true;
    }
  }
};

struct Stores {  // of a thread
  u32 begun = 0;                                           // groups, the open one among them
  std::vector<std::shared_ptr<BulkCopy>> open;
  std::vector<std::vector<std::shared_ptr<BulkCopy>>> groups;  // oldest first
};

static void commit_stores(Stores& of) {
  if (of.open.empty()) of.begun++;  // an empty group counts too
  of.groups.push_back(std::move(of.open));
  of.open.clear();
}

static std::vector<std::shared_ptr<BulkCopy>> under_way;
static std::vector<Stores> stores;  // by thread

void reset_copies() {
  under_way.clear();
  stores.assign(engine_limit ? threads : 0, Stores{});
}

bool advance_copy() {
  if (under_way.empty()) return false;
  const u32 chosen = random_order ? random_below(u32(under_way.size())) : 0;
  const std::shared_ptr<BulkCopy> copy = under_way[chosen];
  copy->advance();
  std::erase_if(under_way, [](const auto& each) { return each->done; });
  return true;
}

void finish_copies() {
  const auto complain = [](const BulkCopy& copy) {
    report("pending", copy.site, copy.thread, "the block ends before a copy %s its shared memory is waited for",
           copy.loads ? "into" : "out of");
  };
  for (const auto& copy : under_way)
    if (copy->loads) complain(*copy);
  for (Stores& mine : stores) {
    commit_stores(mine);
    for (const auto& group : mine.groups)
      for (const auto& copy : group)
        if (!copy->waited_for) complain(*copy);
  }
  while (advance_copy()) {
  }
}

static void start(const BulkCopy& copy) {
  const auto started = std::make_shared<BulkCopy>(copy);
  under_way.push_back(started);
  if (!started->loads) stores[started->thread->id].open.push_back(started);
  if (random_order && random_below(4) == 0) advance_copy();
}

// Checks both sides of a copy whose rows are known; false: reported.
static bool check(const BulkCopy& c, const Actor& shared_side, const Actor& global_side) {
  const Kind from = READ, to = WRITE;
  for (u32 at = 0; at < c.bytes(); at += PIECE)
    if (!shared_access(shared_side, c.site, c.place(at), PIECE, c.loads ? to : from)) return false;
  for (const Line& line : c.rows)
    if (line.bytes && !global_access(global_side, c.site, line.global, line.bytes, c.loads ? from : to)) return false;
  return true;
}

// `blocks` 0: to the address itself; else to its place in every block whose bit is set, and on the mbarrier there.
static void start_load(Thread& self, BulkCopy copy, u64 mbarrier, u32 blocks) {
  copy.mbarrier = canonical(self, mbarrier);
  const auto start_one = [&] {
    if (check(copy, begin_transaction(self, copy.site, copy.mbarrier, copy.bytes()), actor_of(self))) start(copy);
  };
  if (!blocks) return start_one();
  for (u32 rank = 0; blocks >> rank; rank++) {
    if (!(blocks >> rank & 1)) continue;
    copy.mbarrier = in_block(copy.mbarrier, rank), copy.shared = in_block(copy.shared, rank);
    start_one();
  }
}

static void start_store(Thread& self, const BulkCopy& copy) {
  Stores& mine = stores[self.id];
  if (mine.open.empty()) mine.begun++;
  Actor reads = actor_of(self), writes = reads;
  if (TRACE) {
    reads = {&self, clock_of(self.id), engine(READS_OF_STORES, self.id), mine.begun, true};
    writes = {&self, clock_of(self.id), engine(WRITES_OF_STORES, self.id), mine.begun, true};
  }
  if (check(copy, reads, writes)) start(copy);
}

// ---- boxes ------------------------------------------------------------------------------------------------------

// The copy of a box, without the sides' checks; no rows: reported.
static BulkCopy box_of(Thread& self, int site, bool loads, u64 map, const s32* start, u32 rank, u64 shared) {
  BulkCopy copy{&self, site, loads, 0, canonical(self, shared), 0, 0, {}, 0, false, {}, false, false, false};
  TensorMap m;
  const bool parameter = in_parameters(map, sizeof m);
  if (!parameter && !global_access(actor_of(self), site, map, sizeof m, READ)) return copy;
  if (!aligned(self, site, parameter ? map - u64(parameters) : map, 64)) return copy;
  std::memcpy(&m, reinterpret_cast<const void*>(map), sizeof m);
  if (std::memcmp(m.magic, MAGIC, sizeof m.magic)) {
    report("copy", site, &self, "the address is not that of a tensor map");
    return copy;
  }
  if (m.rank != rank) {
    report("copy", site, &self, "%u coordinates for a tensor map of %u axes", rank, m.rank);
    return copy;
  }
  if (!aligned(self, site, copy.shared, 128)) return copy;

  const u32 element = ELEMENT_BYTES[m.type];
  copy.row_bytes = m.box[0] * element;
  copy.swizzle = m.swizzle;
  if (m.swizzle && copy.row_bytes != 16u << m.swizzle) {
    report("copy", site, &self, "rows of %u bytes under a swizzle of %u: the manual leaves open where they lie",
           copy.row_bytes, 16u << m.swizzle);
    return copy;
  }
  copy.fill = m.fill ? POISON : 0;
  copy.rounds = loads && m.type == TFLOAT32;
  const auto inside = [](s64 at, s64 last) { return std::clamp<s64>(at, 0, last + 1); };
  const s64 first = inside(start[0], m.last[0]), end = inside(s64(start[0]) + m.box[0], m.last[0]);

  u32 counts[5] = {1, 1, 1, 1, 1}, total = 1;
  for (u32 axis = 1; axis < rank; axis++)
    total *= counts[axis] = (m.box[axis] + m.steps[axis] - 1) / m.steps[axis];
  for (u32 r = 0; r < total; r++) {
    Line line{m.address + u64(first) * element, u32(first - start[0]) * element, u32(end - first) * element};
    for (u32 axis = 1, rest = r; axis < rank; rest /= counts[axis++]) {
      const s64 at = s64(start[axis]) + s64(rest % counts[axis]) * m.steps[axis];
      if (at < 0 || at > m.last[axis]) line.bytes = 0;
      line.global += u64(at) * m.strides[axis - 1];
    }
    copy.rows.push_back(line);
  }
  return copy;
}

void load_box(Thread& self, int site, u64 shared, u64 map, const s32* start, u32 rank, u64 mbarrier, u32 blocks) {
  const BulkCopy copy = box_of(self, site, true, map, start, rank, shared);
  if (!copy.rows.empty()) start_load(self, copy, mbarrier, blocks);
}

void store_box(Thread& self, int site, u64 map, const s32* start, u32 rank, u64 shared) {
  const BulkCopy copy = box_of(self, site, false, map, start, rank, shared);
  if (!copy.rows.empty()) start_store(self, copy);
}

// ---- plain bytes ------------------------------------------------------------------------------------------------

// The same without a map: one row.
static BulkCopy bytes_of(Thread& self, int site, bool loads, u64 shared, u64 global, u32 bytes) {
  BulkCopy copy{&self, site, loads, 0, canonical(self, shared), bytes, 0, {}, 0, false, {}, false, false, false};
  if (bytes % PIECE) report("copy", site, &self, "a copy of %u bytes, no multiple of %u", bytes, PIECE);
  else if (bytes && aligned(self, site, shared, PIECE) && aligned(self, site, global, PIECE))
    copy.rows.push_back({global, 0, bytes});
  return copy;
}

void load_bytes(Thread& self, int site, u64 shared, u64 global, u32 bytes, u64 mbarrier, u32 blocks) {
  const BulkCopy copy = bytes_of(self, site, true, shared, global, bytes);
  if (!copy.rows.empty()) start_load(self, copy, mbarrier, blocks);
}

void store_bytes(Thread& self, int site, u64 global, u64 shared, u32 bytes) {
  const BulkCopy copy = bytes_of(self, site, false, shared, global, bytes);
  if (!copy.rows.empty()) start_store(self, copy);
}

// ---- groups of stores -------------------------------------------------------------------------------------------

void commit_stores(Thread& self) { commit_stores(stores[self.id]); }

void wait_stores(Thread& self, u32 groups_left, bool until_read) {
  Stores& mine = stores[self.id];
  if (mine.groups.size() <= groups_left) return;
  const u32 over = u32(mine.groups.size()) - groups_left;
  for (u32 i = 0; i < over; i++)
    for (const auto& copy : mine.groups[i]) {
      while (!(until_read ? copy->has_read : copy->done)) copy->advance();
      copy->waited_for = true;
    }
  std::erase_if(under_way, [](const auto& each) { return each->done; });
  if (TRACE) {
    const u32 last = mine.begun - !mine.open.empty() - groups_left;
    u32* clock = clock_of(self.id);
    for (const Engine kind : {READS_OF_STORES, WRITES_OF_STORES})
      if (kind == READS_OF_STORES || !until_read) {
        u32& seen = clock[engine(kind, self.id)];
        seen = std::max(seen, last);
      }
  }
  if (!until_read) mine.groups.erase(mine.groups.begin(), mine.groups.begin() + over);
}

}  // namespace emulator
