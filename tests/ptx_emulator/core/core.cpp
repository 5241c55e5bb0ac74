// Executes a PTX kernel (ptx.py) over its grid, program by program and warp by warp, and checks every access to memory.
#include "operations.h"

// One instruction for the active lanes.
static void step(Warp& w, u32 active) {
  Machine& M = *w.m;
  const Instruction& I = M.job.code[w.current];
  u32 lanes = active;
  if (I.predicate >= 0) lanes &= I.negated ? ~w.predicates[I.predicate] : w.predicates[I.predicate];
  if (I.watch >= 0 && lanes) watch(w, I);
  w.next = w.current + 1;
  w.jumped = false;
  if (I.operation == BRANCH) {
    const u32 target = (u32)I.immediate;
    if (lanes == active) {
      w.next = target;
    } else if (lanes) {  // they part
      if (w.uniform) std::fill(w.pcs, w.pcs + 32, w.current);
      w.uniform = false;
      EACH(active) w.pcs[l] = (lanes >> l & 1) ? target : w.current + 1;
      w.jumped = true;
    }
  } else if (I.operation == END) {
    w.alive &= ~lanes;
  } else if (I.operation == BARRIER) {
    if (!converged(w, lanes)) M.fail("a barrier of a part of a warp");
    w.waiting = true;
    w.syncs++;
  } else if (lanes) {
    OPERATIONS[I.operation].execute(w, I, lanes);
  }
}

// To the next barrier or the end. Of lanes that parted, those at the lowest program counter go on.
static void run_warp(Warp& w) {
  Machine& M = *w.m;
  const u64 most_steps = 2000000000;
  while (w.alive && !w.waiting && !M.failed) {
    if (++w.steps > most_steps) return M.fail("too many steps");
    u32 active = w.alive;
    if (w.uniform) {
      w.current = w.pc;
    } else {
      u32 lowest = ~0u;
      EACH(w.alive) lowest = std::min(lowest, w.pcs[l]);
      EACH(w.alive) if (w.pcs[l] != lowest) active &= ~(1u << l);
      w.current = w.pc = lowest;
      w.uniform = active == w.alive;
    }
    if (w.current >= M.job.size) return M.fail("ran past the end");
    step(w, active);
    if (w.jumped) continue;
    if (w.uniform)
      w.pc = w.next;
    else
      EACH(active) w.pcs[l] = w.next;
  }
}

static void start_warp(Warp& w, Machine& M, u32 id, u64 cta) {
  const Job& job = M.job;
  u8* registers = w.registers;
  u32* predicates = w.predicates;
  w = Warp{};
  w.m = &M, w.id = id, w.uniform = true, w.registers = registers, w.predicates = predicates;
  const u32 threads = job.threads - 32 * id;
  w.alive = threads >= 32 ? FULL : (1u << threads) - 1;
  if (job.wgmma) {
    w.rows.resize(job.register_bytes / 64 + 1);
    w.shadow.resize(job.register_bytes);
  }
  memcpy(w.registers, job.registers, job.register_bytes);
  memcpy(w.predicates, job.initial_predicates, job.predicates * sizeof(u32));
  const u32 x = job.grid[0], y = job.grid[1];
  for (u32 l = 0; l < 32; l++) {
    const u32 values[6] = {32 * id + l, (u32)(cta % x), (u32)(cta / x % y), (u32)(cta / x / y), l, id};
    for (int i = 0; i < 6; i++)
      if (job.special[i] >= 0) w.row<u32>(job.special[i])[l] = values[i];
  }
}

static void run_program(Machine& M, u32 warps, u64 cta) {
  const Job& job = M.job;
  M.cta = (u32)cta, M.epoch = 1, M.stamp = 0;
  std::fill(M.shared.begin(), M.shared.end(), 0xff);
  std::fill(M.cells.begin(), M.cells.end(), Cell{});
  std::fill(M.products_reading.begin(), M.products_reading.end(), 0);
  for (u32 i = 0; i < warps; i++) start_warp(M.warps[i], M, i, cta);
  for (;; M.epoch++) {
    u32 done = 0, waiting = 0;
    for (u32 i = 0; i < warps; i++) run_warp(M.warps[i]);
    if (M.failed) return;
    if (job.wgmma) compare_warpgroups(M, warps);
    for (u32 i = 0; i < warps; i++) {
      Warp& w = M.warps[i];
      w.proxy_fences_before = w.proxy_fences;
      done += !w.alive;
      waiting += w.alive && w.waiting;
      w.waiting = false;
    }
    if (done == warps) break;
    if (done) M.report(EXIT_BEFORE_BARRIER, M.warps[0], 0, 0, done, 0, waiting);
  }
  for (u32 i = 0; i < warps; i++) {
    Warp& w = M.warps[i];
    if (w.products.empty() && w.product_groups.empty()) continue;
    w.current = w.last_wgmma;
    M.report(WGMMA_NOT_WAITED, w, 0, 0, w.products.size(), 0, w.product_groups.size());
  }
}

extern "C" {
u32 emu_operations() { return sizeof OPERATIONS / sizeof *OPERATIONS; }
const char* emu_operation_name(u32 i) { return OPERATIONS[i].name; }
u32 emu_kinds() { return KINDS; }
const char* emu_kind_name(u32 i) { return KIND_TEXTS[i]; }
u32 emu_instruction_size() { return sizeof(Instruction); }
u32 emu_job_size() { return sizeof(Job); }
u32 emu_shared_base() { return SHARED_BASE; }

// Whether it stopped; job->error says why.
int emu_launch(Job* job) {
  const u32 warps = (job->threads + 31) / 32;
  if (job->wgmma && warps % 4) {
    snprintf(job->error, sizeof job->error, "wgmma without whole warpgroups");
    return 1;
  }
  std::vector<Warp> all(warps);
  std::vector<std::vector<u32>> predicates(warps, std::vector<u32>(job->predicates));
  const size_t page = 4096, bytes = (job->register_bytes + page - 1) / page * page;
  u8* registers = (u8*)aligned_alloc(page, bytes * warps);
  Machine M{*job, all.data()};
  M.shared.resize(job->shared_size);
  M.cells.resize(job->shared_size);
  M.products_reading.resize(job->shared_size / 16 + 1);
  for (u32 i = 0; i < warps; i++) all[i].registers = registers + bytes * i, all[i].predicates = predicates[i].data();
  const u64 programs = (u64)job->grid[0] * job->grid[1] * job->grid[2];
  for (u64 cta = 0; cta < programs && !M.failed; cta++) run_program(M, warps, cta);
  free(registers);
  return M.failed;
}
}
