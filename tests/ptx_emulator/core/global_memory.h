// Loads and stores of the tensor arguments.
#pragma once
#include "arithmetic.h"

// Finds the byte at an address. Each argument has its own 2^40 addresses.
static u8* translate(Warp& w, u64 address, u32 width, int lane, bool store, Region** region) {
  Machine& M = *w.m;
  u64 number = address >> 40;
  if (number == 0 || number > M.job.region_count) {
    M.report(NOT_AN_ARGUMENT, w, lane, width, address, 0, 0);
    return nullptr;
  }
  Region& R = M.job.regions[number - 1];
  u64 offset = address - R.start;
  *region = &R;
  if (address % width) {
    M.report(MISALIGNED, w, lane, width, offset, number, 0);
    return nullptr;
  }
  if (offset >= R.size || offset + width > R.size) {
    M.report(OUTSIDE_STORAGE, w, lane, width, offset, number, R.size);
    return nullptr;
  }
  for (u32 i = 0; i < width; i++)
    if (!R.in_view[offset + i]) {
      M.report(OUTSIDE_VIEW, w, lane, width, offset, number, store);
      break;
    }
  return R.storage + offset;
}

// Counts the distinct 32-byte sectors that a request touches.
static void count_sectors(Warp& w, const u64* address, u32 width, u32 lanes) {
  if (!lanes) return;
  u64 sectors[64];
  u32 count = 0;
  EACH(lanes)
    for (u64 s = address[l] >> 5; s <= (address[l] + width - 1) >> 5; s++)
      if (std::find(sectors, sectors + count, s) == sectors + count && count < 64) sectors[count++] = s;
  Stat& S = w.m->job.stats[w.current];
  S.requests++;
  S.sectors += count;
}

static void read_global(Warp& w, u64 address, u32 width, int lane, u8* to) {
  Machine& M = *w.m;
  Region* R;
  u8* from = translate(w, address, width, lane, false, &R);
  if (!from) {
    memset(to, 0xff, width);
    return;
  }
  memcpy(to, from, width);
  const u64 offset = from - R->storage;
  const u32 me = M.cta + 1, several = ~0u;
  bool of_another = false, poison = false;
  for (u32 i = 0; i < width; i++) {
    u32 writer = R->writer[offset + i];
    of_another |= writer && writer != me;
    u32& reader = R->reader[offset + i];
    reader = reader == 0 || reader == me ? me : several;
  }
  if (of_another) M.report(CTA_READ_AFTER_WRITE, w, lane, width, offset, address >> 40, R->writer[offset] - 1);
  if (R->poison)
    for (u32 i = 0; i + R->poison <= width; i += R->poison) {
      u32 bits = 0;
      memcpy(&bits, from + i, R->poison);
      poison |= bits == (R->poison == 4 ? ~0u : 0xffffu);
    }
  if (poison) M.report(POISON_READ, w, lane, width, offset, address >> 40, 0);
}

// Writes a value of `size` bytes to a register of `width` bytes; extends the sign of a signed value.
static inline void put(Warp& w, s32 row, u32 width, int l, u64 value, u32 size, bool is_signed) {
  if (is_signed && size < 8) {
    u32 shift = 64 - 8 * size;
    value = (u64)((s64)(value << shift) >> shift);
  }
  if (width == 2)
    w.row<u16>(row)[l] = (u16)value;
  else if (width == 4)
    w.row<u32>(row)[l] = (u32)value;
  else
    w.row<u64>(row)[l] = value;
}
static inline u64 get(Warp& w, s32 row, u32 width, int l) {
  return width == 2 ? w.row<u16>(row)[l] : width == 4 ? w.row<u32>(row)[l] : w.row<u64>(row)[l];
}

// aux of loads and stores: bytes of an element, elements, whether they are signed
static void scatter_to_registers(Warp& w, const Instruction& I, int l, const u8* from) {
  u32 size = I.aux[0];
  for (u32 i = 0; i < (u32)I.aux[1]; i++) {
    u64 value = 0;
    memcpy(&value, from + i * size, size);
    if (I.d[i] >= 0) put(w, I.d[i], I.d_width[i], l, value, size, I.aux[2]);
  }
}
static void gather_from_registers(Warp& w, const Instruction& I, int l, u8* to) {
  u32 size = I.aux[0];
  for (u32 i = 0; i < (u32)I.aux[1]; i++) {
    u64 value = get(w, I.s[1 + i], I.s_width[1 + i], l);
    memcpy(to + i * size, &value, size);
  }
}

static void load_global(Warp& w, const Instruction& I, u32 lanes) {
  const u32 width = I.aux[0] * I.aux[1];
  u64 address[32];
  u8 data[16];
  for (int l = 0; l < 32; l++) address[l] = w.row<u64>(I.s[0])[l] + I.immediate;
  count_sectors(w, address, width, lanes);
  EACH(lanes) {
    read_global(w, address[l], width, l, data);
    scatter_to_registers(w, I, l, data);
  }
}

static void store_global(Warp& w, const Instruction& I, u32 lanes) {
  Machine& M = *w.m;
  const u32 width = I.aux[0] * I.aux[1], me = M.cta + 1;
  u64 address[32];
  u8 data[32][16];
  for (int l = 0; l < 32; l++) address[l] = w.row<u64>(I.s[0])[l] + I.immediate;
  count_sectors(w, address, width, lanes);
  EACH(lanes) gather_from_registers(w, I, l, data[l]);
  EACH(lanes) for (int k = 0; k < l; k++) {
    if (!(lanes >> k & 1) || address[k] >= address[l] + width || address[l] >= address[k] + width) continue;
    bool same = address[k] == address[l] && memcmp(data[k], data[l], width) == 0;
    M.report(same ? DUPLICATE_STORE : LANES_GLOBAL_WRITE_WRITE, w, l, width, address[l], address[l] >> 40, k);
    break;
  }
  EACH(lanes) {
    Region* R;
    u8* to = translate(w, address[l], width, l, true, &R);
    if (!to) continue;
    const u64 offset = to - R->storage, region = address[l] >> 40;
    const bool same = memcmp(to, data[l], width) == 0;
    bool written_by_another = false, read_by_another = false, written_by_me = false;
    for (u32 i = 0; i < width; i++) {
      u32 &writer = R->writer[offset + i], reader = R->reader[offset + i];
      written_by_another |= writer && writer != me;
      written_by_me |= writer == me;
      read_by_another |= reader && reader != me;
      writer = me;
    }
    if (written_by_another)
      M.report(same ? CTA_SAME_VALUE_WRITE : CTA_WRITE_WRITE, w, l, width, offset, region, 0);
    else if (written_by_me)
      M.report(DUPLICATE_STORE, w, l, width, offset, region, 0);
    if (read_by_another)
      M.report(CTA_WRITE_AFTER_READ, w, l, width, offset, region, R->reader[offset] - 1);
    memcpy(to, data[l], width);
  }
}

static void load_parameter(Warp& w, const Instruction& I, u32 lanes) {
  EACH(lanes) scatter_to_registers(w, I, l, w.m->job.parameters + I.immediate);
}
