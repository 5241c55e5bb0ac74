// Shared memory: loads, stores, matrices, and asynchronous copies into it.
//
// Warps run one after the other from barrier to barrier, and an epoch ends at a barrier. If one warp writes a byte and
// another reads it in the same epoch, they race. Between the start of a copy and the wait for it, the bytes hold NaN.
#pragma once
#include "global_memory.h"

static bool shared_is_valid(Warp& w, u32 address, u32 width, int lane) {
  Machine& M = *w.m;
  u32 offset = address - SHARED_BASE;
  if (address % width) {
    M.report(SHARED_MISALIGNED, w, lane, width, offset, 0, 0);
    return false;
  }
  if (address < SHARED_BASE || (u64)offset + width > M.job.shared_size) {
    M.report(SHARED_OUTSIDE, w, lane, width, offset, 0, M.job.shared_size);
    return false;
  }
  return true;
}
static inline u32 writer_in_epoch(const Machine& M, const Warp& w) { return M.epoch << 6 | (w.id + 1); }
static inline u32 warp_of(const Cell& c) { return (c.writer & 63) - 1; }
static inline void mark_read(Machine& M, const Warp& w, Cell& c) {
  if (c.read_epoch != M.epoch) c.read_epoch = M.epoch, c.readers = 0;
  c.readers |= 1u << w.id;
}

static void read_shared(Warp& w, u32 address, u32 width, int lane, u8* to) {
  Machine& M = *w.m;
  if (!shared_is_valid(w, address, width, lane)) {
    memset(to, 0xff, width);
    return;
  }
  const u32 offset = address - SHARED_BASE, me = writer_in_epoch(M, w);
  memcpy(to, &M.shared[offset], width);
  bool unwritten = false, in_flight = false, race = false, unsynced = false;
  for (u32 i = offset; i < offset + width; i++) {
    Cell& c = M.cells[i];
    unwritten |= c.writer == 0;
    in_flight |= c.writer == IN_FLIGHT;
    if (c.writer && c.writer != IN_FLIGHT && c.writer >> 6 == M.epoch) {
      race |= c.writer != me;
      unsynced |= c.writer == me && c.lane != lane && c.sync == w.syncs;
    }
    mark_read(M, w, c);
  }
  const Cell& first = M.cells[offset];
  if (unwritten) M.report(SHARED_UNINIT, w, lane, width, offset, 0, 0);
  if (in_flight) M.report(SHARED_IN_FLIGHT, w, lane, width, offset, 0, 0);
  if (race) M.report(RACE_READ_AFTER_WRITE, w, lane, width, offset, 0, warp_of(first));
  if (unsynced) M.report(WARP_UNSYNCED, w, lane, width, offset, 0, first.lane);
}

enum Write { STORE, START, ARRIVAL };  // the last two: of an asynchronous copy
static void write_shared(Warp& w, u32 address, u32 width, int lane, const u8* data, Write how) {
  Machine& M = *w.m;
  if (!shared_is_valid(w, address, width, lane)) return;
  const u32 offset = address - SHARED_BASE, me = writer_in_epoch(M, w);
  const Cell before = M.cells[offset];
  const bool same = how != START && memcmp(&M.shared[offset], data, width) == 0;
  bool race = false, read = false, in_flight = false, lanes = false;
  for (u32 i = offset; i < offset + width; i++) {
    Cell& c = M.cells[i];
    if (how != ARRIVAL) {
      if (c.writer == IN_FLIGHT)
        in_flight = true;
      else if (c.writer)
        race |= c.writer >> 6 == M.epoch && c.writer != me;
      lanes |= c.writer == me && c.stamp == M.stamp && c.lane != lane;
      read |= c.read_epoch == M.epoch && (c.readers & ~(1u << w.id));
    }
    c.writer = how == START ? IN_FLIGHT : me;
    c.lane = lane, c.sync = w.syncs, c.stamp = M.stamp;
    c.proxy_fences = w.proxy_fences, c.copied = how == ARRIVAL;
  }
  if (how != ARRIVAL && M.job.wgmma && M.products_reading[offset >> 4])
    M.report(WGMMA_OVERWRITE, w, lane, width, offset, 0, M.products_reading[offset >> 4]);
  if (in_flight) M.report(SHARED_IN_FLIGHT, w, lane, width, offset, 0, 1);
  if (race) M.report(same ? SAME_VALUE_WRITE_WRITE : RACE_WRITE_WRITE, w, lane, width, offset, 0, warp_of(before));
  if (lanes && !same) M.report(LANES_WRITE_WRITE, w, lane, width, offset, 0, before.lane);
  if (read) M.report(RACE_WRITE_AFTER_READ, w, lane, width, offset, 0, before.readers);
  if (how == START)
    memset(&M.shared[offset], 0xff, width);
  else
    memcpy(&M.shared[offset], data, width);
}

static void load_shared(Warp& w, const Instruction& I, u32 lanes) {
  const u32 width = I.aux[0] * I.aux[1];
  u32 address[32];
  u8 data[16];
  for (int l = 0; l < 32; l++) address[l] = w.row<u32>(I.s[0])[l] + (u32)I.immediate;
  EACH(lanes) {
    read_shared(w, address[l], width, l, data);
    scatter_to_registers(w, I, l, data);
  }
}
static void store_shared(Warp& w, const Instruction& I, u32 lanes) {
  const u32 width = I.aux[0] * I.aux[1];
  u32 address[32];
  u8 data[16];
  for (int l = 0; l < 32; l++) address[l] = w.row<u32>(I.s[0])[l] + (u32)I.immediate;
  w.m->stamp++;
  EACH(lanes) {
    gather_from_registers(w, I, l, data);
    write_shared(w, address[l], width, l, data, STORE);
  }
}

// ---- asynchronous copies ----

// Sources: to, from, and the number of bytes to read; the rest is zero. aux: bytes, offset of `from`.
static void copy_async(Warp& w, const Instruction& I, u32 lanes) {
  Machine& M = *w.m;
  const u32 width = I.aux[0];
  u32 to[32], size[32], reading = 0;
  u64 from[32];
  M.stamp++;
  for (int l = 0; l < 32; l++) {
    to[l] = w.row<u32>(I.s[0])[l] + (u32)I.immediate;
    from[l] = w.row<u64>(I.s[1])[l] + I.aux[1];
    size[l] = I.sources > 2 ? w.row<u32>(I.s[2])[l] : width;
    if ((lanes >> l & 1) && size[l]) reading |= 1u << l;
  }
  count_sectors(w, from, width, reading);
  EACH(lanes) {
    if (size[l] > width) return M.fail("cp.async: there is more to read than to copy");
    Copy copy = {(u32)l, to[l], width, {}};
    if (size[l] && from[l] % width)
      M.report(MISALIGNED, w, l, width, from[l] & 0xffffffffff, from[l] >> 40, 1);
    if (size[l] == width)
      read_global(w, from[l], width, l, copy.data);
    else
      for (u32 i = 0; i < size[l]; i++) read_global(w, from[l] + i, 1, l, copy.data + i);
    if (shared_is_valid(w, to[l], width, l)) {
      write_shared(w, to[l], width, l, nullptr, START);
      w.copies.push_back(copy);
    }
  }
}
static void arrive(Warp& w, u64 groups_left) {
  w.m->stamp++;
  while (w.copy_groups.size() > groups_left) {
    for (auto& c : w.copy_groups.front()) write_shared(w, c.to, c.size, c.lane, c.data, ARRIVAL);
    w.copy_groups.pop_front();
  }
}
static void commit_copies(Warp& w, const Instruction& I, u32 lanes) {
  if (!converged(w, lanes)) w.m->fail("cp.async.commit_group by a part of a warp");
  w.copy_groups.push_back(std::move(w.copies));
  w.copies.clear();
}
static void wait_for_copies(Warp& w, const Instruction& I, u32 lanes) {
  if (!converged(w, lanes)) w.m->fail("cp.async.wait_group by a part of a warp");
  arrive(w, (u64)I.immediate);
}
static void wait_for_all_copies(Warp& w, const Instruction& I, u32 lanes) {
  commit_copies(w, I, lanes);
  arrive(w, 0);
}

// ---- matrices of 8 × 8 elements of 16 bits; aux: how many, whether they are transposed ----

static u32 matrix_addresses(Warp& w, const Instruction& I, u32* address) {  // a row of a matrix each
  const u32 count = 8 * I.aux[0];
  for (u32 l = 0; l < count; l++) address[l] = w.row<u32>(I.s[0])[l] + (u32)I.immediate;
  return count;
}
static void load_matrices(Warp& w, const Instruction& I, u32 lanes) {
  converged(w, lanes);
  u16 matrix[4][8][8];
  u32 address[32] = {0}, count = matrix_addresses(w, I, address);
  for (u32 l = 0; l < count; l++) read_shared(w, address[l], 16, l, (u8*)matrix[l / 8][l % 8]);
  for (u32 k = 0; k < count / 8; k++)
    for (int l = 0; l < 32; l++) {
      int row = l / 4, col = l % 4 * 2;
      u16 low = I.aux[1] ? matrix[k][col][row] : matrix[k][row][col];
      u16 high = I.aux[1] ? matrix[k][col + 1][row] : matrix[k][row][col + 1];
      w.row<u32>(I.d[k])[l] = (u32)high << 16 | low;
    }
}
static void store_matrices(Warp& w, const Instruction& I, u32 lanes) {
  converged(w, lanes);
  u16 matrix[4][8][8];
  u32 address[32] = {0}, count = matrix_addresses(w, I, address);
  for (u32 k = 0; k < count / 8; k++)
    for (int l = 0; l < 32; l++) {
      int row = l / 4, col = l % 4 * 2;
      u32 both = w.row<u32>(I.s[1 + k])[l];
      (I.aux[1] ? matrix[k][col][row] : matrix[k][row][col]) = (u16)both;
      (I.aux[1] ? matrix[k][col + 1][row] : matrix[k][row][col + 1]) = (u16)(both >> 16);
    }
  w.m->stamp++;
  for (u32 l = 0; l < count; l++) write_shared(w, address[l], 16, l, (u8*)matrix[l / 8][l % 8], STORE);
}
