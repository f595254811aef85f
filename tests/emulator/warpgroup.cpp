// warpgroup.cpp -- what 128 threads do together: products on the tensor cores, and the trade with registers.
//
// A product is checked when the last thread has asked for it, and made later: with seed 0 when it is waited for, with
// other seeds at any moment from then on. Until then its sums are tokens, numbers of entries in a list of the thread.
// Products of a warpgroup are made one after the other, so a product may add to the sums of those before it.

#include "internals.h"

#include <algorithm>
#include <deque>

namespace emulator {

constexpr u32 WARPGROUP = 128, ROWS = 64, DEPTH_BYTES = 32, MOST_COLUMNS = 256;

// ---- matrices in shared memory ----------------------------------------------------------------------------------

// What a matrix descriptor says. Where the sum runs along memory, 8 rows of `width` bytes follow each other, and the
// next 8 come after `stride`; without a swizzle the width is 16 bytes, and the second half of the sum comes after
// `leading`. Where it runs across memory (transposed), a line of `width` bytes is one index of the sum: 8 lines follow
// each other, the next 8 come after `stride`, and the rows beyond `width` bytes after `leading`; without a swizzle the
// other way round. These are the canonical layouts of the manual.
struct Matrix {
  u32 start, leading, stride, base, width;
  bool transposed;

  Matrix(u64 descriptor, bool transposed) : transposed(transposed) {
    constexpr u32 WIDTHS[] = {16, 128, 64, 32};
    const auto distance = [&](int low) { return u32(descriptor >> low & 0x3fff) * 16; };
    start = distance(0), leading = distance(16), stride = distance(32);
    base = u32(descriptor >> 49 & 7);
    width = WIDTHS[descriptor >> 62];
  }

  // The address of 16 bytes: of row `line`, from byte 16 * piece of the sum on; where transposed, of index `line` of
  // the sum, from byte 16 * piece of the rows on.
  u32 address(u32 line, u32 piece) const {
    const u32 within = 16 * piece % width, beyond = 16 * piece / width;
    const bool plain = width == 16;
    const u32 eighth = transposed && plain ? leading : stride;  // from 8 lines to the next
    const u32 across = transposed && plain ? stride : leading;
    const u32 at = start + line % 8 * width + line / 8 * eighth + within + beyond * across;
    // The swizzle: bits 4 to 6 are flipped by bits 7 to 9, or the lower of them; `base` says where the pattern begins.
    return at ^ (((at >> 7) - base) & (width / 16 - 1)) << 4;
  }

  u32 lines(u32 rows, u32 depth) const { return transposed ? depth : rows; }
  u32 pieces(u32 rows, u32 element_bytes) const { return transposed ? rows * element_bytes / 16 : DEPTH_BYTES / 16; }
};

static f32 value_of(Element element, const u8* p, u32 index) {
  u16 half;
  u32 word;
  if (element == TF32) {
    std::memcpy(&word, p + 4 * index, 4);
    return std::bit_cast<f32>(word & ~0x1fffu);  // the unit ignores these bits
  }
  std::memcpy(&half, p + 2 * index, 2);
  return f32(element == HALF ? wide(std::bit_cast<f16>(half)) : wide(bf16{half}));
}

// ---- state ------------------------------------------------------------------------------------------------------

struct Input {  // of a thread
  u32 a[4];
  std::vector<u32> sums;  // entries of its list
};
struct Product {
  Multiply form;
  int site;
  bool a_in_registers, adds;
  u64 a, b;  // descriptors
  u32 number;
  const u8* memory;  // of the block
  std::vector<Input> in;
};
struct Warpgroup {
  u32 rank, first;  // its block, and its first thread
  u32 arrived, issued;
  int site;
  Product next;
  std::deque<Product> under_way;
  u32 registers, wanted, last;  // of a thread; what it waits for, and who of it waits
};
struct Sum {
  f32 value;
  u32 product, place;  // the last product that adds to it, and which of its sums it is there
};
struct Waiter {  // a thread
  std::vector<Sum> sums;
  std::vector<u32> groups;  // the last product of each, oldest first
  u32 issued, over;         // products
};

static std::vector<Warpgroup> warpgroups;
static std::vector<Waiter> waiters;
static std::vector<u32> free_registers;  // by block

constexpr u32 REGISTERS = 65536, MOST_REGISTERS = 256;  // of a multiprocessor; a thread

void reset_products() {
  const u32 in_block = block_threads / WARPGROUP;
  warpgroups.assign(in_block * cluster_size, Warpgroup{});
  waiters.assign(engine_limit ? threads : 0, Waiter{});
  free_registers.assign(cluster_size, 0);
  u32 at_start = kernel->most_registers;
  if (!at_start && kernel->most_threads && kernel->least_blocks)
    at_start = std::min(MOST_REGISTERS, REGISTERS / (kernel->most_threads * kernel->least_blocks) / 8 * 8);
  for (u32 i = 0; i < warpgroups.size(); i++) {
    Warpgroup& g = warpgroups[i];
    g.rank = i / in_block, g.first = g.rank * block_threads + i % in_block * WARPGROUP, g.registers = at_start;
  }
}

static u32 number_of(const Thread& self) {
  return self.rank * (block_threads / WARPGROUP) + self.id % block_threads / WARPGROUP;
}
static u32 place_of(const Thread& self) { return self.id % block_threads % WARPGROUP; }

static Warpgroup& warpgroup_of(Thread& self, int site) {
  if (self.id % block_threads / WARPGROUP >= block_threads / WARPGROUP) {
    report("divergence", site, &self, "a warpgroup is four warps, from a multiple of four on; this one has fewer");
    abort_launch();
  }
  Warpgroup& g = warpgroups[number_of(self)];
  if (g.arrived && g.site != site) {
    report("divergence", site, &self, "threads of one warpgroup execute different instructions together");
    abort_launch();
  }
  return g;
}

// Waits for all threads of the warpgroup; true: this is the last one, and calls release() when it is done.
static bool gather(int site, Warpgroup& g) {
  g.site = site;
  if (++g.arrived == WARPGROUP) return true;
  wait(AT_MEETING, site);
  return false;
}

static void release(Thread& self, Warpgroup& g) {
  g.arrived = 0;
  for (u32 i = g.first; i < g.first + WARPGROUP; i++)
    if (i != self.id) wake(i);
}

// ---- products ---------------------------------------------------------------------------------------------------

static void read_matrix(const Product& p, u64 descriptor, bool transposed, bool negated, u32 rows, f32* to) {
  const u32 bytes = p.form.element == TF32 ? 4 : 2, depth = DEPTH_BYTES / bytes, in_piece = 16 / bytes;
  const Matrix matrix(descriptor, transposed);
  for (u32 line = 0; line < matrix.lines(rows, depth); line++)
    for (u32 piece = 0; piece < matrix.pieces(rows, bytes); piece++) {
      const u8* from = p.memory + matrix.address(line, piece);
      for (u32 i = 0; i < in_piece; i++) {
        const u32 other = piece * in_piece + i, row = transposed ? other : line, k = transposed ? line : other;
        const f32 v = value_of(p.form.element, from, i);
        to[row * depth + k] = negated ? -v : v;
      }
    }
}

// Where sum j of a thread lies: its row and its column.
static u32 row_of(u32 thread, u32 j) { return thread / 32 * 16 + thread % 32 / 4 + j / 2 % 2 * 8; }
static u32 column_of(u32 thread, u32 j) { return j / 4 * 8 + thread % 4 * 2 + j % 2; }

static void make(const Product& p, u32 first) {
  static f32 a[ROWS * 16], b[MOST_COLUMNS * 16], across[16][MOST_COLUMNS], sums[ROWS][MOST_COLUMNS];
  const u32 columns = p.form.columns, in_register = p.form.element == TF32 ? 1 : 2, depth = 8 * in_register;
  if (p.a_in_registers) {
    for (u32 t = 0; t < WARPGROUP; t++)
      for (u32 i = 0; i < 4; i++)
        for (u32 e = 0; e < in_register; e++) {
          const u32 row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, k = t % 4 * in_register + e + i / 2 * (depth / 2);
          const f32 v = value_of(p.form.element, reinterpret_cast<const u8*>(&p.in[t].a[i]), e);
          a[row * depth + k] = p.form.negated_a ? -v : v;
        }
  } else {
    read_matrix(p, p.a, p.form.transposed_a, p.form.negated_a, ROWS, a);
  }
  read_matrix(p, p.b, p.form.transposed_b, p.form.negated_b, columns, b);
  for (u32 k = 0; k < depth; k++)
    for (u32 n = 0; n < columns; n++) across[k][n] = b[n * depth + k];

  const auto sum_of = [&](u32 t, u32 j) -> Sum& { return waiters[first + t].sums[p.in[t].sums[j]]; };
  for (u32 t = 0; t < WARPGROUP; t++)
    for (u32 j = 0; j < columns / 2; j++) sums[row_of(t, j)][column_of(t, j)] = p.adds ? sum_of(t, j).value : 0;
  for (u32 m = 0; m < ROWS; m++)
    for (u32 k = 0; k < depth; k++)
      for (u32 n = 0; n < columns; n++) sums[m][n] += a[m * depth + k] * across[k][n];
  for (u32 t = 0; t < WARPGROUP; t++)
    for (u32 j = 0; j < columns / 2; j++) sum_of(t, j).value = sums[row_of(t, j)][column_of(t, j)];
}

static void make_until(Warpgroup& g, u32 number) {
  for (; !g.under_way.empty() && g.under_way.front().number <= number; g.under_way.pop_front())
    make(g.under_way.front(), g.first);
}

bool advance_product() {
  if (warpgroups.empty()) return false;
  const u32 shift = random_order ? random_below(u32(warpgroups.size())) : 0;
  for (u32 i = 0; i < warpgroups.size(); i++) {
    Warpgroup& g = warpgroups[(i + shift) % warpgroups.size()];
    if (g.under_way.empty()) continue;
    make_until(g, g.under_way.front().number);
    return true;
  }
  return false;
}

// Ordered after what all threads of the warpgroup are ordered after.
static Actor products_of(Thread& self, u32 number) {
  if (!TRACE) return actor_of(self);
  static std::vector<u32> seen;
  const u32 group = number_of(self), first = warpgroups[group].first, *clock = clock_of(first);
  seen.assign(clock, clock + clock_size);
  for (u32 t = 1; t < WARPGROUP; t++) {
    clock = clock_of(first + t);
    for (u32 i = 0; i < clock_size; i++) seen[i] = std::min(seen[i], clock[i]);
  }
  return {&self, seen.data(), engine(PRODUCTS, group), number, true};
}

static bool check_matrix(const Actor& by, const Product& p, u64 descriptor, bool transposed, u32 rows) {
  const u32 bytes = p.form.element == TF32 ? 4 : 2;
  const Matrix matrix(descriptor, transposed);
  for (u32 line = 0; line < matrix.lines(rows, DEPTH_BYTES / bytes); line++)
    for (u32 piece = 0; piece < matrix.pieces(rows, bytes); piece++)
      if (!shared_access(by, p.site, matrix.address(line, piece), 16, READ)) return false;
  return true;
}

void multiply(Thread& self, int site, const Multiply& form, const u32* a, u64 descriptor_a, u64 descriptor_b, bool adds,
              u32* d) {
  Warpgroup& g = warpgroup_of(self, site);
  Waiter& mine = waiters[self.id];
  if (!g.arrived) {
    g.next = {form, site, a != nullptr, adds, descriptor_a, descriptor_b, ++g.issued, self.shared, {}};
    g.next.in.resize(WARPGROUP);
  } else if (g.next.a != descriptor_a || g.next.b != descriptor_b || g.next.adds != adds) {
    report("divergence", site, &self, "threads of one warpgroup give different descriptors, or only some add");
    abort_launch();
  }
  Input& in = g.next.in[place_of(self)];
  for (u32 i = 0; a && i < 4; i++) in.a[i] = settled(self, site, a[i]);
  for (u32 j = 0; j < form.columns / 2; j++) {
    const u32 place = j << 16 | form.columns;
    u32 entry = d[j] - TOKEN;
    if (!is_token(d[j])) {
      entry = u32(mine.sums.size());
      mine.sums.push_back({std::bit_cast<f32>(d[j]), 0, place});
      d[j] = TOKEN + entry;
    } else if (mine.sums[entry].place != place && adds) {
      report("pending", site, &self, "sums of a product that is under way are added to in another place or shape");
    }
    mine.sums[entry].product = g.next.number, mine.sums[entry].place = place;
    in.sums.push_back(entry);
  }
  mine.issued = g.next.number;
  if (!gather(site, g)) return;
  const Actor by = products_of(self, g.next.number);
  if (!(a || check_matrix(by, g.next, descriptor_a, form.transposed_a, ROWS)) ||
      !check_matrix(by, g.next, descriptor_b, form.transposed_b, form.columns))
    abort_launch();
  g.under_way.push_back(std::move(g.next));
  release(self, g);
  if (random_order && random_below(4) == 0) make_until(g, g.under_way.front().number);
}

void commit_products(Thread& self) { waiters[self.id].groups.push_back(waiters[self.id].issued); }

void wait_products(Thread& self, u32 groups_left, u32* const* registers, u32 count) {
  Waiter& mine = waiters[self.id];
  if (mine.groups.size() <= groups_left) return;
  const u32 over = u32(mine.groups.size()) - groups_left;
  mine.over = mine.groups[over - 1];
  mine.groups.erase(mine.groups.begin(), mine.groups.begin() + over);
  if (!mine.over) return;
  make_until(warpgroups[number_of(self)], mine.over);
  for (u32 i = 0; i < count; i++) {
    const u32 entry = *registers[i] - TOKEN;
    if (is_token(*registers[i]) && entry < mine.sums.size() && mine.sums[entry].product <= mine.over)
      *registers[i] = std::bit_cast<u32>(mine.sums[entry].value);
  }
  if (mine.over == mine.issued) mine.sums.clear();
  if (TRACE) clock_of(self.id)[engine(PRODUCTS, number_of(self))] = mine.over;
}

void leave_products(Thread& self) {
  if (self.id < waiters.size() && waiters[self.id].issued > waiters[self.id].over)
    report("pending", warpgroups[number_of(self)].site, &self, "the thread exits before it has waited for products");
}

void read_token(Thread& self, int site) {
  report("pending", site, &self, "a sum is used before the product that makes it was waited for");
}

// ---- registers --------------------------------------------------------------------------------------------------

static void grant() {
  for (Warpgroup& g : warpgroups) {
    const u32 needed = g.wanted > g.registers ? (g.wanted - g.registers) * WARPGROUP : 0;
    if (!needed || needed > free_registers[g.rank]) continue;
    free_registers[g.rank] -= needed;
    g.registers = g.wanted;
    wake(g.last);
  }
}

void change_registers(Thread& self, int site, u32 count, bool more) {
  if (count % 8 || count < 24 || count > MOST_REGISTERS) {
    report("registers", site, &self, "%u registers: a multiple of 8 from 24 to %u is possible", count, MOST_REGISTERS);
    abort_launch();
  }
  Warpgroup& g = warpgroup_of(self, site);
  if (!g.registers)
    return report("registers", site, &self,
                  "without launch bounds, threads and blocks, the compiler ignores setmaxnreg");
  if (!gather(site, g)) return;
  if (more ? count < g.registers : count > g.registers) {
    report("registers", site, &self, "setmaxnreg.%s to %u, from %u", more ? "inc" : "dec", count, g.registers);
    abort_launch();
  }
  g.wanted = count, g.last = self.id;
  if (count <= g.registers) free_registers[g.rank] += (g.registers - count) * WARPGROUP, g.registers = count;
  grant();
  if (g.registers != count) wait(AT_REGISTERS, site);
  release(self, g);
}

}  // namespace emulator
