// The parts of a launch: instructions, memory regions, warps, and findings.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef unsigned __int128 u128;
typedef __int128 s128;

// Mirrors assembler.py's INSTRUCTION. Operands are offsets of rows in the warp's registers, or numbers of predicates.
struct Instruction {
  u32 operation;
  s32 predicate;  // -1: none
  u32 negated;
  s32 destinations, sources;
  s32 d[4];
  s32 s[14];
  u32 d_width[4], s_width[14];  // bytes
  s64 immediate;                // offset of an address or a parameter, target of a branch
  s64 aux[4];
  s32 watch;  // index in `extra` of the rows that this instruction shares with a wgmma; -1: none
};

// These mirror library.py's structures.
struct Stat {
  u64 requests, sectors;
};
struct Region {
  u64 start, size;  // the address that the kernel sees, bytes
  u8* storage;
  u8* in_view;           // per byte: whether the argument's view has it
  u32 *writer, *reader;  // per byte of the storage, which arguments may share: 1 + the last program (CTA)
  u32 poison;            // bytes of an element; an element whose bits are all one was never written; 0: no check
};
struct Report {
  u32 kind, pc, cta, warp, lane, width;
  u64 address, region, other;
};
struct Job {
  const Instruction* code;
  u32 size, register_bytes, predicates;
  const u8* registers;            // of a warp before it starts: the constants
  const u32* initial_predicates;  // a bit a lane
  const s32* special;             // rows of tid.x, ctaid.x, ctaid.y, ctaid.z, laneid, warpid; -1: not used
  const s32* extra;               // ptx.py's Program.extra
  u32 grid[3], threads, shared_size;
  const u8* parameters;
  Region* regions;
  u32 region_count;
  u32 hopper, wgmma;
  Stat* stats;  // per instruction
  Report* reports;
  u32 most_reports, report_count;
  u64* kind_counts;  // per kind and instruction
  char error[512];
};

// findings.py explains them.
#define KIND_NAMES(X)                                                                                \
  X(OUTSIDE_STORAGE) X(OUTSIDE_VIEW) X(NOT_AN_ARGUMENT) X(MISALIGNED) X(POISON_READ)                 \
  X(LANES_GLOBAL_WRITE_WRITE) X(CTA_WRITE_WRITE) X(CTA_READ_AFTER_WRITE) X(CTA_WRITE_AFTER_READ)     \
  X(DUPLICATE_STORE) X(CTA_SAME_VALUE_WRITE) X(SHARED_OUTSIDE) X(SHARED_MISALIGNED) X(SHARED_UNINIT) \
  X(SHARED_IN_FLIGHT) X(RACE_READ_AFTER_WRITE) X(RACE_WRITE_AFTER_READ) X(RACE_WRITE_WRITE)          \
  X(SAME_VALUE_WRITE_WRITE) X(WARP_UNSYNCED) X(LANES_WRITE_WRITE) X(DIVERGENT_SYNC)                  \
  X(EXIT_BEFORE_BARRIER) X(WGMMA_REGISTER) X(WGMMA_OPERAND_READ) X(WGMMA_UNFENCED)                   \
  X(WGMMA_OVERWRITE) X(WGMMA_PROXY) X(WGMMA_PROXY_COPY) X(WGMMA_DIVERGENT) X(WGMMA_DESCRIPTOR)       \
  X(WGMMA_NOT_WAITED)
#define AS_ENUM(name) name,
#define AS_TEXT(name) #name,
enum Kind { KIND_NAMES(AS_ENUM) KINDS };
static const char* const KIND_TEXTS[] = {KIND_NAMES(AS_TEXT)};

// An asynchronous copy under way: 16 bytes or fewer, read from global memory and not yet in shared memory.
struct Copy {
  u32 lane, to, size;
  u8 data[16];
};

// How unfinished wgmmas use a row of registers. FREE: not at all. ACCUMULATOR: one writes it; its value lies in the
// shadow. OPERAND: one reads it.
enum Use : u8 { FREE, ACCUMULATOR, OPERAND };
struct Row {
  u8 use;
  u32 group;    // that retires it
  u32 touched;  // 1 + the number of wgmma.fence before another instruction last touched it
  u32 shape;    // of the wgmma
};
struct Product {  // a wgmma under way
  std::vector<u32> rows, chunks;  // registers; pieces of 16 bytes of shared memory
};

struct Machine;
struct Warp {
  Machine* m;
  u32 id, alive;  // alive: a bit a lane
  u8* registers;
  u32* predicates;
  u64 steps;
  // Where it is: lanes that diverged each have a program counter.
  bool uniform, jumped, waiting;
  u32 pc, current, next;
  u32 pcs[32];
  u32 syncs;  // barriers so far
  // cp.async: not yet committed, and groups not yet waited for.
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> copy_groups;
  // wgmma: not yet committed, and groups not yet waited for.
  std::vector<Product> products;
  std::deque<std::vector<Product>> product_groups;
  std::vector<Row> rows;
  std::vector<u8> shadow;
  u32 fences, committed, retired;                     // wgmma.fence, commit_group, groups waited for
  u32 proxy_fences, proxy_fences_before, proxy_epoch;  // so far; at the last barrier; the epoch of the last one
  u32 last_wgmma;                                     // its program counter
  u64 trace;                                          // a hash of its wgmmas: the warps of a warpgroup must agree

  template <class T>
  T* row(s32 offset) { return (T*)(registers + offset); }
};

// A byte of shared memory.
struct Cell {
  u32 writer;      // epoch << 6 | 1 + warp; 0: nobody; IN_FLIGHT: a copy that has not arrived
  u32 readers;     // warps, a bit each, that read it in `read_epoch`
  u32 read_epoch;
  u32 sync;   // barriers of the writing warp at the write
  u32 stamp;  // the store: two lanes of one may collide
  u32 proxy_fences;  // of the writing warp at the write
  u8 lane;           // that wrote
  u8 copied;         // by cp.async
};
static const u32 IN_FLIGHT = ~0u;

struct Machine {
  Job& job;
  Warp* warps;
  u32 cta = 0, epoch = 0, stamp = 0;  // epoch: barriers of the program so far
  bool failed = false;
  std::vector<u8> shared;
  std::vector<Cell> cells;
  std::vector<u16> products_reading;  // per 16 bytes of shared memory: wgmmas under way

  void report(Kind kind, const Warp& w, u32 lane, u32 width, u64 address, u64 region, u64 other) {
    if (job.kind_counts[(u64)kind * job.size + w.current]++ < 2 && job.report_count < job.most_reports)
      job.reports[job.report_count++] = {(u32)kind, w.current, cta, w.id, lane, width, address, region, other};
  }
  void fail(const char* text) {
    if (!failed) snprintf(job.error, sizeof job.error, "%s", text);
    failed = true;
  }
};

static const u32 SHARED_BASE = 1024;  // the address of shared memory's first byte
static const u32 FULL = ~0u;          // all lanes
typedef void (*Execute)(Warp&, const Instruction&, u32 lanes);
#define LANES _Pragma("GCC ivdep") for (int l = 0; l < 32; l++)
#define EACH(lanes) for (int l = 0; l < 32; l++) if (lanes >> l & 1)

static bool converged(Warp& w, u32 lanes) {
  if (lanes == w.alive) return true;
  w.m->report(DIVERGENT_SYNC, w, 0, 0, lanes, 0, w.alive);
  return false;
}
