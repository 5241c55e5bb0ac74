// wgmma: asynchronous products of four warps (sm_90).
//
// Each warp computes its own 16 rows when it issues the instruction. Until the wait that retires the instruction, the
// accumulators hold NaN, and the shared memory that it reads is marked. The values lie in shadow registers, where the
// next wgmma of the same shape finds them. PTX says that the warpgroup reads the left operand, not which warp reads
// which rows, so each warp marks all 64. Data is read at issue. A later write does not change the result here, but it
// is a finding.
#pragma once
#include "tensor_cores.h"

static inline Row& row_of(Warp& w, s32 offset) { return w.rows[offset / 64]; }

// Called for an instruction that touches registers of a wgmma.
static void watch(Warp& w, const Instruction& I) {
  const s32* list = w.m->job.extra + I.watch;
  const s32 reads = list[0], writes = list[1];
  for (s32 i = 0; i < reads + writes; i++) {
    const s32 offset = list[2 + i];
    const bool write = i >= reads;
    Row& R = row_of(w, offset);
    if (R.use == ACCUMULATOR || (R.use == OPERAND && write))
      w.m->report(WGMMA_REGISTER, w, 0, 4, offset, 0, write);
    else if (R.use == OPERAND)
      w.m->report(WGMMA_OPERAND_READ, w, 0, 4, offset, 0, write);
    R.touched = w.fences + 1;
  }
}

// Checks that all lanes take part. The next barrier checks that all warps of the warpgroup did the same.
static bool is_whole(Warp& w, u32 lanes, u64 what) {
  if (lanes != FULL || w.alive != FULL) {
    w.m->report(DIVERGENT_SYNC, w, 0, 0, lanes, 0, w.alive);
    w.m->fail("wgmma by a part of a warp");
    return false;
  }
  w.trace = (w.trace ^ (u64)w.current << 40 ^ what) * 0x9E3779B97F4A7C15ull + 1;
  w.last_wgmma = w.current;
  return true;
}
static void compare_warpgroups(Machine& M, u32 warps) {
  for (u32 first = 0; first + 3 < warps; first += 4)
    for (u32 i = 1; i < 4; i++) {
      Warp &leader = M.warps[first], &w = M.warps[first + i];
      if (w.trace == leader.trace) continue;
      w.current = w.last_wgmma;
      M.report(WGMMA_DIVERGENT, w, 0, 0, leader.last_wgmma, 0, 0);
      w.trace = leader.trace;
    }
}

static void fence_proxy(Warp& w, const Instruction& I, u32 lanes) {
  if (lanes != w.alive) return;  // a fence counts only if all lanes execute it
  w.proxy_fences++;
  w.proxy_epoch = w.m->epoch;
}
static void fence_wgmma(Warp& w, const Instruction& I, u32 lanes) {
  if (is_whole(w, lanes, 1)) w.fences++;
}
static void commit_wgmma(Warp& w, const Instruction& I, u32 lanes) {
  if (!is_whole(w, lanes, 2)) return;
  w.product_groups.push_back(std::move(w.products));
  w.products.clear();
  w.committed++;
}
static void wait_for_wgmma(Warp& w, const Instruction& I, u32 lanes) {
  if (!is_whole(w, lanes, 3)) return;
  Machine& M = *w.m;
  while (w.product_groups.size() > (u64)I.immediate) {
    w.retired++;
    for (auto& product : w.product_groups.front()) {
      for (u32 chunk : product.chunks) {
        M.products_reading[chunk]--;
        for (u32 i = 16 * chunk; i < std::min(16 * chunk + 16, M.job.shared_size); i++) mark_read(M, w, M.cells[i]);
      }
      for (u32 offset : product.rows) {
        Row& R = row_of(w, offset);
        if (R.use == FREE || R.group > w.retired) continue;
        if (R.use == ACCUMULATOR) memcpy(w.registers + offset, &w.shadow[offset], 128);
        R.use = FREE;
      }
    }
    w.product_groups.pop_front();
  }
}

// ---- operands in shared memory ----

struct Matrix {
  u32 start, lead, stride, width;  // bytes; width: of the swizzle, 16 if there is none
  bool major;                      // M or N is contiguous, not K
};

static bool read_descriptor(Warp& w, s32 row, bool major, Matrix* matrix) {
  Machine& M = *w.m;
  const u64* d = w.row<u64>(row);
  for (int l = 1; l < 32; l++)
    if (d[l] != d[0]) {
      M.report(WGMMA_DIVERGENT, w, l, 8, d[0], 0, 1);
      break;
    }
  static const u32 widths[4] = {16, 128, 64, 32};
  auto field = [&](int shift) { return (u32)(d[0] >> shift & 0x3fff) << 4; };
  *matrix = {field(0), field(16), field(32), widths[d[0] >> 62], major};
  if (d[0] >> 49 & 7) {
    M.fail("wgmma: a matrix base offset");
    return false;
  }
  const u64 reserved = 0x3fffc000c000c000ull & ~(7ull << 49);
  if (d[0] & reserved) M.report(WGMMA_DESCRIPTOR, w, 0, 8, d[0], 0, 0);
  return true;
}
// The address of 16 bytes: row i (of M or N) and piece j of K. If M or N is contiguous, i counts K and j counts M or N.
static inline u32 piece(const Matrix& m, u32 i, u32 j) {
  const u32 W = m.width, core = i / 8 * m.stride + i % 8 * W;
  if (W == 16) {
    if (m.major) return m.start + j * m.stride + i % 8 * 16 + i / 8 * m.lead;
    return m.start + core + j * m.lead;
  }
  const u32 across = m.major ? j / (W / 16) * m.lead + j % (W / 16) * 16 : j * 16;
  const u32 address = m.start + core + across;
  return address ^ (address >> 7 & (W / 16 - 1)) << 4;
}
// A read by the asynchronous proxy. Data written through the generic proxy needs a fence in between: by the writer after
// its write (before the barrier, if the reader is another warp), or by the reader after the barrier.
static void read_piece(Warp& w, u32 address, u8* to, Product& product) {
  Machine& M = *w.m;
  read_shared(w, address, 16, 0, to);
  const u32 offset = address - SHARED_BASE;
  if (address < SHARED_BASE || (u64)offset + 16 > M.job.shared_size) return;
  bool store = false, copy = false;
  product.chunks.push_back(offset / 16);
  M.products_reading[offset / 16]++;
  for (u32 i = offset; i < offset + 16; i++) {
    const Cell& c = M.cells[i];
    if (c.writer == 0 || c.writer == IN_FLIGHT) continue;
    const Warp& by = M.warps[warp_of(c)];
    const u32 known = &by == &w ? by.proxy_fences : by.proxy_fences_before;
    if (known <= c.proxy_fences && w.proxy_epoch <= c.writer >> 6) (c.copied ? copy : store) = true;
  }
  if (store) M.report(WGMMA_PROXY, w, 0, 16, offset, 0, warp_of(M.cells[offset]));
  if (copy) M.report(WGMMA_PROXY_COPY, w, 0, 16, offset, 0, warp_of(M.cells[offset]));
}
// Reads a matrix of `extent` rows (of M or N) by K: element (i, k) goes to out[i * row + k * column].
template <int T, int K>
static void read_matrix(Warp& w, const Matrix& m, int extent, float* out, int row, int column, Product& product) {
  const int per = T == TF32 ? 4 : 8;  // elements of a piece
  const int outer = m.major ? K : extent, inner = m.major ? extent : K;
  for (int i = 0; i < outer; i++)
    for (int j = 0; j < inner / per; j++) {
      u32 words[4];
      read_piece(w, piece(m, i, j), (u8*)words, product);
      for (int e = 0; e < per; e++) {
        const float value = T == TF32 ? from_tf32(words[e]) : from_half(words[e / 2] >> 16 * (e % 2), T);
        const int along = j * per + e;
        out[m.major ? along * row + i * column : i * row + along * column] = value;
      }
    }
}

// aux: index of the accumulators in `extra`, N, type, flags. Sources: A (a descriptor, or four registers), B's
// descriptor, scale-d.
enum Flags { IN_REGISTERS = 1, NEGATIVE_A = 2, NEGATIVE_B = 4, TRANSPOSED_A = 8, TRANSPOSED_B = 16 };
template <int T>
static void wgmma_of(Warp& w, const Instruction& I) {
  const int K = T == TF32 ? 8 : 16, N = I.aux[1], flags = I.aux[3], right = flags & IN_REGISTERS ? 4 : 1;
  static thread_local float A[64 * 16], B[16 * 256], C[16 * 256];
  Machine& M = *w.m;
  const s32* accumulators = M.job.extra + I.aux[0];
  const u32 shape = N << 2 | T, group = w.committed + 1;
  const u32 scale = w.predicates[I.s[right + 1]];
  if (scale != 0 && scale != FULL) return M.fail("wgmma: scale-d differs between lanes");
  Product product;
  Matrix matrix;
  if (!read_descriptor(w, I.s[right], flags & TRANSPOSED_B, &matrix)) return;
  read_matrix<T, K>(w, matrix, N, B, 1, N, product);
  float* mine = A;
  if (flags & IN_REGISTERS) {
    unpack_left<T, K>(w, I.s, A);
  } else {
    if (!read_descriptor(w, I.s[0], flags & TRANSPOSED_A, &matrix)) return;
    read_matrix<T, K>(w, matrix, 64, A, K, 1, product);
    mine = A + w.id % 4 * 16 * K;
  }
  if (!(flags & NEGATIVE_A) != !(flags & NEGATIVE_B))
    for (int i = 0; i < 16 * K; i++) mine[i] = -mine[i];
  bool unfenced = w.fences == 0, busy = false;
  for (int i = 0; i < N / 2; i++) {
    const Row& R = row_of(w, accumulators[i]);
    unfenced |= R.touched == w.fences + 1;
    busy |= R.use == OPERAND || (R.use == ACCUMULATOR && R.shape != shape);
    const float* from = R.use == ACCUMULATOR ? (const float*)&w.shadow[accumulators[i]] : w.row<float>(accumulators[i]);
    for (int l = 0; l < 32; l++) C[accumulator(l, i, N)] = scale ? from[l] : 0.0f;
  }
  if (flags & IN_REGISTERS)
    for (int i = 0; i < 4; i++) {
      const Row& R = row_of(w, I.s[i]);
      unfenced |= R.touched == w.fences + 1;
      busy |= R.use == ACCUMULATOR;
    }
  if (unfenced) M.report(WGMMA_UNFENCED, w, 0, 4, w.fences, 0, 0);
  if (busy) M.report(WGMMA_REGISTER, w, 0, 4, 0, 0, 2);
  multiply(mine, B, C, K, N, T, M.job);
  auto hold = [&](s32 offset, Use use) {
    Row& R = row_of(w, offset);
    R.use = use, R.group = group, R.shape = shape;
    product.rows.push_back(offset);
  };
  for (int i = 0; i < N / 2; i++) {
    hold(accumulators[i], ACCUMULATOR);
    float* to = (float*)&w.shadow[accumulators[i]];
    for (int l = 0; l < 32; l++) to[l] = C[accumulator(l, i, N)];
    memset(w.registers + accumulators[i], 0xff, 128);
  }
  if (flags & IN_REGISTERS)
    for (int i = 0; i < 4; i++)
      if (row_of(w, I.s[i]).use != ACCUMULATOR) hold(I.s[i], OPERAND);
  w.products.push_back(std::move(product));
}
static void wgmma(Warp& w, const Instruction& I, u32 lanes) {
  const bool in_registers = I.aux[3] & IN_REGISTERS;
  const s32* right = I.s + (in_registers ? 4 : 1);
  u64 what = (u64)w.predicates[right[1]] ^ w.row<u64>(right[0])[0] * 31;
  if (!in_registers) what ^= w.row<u64>(I.s[0])[0] * 1009;
  if (!is_whole(w, lanes, what)) return;
  if (I.aux[2] == F16)
    wgmma_of<F16>(w, I);
  else if (I.aux[2] == BF16)
    wgmma_of<BF16>(w, I);
  else
    wgmma_of<TF32>(w, I);
}
