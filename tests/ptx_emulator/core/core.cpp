// Executes PTX bytecode (ptx.py) warp by warp, and checks every access to memory. See README.md.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
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

struct Ins {
  u32 op;
  s32 pred;  // predicate index or -1
  u32 neg;   // predicate negated
  s32 nd, ns;
  s32 d[4];
  s32 s[14];          // byte offsets into the warp's registers; predicate indices where the op says so
  u32 dk[4], sk[14];  // width of those registers, bytes (1: predicate)
  s64 imm;            // address offset, branch target, parameter offset
  s64 aux[4];
  s32 watch;  // where in `extra`: rows of this instruction that a wgmma has too; or -1
};

struct Stat {
  u64 exec, lanes, requests, sectors, ideal_sectors, used_bytes, waves, phases;
};

struct Region {
  u64 start, size;       // virtual start of the storage, its bytes
  u8* phys;              // the storage
  u8* mask;              // per byte: 1 where the argument's view has an element
  u32 *writer, *reader;  // per byte of the storage: 1 + last CTA; shared by arguments with one storage
  u32 poison;            // element width, where a load of all ones is a read of unwritten memory; else 0
};

// Names that findings.py explains.
#define KIND_NAMES(X) \
  X(OUTSIDE_STORAGE) X(OUTSIDE_VIEW) X(MISALIGNED) \
  X(NOT_AN_ARGUMENT) X(POISON_READ) X(CTA_WRITE_WRITE) \
  X(CTA_READ_AFTER_WRITE) X(CTA_WRITE_AFTER_READ) X(DUPLICATE_STORE) \
  X(SHARED_OUTSIDE) X(SHARED_MISALIGNED) X(SHARED_UNINIT) \
  X(SHARED_IN_FLIGHT) X(RACE_READ_AFTER_WRITE) X(RACE_WRITE_AFTER_READ) \
  X(RACE_WRITE_WRITE) X(SAME_VALUE_WRITE_WRITE) X(WARP_UNSYNCED) \
  X(LANES_WRITE_WRITE) X(DIVERGENT_SYNC) X(EXIT_BEFORE_BARRIER) \
  X(CTA_SAME_VALUE_WRITE) X(LANES_GLOBAL_WRITE_WRITE) X(WGMMA_REGISTER) \
  X(WGMMA_UNFENCED) X(WGMMA_OVERWRITE) X(WGMMA_PROXY) \
  X(WGMMA_PROXY_COPY) X(WGMMA_DIVERGENT) X(WGMMA_DESCRIPTOR) \
  X(WGMMA_NOT_WAITED) X(WGMMA_OPERAND_READ)
#define AS_ENUM(name) name,
#define AS_TEXT(name) #name,
enum Kind { KIND_NAMES(AS_ENUM) KINDS };
static const char* const KIND_TEXTS[] = {KIND_NAMES(AS_TEXT)};

struct Report {
  u32 kind, pc, cta, warp, lane, width;
  u64 address, region, other;
};

struct Machine;
struct Pending {
  u32 lane, dst, size, pc;
  u8 data[16];
};

// Registers of a wgmma (per row): FREE; ACCUMULATOR: written by one under way, the value in the shadow;
// OPERAND: read by one under way.
enum Use : u8 { FREE, ACCUMULATOR, OPERAND };
struct Row {
  u8 use;
  u32 group, touched, shape;
};  // group: which retires it; touched: 1 + fences when last accessed by another instruction
struct Wgmma {
  std::vector<u32> rows, chunks;
};  // under way: its rows, its 16-byte pieces of shared memory

struct Warp {
  u8* r;
  u32* p;
  u32 id, alive;
  u32 pc;
  bool uniform;
  u32 pcs[32];
  bool waiting;
  u32 syncs;
  u64 steps;
  std::vector<Pending> open;
  std::deque<std::vector<Pending>> groups;
  Machine* m;
  u32 cur, next;
  bool jumped, blocked;
  std::vector<Row> rows;
  std::vector<u8> shadow;
  std::vector<Wgmma> wopen;
  std::deque<std::vector<Wgmma>> wgroups;
  u32 wfences, wcommitted, wretired, proxies, proxies_before, proxy_epoch, wlast;
  u64 whash;
};

struct Machine {
  const Ins* code;
  u32 n;
  u32 nregbytes, npreds;
  const u8* init;  // initial register image of a warp: constants
  const u8* params;
  Region* regions;
  u32 nregions;
  u32 grid[3], threads, shared_size, cta;
  u32 epoch;
  u32 stamp;
  std::vector<u8> shared;
  std::vector<u32> wtag, wstamp, repoch, rmask, wsync;
  std::vector<u8> wlane;
  const s32* extra;
  bool wgmma;
  std::vector<u16> wreaders;
  std::vector<u32> wproxy;
  std::vector<u8> wcopy;
  Warp* warps;
  Stat* stats;
  Report* reports;
  u32 max_reports, nreports;
  u64* kind_pc;  // KINDS * n
  u32 mma_mode;
  char* error;
  bool failed;
  void report(Kind k, u32 pc, u32 warp, u32 lane, u32 width, u64 address, u64 region, u64 other) {
    if (kind_pc[(u64)k * n + pc]++ < 2 && nreports < max_reports)
      reports[nreports++] = {(u32)k, pc, cta, warp, lane, width, address, region, other};
  }
  void fail(const char* text) {
    if (!failed) {
      failed = true;
      snprintf(error, 500, "%s", text);
    }
  }
};

static const u32 SBASE = 1024, FULL = ~0u;
typedef void (*Exec)(Warp&, const Ins&, u32);
#define LANES _Pragma("GCC ivdep") for (int l = 0; l < 32; l++)
#define ROW(T, off) ((T*)(w.r + (off)))

template <class D, class A, auto F>
void un(Warp& w, const Ins& I, u32 m) {
  D* d = ROW(D, I.d[0]);
  const A* a = ROW(A, I.s[0]);
  if (m == FULL) {
    LANES d[l] = F(a[l]);
  } else {
    LANES if (m >> l & 1) d[l] = F(a[l]);
  }
}
template <class D, class A, class B, auto F>
void bin(Warp& w, const Ins& I, u32 m) {
  D* d = ROW(D, I.d[0]);
  const A* a = ROW(A, I.s[0]);
  const B* b = ROW(B, I.s[1]);
  if (m == FULL) {
    LANES d[l] = F(a[l], b[l]);
  } else {
    LANES if (m >> l & 1) d[l] = F(a[l], b[l]);
  }
}
template <class D, class A, class B, class C, auto F>
void tri(Warp& w, const Ins& I, u32 m) {
  D* d = ROW(D, I.d[0]);
  const A* a = ROW(A, I.s[0]);
  const B* b = ROW(B, I.s[1]);
  const C* c = ROW(C, I.s[2]);
  if (m == FULL) {
    LANES d[l] = F(a[l], b[l], c[l]);
  } else {
    LANES if (m >> l & 1) d[l] = F(a[l], b[l], c[l]);
  }
}
template <class A, auto F>
void setp(Warp& w, const Ins& I, u32 m) {
  const A *a = ROW(A, I.s[0]), *b = ROW(A, I.s[1]);
  u32 v = 0;
  for (int l = 0; l < 32; l++) v |= (u32)(F(a[l], b[l]) ? 1 : 0) << l;
  w.p[I.d[0]] = (w.p[I.d[0]] & ~m) | (v & m);
}
template <class A>
void selp(Warp& w, const Ins& I, u32 m) {
  A* d = ROW(A, I.d[0]);
  const A *a = ROW(A, I.s[0]), *b = ROW(A, I.s[1]);
  u32 p = w.p[I.s[2]];
  LANES {
    A v = (p >> l & 1) ? a[l] : b[l];
    d[l] = (m >> l & 1) ? v : d[l];
  }
}
template <auto F>
void predop(Warp& w, const Ins& I, u32 m) {
  u32 v = F(w.p[I.s[0]], I.ns > 1 ? w.p[I.s[1]] : 0);
  w.p[I.d[0]] = (w.p[I.d[0]] & ~m) | (v & m);
}

// ---- floating point ----
static inline float f16(u16 h) {
  _Float16 x;
  memcpy(&x, &h, 2);
  return (float)x;
}
static inline u16 to_f16(float f) {
  _Float16 x = (_Float16)f;
  u16 h;
  memcpy(&h, &x, 2);
  return h;
}
static inline float bf16(u16 h) {
  u32 u = (u32)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline u16 to_bf16(float f) {
  u32 u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline u32 bits(float f) {
  u32 u;
  memcpy(&u, &f, 4);
  return u;
}
static inline float flt(u32 u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline u32 to_tf32_rna(u32 u) {
  if ((u & 0x7f800000) == 0x7f800000) return u;
  return (u + 0x1000) & 0xffffe000;
}
static inline float ftz(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
template <class I, class F, int MODE>
static inline I to_int(F x) {  // 0 rzi 1 rni 2 rmi 3 rpi, saturating, NaN 0
  if (x != x) return 0;
  double v = MODE == 0   ? std::trunc((double)x)
             : MODE == 1 ? std::nearbyint((double)x)
             : MODE == 2 ? std::floor((double)x)
                         : std::ceil((double)x);
  double lo = (double)(I)(I(-1) < I(0) ? (I)((u64)1 << (sizeof(I) * 8 - 1)) : 0);
  double hi = I(-1) < I(0) ? -lo : std::ldexp(1.0, sizeof(I) * 8);
  if (v >= hi) return I(-1) < I(0) ? (I) ~((u64)1 << (sizeof(I) * 8 - 1)) : (I) ~(u64)0;
  if (v < lo) return (I)lo;
  return (I)v;
}

template <int N, auto F>
void pair(Warp& w, const Ins& I, u32 m) {  // two float32 in 64 bits
  float* d = ROW(float, I.d[0]);
  const float *a = ROW(float, I.s[0]), *b = ROW(float, I.s[1]), *c = N > 2 ? ROW(float, I.s[2]) : b;
  for (int i = 0; i < 64; i++)
    if (m >> (i / 2) & 1) d[i] = F(a[i], b[i], c[i]);
}

// ---- packing ----
template <class D, int N>
void pack(Warp& w, const Ins& I, u32 m) {
  const int b = sizeof(D) * 8 / N;
  D* d = ROW(D, I.d[0]);
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      D v = 0;
      for (int i = 0; i < N; i++) {
        u64 x = I.sk[i] == 2 ? ROW(u16, I.s[i])[l] : ROW(u32, I.s[i])[l];
        v |= (D)(x & (b == 64 ? ~0ull : (1ull << b) - 1)) << (b * i);
      }
      d[l] = v;
    }
}
template <class S, int N>
void unpack(Warp& w, const Ins& I, u32 m) {
  const int b = sizeof(S) * 8 / N;
  const S* s = ROW(S, I.s[0]);
  S t[32];
  memcpy(t, s, sizeof t);
  for (int i = 0; i < N; i++)
    if (I.d[i] >= 0)
      for (int l = 0; l < 32; l++)
        if (m >> l & 1) {
          u64 x = (u64)(t[l] >> (b * i));
          if (I.dk[i] == 2)
            ROW(u16, I.d[i])[l] = (u16)x;
          else
            ROW(u32, I.d[i])[l] = (u32)x;
        }
}
static u32 prmt1(u32 a, u32 b, u32 c) {
  u64 v = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 sel = c >> (4 * i) & 15;
    u32 byte = (u32)(v >> (8 * (sel & 7))) & 255;
    if (sel & 8) byte = (byte & 128) ? 255 : 0;
    r |= byte << (8 * i);
  }
  return r;
}
template <class T>
static T bfe1(T a, u32 b, u32 c) {  // signed or unsigned
  const int W = sizeof(T) * 8;
  u32 pos = b & 255, len = c & 255;
  typedef typename std::make_unsigned<T>::type U;
  bool sgn = T(-1) < T(0);
  U ua = (U)a;
  U res = 0;
  U sbit = 0;
  if (sgn && len) {
    u32 t = pos + len - 1;
    if (t > W - 1) t = W - 1;
    sbit = (ua >> t) & 1;
  }
  for (u32 i = 0; i < (u32)W; i++) {
    U bit = (i < len && pos + i < (u32)W) ? (ua >> (pos + i)) & 1 : sbit;
    res |= bit << i;
  }
  return (T)res;
}
static u32 bfi1(u32 a, u32 b, u32 c, u32 d) {
  u32 pos = c & 255, len = d & 255;
  for (u32 i = 0; i < len && pos + i < 32; i++) b = (b & ~(1u << (pos + i))) | ((a >> i & 1) << (pos + i));
  return b;
}
static void bfi(Warp& w, const Ins& I, u32 m) {
  for (int l = 0; l < 32; l++)
    if (m >> l & 1)
      ROW(u32, I.d[0])
      [l] = bfi1(ROW(u32, I.s[0])[l], ROW(u32, I.s[1])[l], ROW(u32, I.s[2])[l], ROW(u32, I.s[3])[l]);
}
static void lop3(Warp& w, const Ins& I, u32 m) {
  u32* d = ROW(u32, I.d[0]);
  const u32 *a = ROW(u32, I.s[0]), *b = ROW(u32, I.s[1]), *c = ROW(u32, I.s[2]);
  u32 lut = ROW(u32, I.s[3])[0];
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      u32 r = 0;
      for (int k = 0; k < 8; k++)
        if (lut >> k & 1) r |= ((k & 4) ? a[l] : ~a[l]) & ((k & 2) ? b[l] : ~b[l]) & ((k & 1) ? c[l] : ~c[l]);
      d[l] = r;
    }
}

// ---- global memory ----
static u8* translate(Warp& w, const Ins& I, u64 a, u32 n, int lane, bool store, Region** out) {
  Machine& M = *w.m;
  u64 id = a >> 40;
  if (id == 0 || id > M.nregions) {
    M.report(NOT_AN_ARGUMENT, w.cur, w.id, lane, n, a, 0, 0);
    return nullptr;
  }
  Region& R = M.regions[id - 1];
  u64 off = a - R.start;
  *out = &R;
  if (a % n) {
    M.report(MISALIGNED, w.cur, w.id, lane, n, off, id, 0);
    return nullptr;
  }
  if (off >= R.size || off + n > R.size) {
    M.report(OUTSIDE_STORAGE, w.cur, w.id, lane, n, off, id, R.size);
    return nullptr;
  }
  for (u32 i = 0; i < n; i++)
    if (!R.mask[off + i]) {
      M.report(OUTSIDE_VIEW, w.cur, w.id, lane, n, off, id, store);
      break;
    }
  return R.phys + off;
}
static void sectors(Warp& w, const u64* a, u32 n, u32 m) {
  if (!m) return;
  u64 sec[64];
  u32 k = 0;
  u64 used[64];
  u32 ku = 0;
  u64 total = 0;
  (void)total;
  u64 lo[32];
  u32 kl = 0;
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      for (u64 s = a[l] >> 5; s <= (a[l] + n - 1) >> 5; s++) {
        bool seen = false;
        for (u32 i = k; i-- > 0;)
          if (sec[i] == s) {
            seen = true;
            break;
          }
        if (!seen && k < 64) sec[k++] = s;
      }
      bool seen = false;
      for (u32 i = kl; i-- > 0;)
        if (lo[i] == a[l]) {
          seen = true;
          break;
        }
      if (!seen) lo[kl++] = a[l];
    }
  (void)used;
  (void)ku;
  Stat& S = w.m->stats[w.cur];
  S.requests++;
  S.sectors += k;
  S.used_bytes += (u64)kl * n;
  S.ideal_sectors += ((u64)kl * n + 31) / 32;
}
static bool read_global(Warp& w, const Ins& I, u64 a, u32 n, int lane, u8* to, u32 vec) {
  Machine& M = *w.m;
  Region* R;
  u8* p = translate(w, I, a, n, lane, false, &R);
  if (!p) {
    memset(to, 0xff, n);
    return false;
  }
  memcpy(to, p, n);
  u64 off = p - R->phys;
  u32 me = M.cta + 1;
  bool raw = false, poison = false;
  for (u32 i = 0; i < n; i++) {
    u32 o = R->writer[off + i];
    if (o && o != me) raw = true;
    u32& r = R->reader[off + i];
    r = r == 0 || r == me ? me : ~0u;
  }
  if (raw) M.report(CTA_READ_AFTER_WRITE, w.cur, w.id, lane, n, off, a >> 40, R->writer[off] - 1);
  if (u32 e = R->poison & 15)
    for (u32 i = 0; i + e <= n; i += e) {
      u32 x = 0;
      memcpy(&x, p + i, e);
      poison |= x == (e == 4 ? ~0u : 0xffffu);
      if (R->poison & 0x200) poison |= (x & 0x7fff) > 0x7f80;
      if (R->poison & 0x100) poison |= e == 4 ? (x & 0x7fffffff) > 0x7f800000 : (x & 0x7fff) > 0x7c00;
    }
  if (poison) M.report(POISON_READ, w.cur, w.id, lane, n, off, a >> 40, 0);
  return true;
}
// destination register of width dk <- value of width t (sign-extended where aux[2])
static inline void put(Warp& w, s32 off, u32 dk, int l, u64 v, u32 t, bool sgn) {
  if (sgn && t < 8) {
    u32 sh = 64 - 8 * t;
    v = (u64)((s64)(v << sh) >> sh);
  }
  if (dk == 2)
    ROW(u16, off)[l] = (u16)v;
  else if (dk == 4)
    ROW(u32, off)[l] = (u32)v;
  else
    ROW(u64, off)[l] = v;
}
static inline u64 get(Warp& w, s32 off, u32 k, int l) {
  return k == 2 ? ROW(u16, off)[l] : k == 4 ? ROW(u32, off)[l] : ROW(u64, off)[l];
}

static void ld_global(Warp& w, const Ins& I, u32 m) {  // aux: 0 width, 1 vector, 2 signed
  u32 t = I.aux[0], v = I.aux[1], n = t * v;
  u64 a[32];
  const u64* base = ROW(u64, I.s[0]);
  for (int l = 0; l < 32; l++) a[l] = base[l] + I.imm;
  sectors(w, a, n, m);
  u8 buf[16];
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      read_global(w, I, a[l], n, l, buf, v);
      for (u32 i = 0; i < v; i++) {
        u64 x = 0;
        memcpy(&x, buf + i * t, t);
        if (I.d[i] >= 0) put(w, I.d[i], I.dk[i], l, x, t, I.aux[2]);
      }
    }
}
static void st_global(Warp& w, const Ins& I, u32 m) {  // s[0] address, s[1..] values
  Machine& M = *w.m;
  u32 t = I.aux[0], v = I.aux[1], n = t * v;
  u64 a[32];
  const u64* base = ROW(u64, I.s[0]);
  for (int l = 0; l < 32; l++) a[l] = base[l] + I.imm;
  sectors(w, a, n, m);
  u8 buf[16];
  u32 me = M.cta + 1;
  for (int l = 0; l < 32; l++)
    if (m >> l & 1)
      for (int k = 0; k < l; k++)
        if ((m >> k & 1) && a[k] < a[l] + n && a[l] < a[k] + n) {
          bool same = a[k] == a[l];
          for (u32 i = 0; same && i < v; i++)
            same = get(w, I.s[1 + i], I.sk[1 + i], l) == get(w, I.s[1 + i], I.sk[1 + i], k);
          M.report(same ? DUPLICATE_STORE : LANES_GLOBAL_WRITE_WRITE, w.cur, w.id, l, n, a[l], a[l] >> 40, k);
          break;
        }
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      for (u32 i = 0; i < v; i++) {
        u64 x = get(w, I.s[1 + i], I.sk[1 + i], l);
        memcpy(buf + i * t, &x, t);
      }
      Region* R;
      u8* p = translate(w, I, a[l], n, l, true, &R);
      if (!p) continue;
      u64 off = p - R->phys;
      bool ww = false, war = false;
      bool same = memcmp(p, buf, n) == 0;
      bool dup = false;
      for (u32 i = 0; i < n; i++) {
        u32& o = R->writer[off + i];
        if (o && o != me) ww = true;
        if (o == me) dup = true;
        o = me;
        u32 r = R->reader[off + i];
        if (r && r != me) war = true;
      }
      if (ww) M.report(same ? CTA_SAME_VALUE_WRITE : CTA_WRITE_WRITE, w.cur, w.id, l, n, off, a[l] >> 40, 0);
      if (war) M.report(CTA_WRITE_AFTER_READ, w.cur, w.id, l, n, off, a[l] >> 40, R->reader[off] - 1);
      if (dup && !ww) M.report(DUPLICATE_STORE, w.cur, w.id, l, n, off, a[l] >> 40, 0);
      memcpy(p, buf, n);
    }
}
template <bool FLOAT, int OP>
static void atom_global(Warp& w, const Ins& I, u32 m) {  // add, 32 bit, for validation
  u64 a[32];
  const u64* base = ROW(u64, I.s[0]);
  for (int l = 0; l < 32; l++) a[l] = base[l] + I.imm;
  sectors(w, a, 4, m);
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      Region* R;
      u8* p = translate(w, I, a[l], 4, l, true, &R);
      if (!p) continue;
      u32 old;
      memcpy(&old, p, 4);
      u32 x = ROW(u32, I.s[1])[l];
      u32 nw = FLOAT ? bits(flt(old) + flt(x)) : old + x;
      memcpy(p, &nw, 4);
      if (I.nd && I.d[0] >= 0) ROW(u32, I.d[0])[l] = old;
    }
}
static void ld_param(Warp& w, const Ins& I, u32 m) {
  u32 t = I.aux[0];
  u64 x = 0;
  memcpy(&x, w.m->params + I.imm, t);
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) put(w, I.d[0], I.dk[0], l, x, t, I.aux[2]);
}

// ---- shared memory ----
static bool shared_ok(Warp& w, u32 a, u32 n, int lane) {
  Machine& M = *w.m;
  if (a % n) {
    M.report(SHARED_MISALIGNED, w.cur, w.id, lane, n, a - SBASE, 0, 0);
    return false;
  }
  if (a < SBASE || (u64)a + n > (u64)SBASE + M.shared_size) {
    M.report(SHARED_OUTSIDE, w.cur, w.id, lane, n, a - SBASE, 0, M.shared_size);
    return false;
  }
  return true;
}
static const u32 IN_FLIGHT = ~0u;
static void shared_read(Warp& w, u32 a, u32 n, int lane, u8* to) {
  Machine& M = *w.m;
  if (!shared_ok(w, a, n, lane)) {
    memset(to, 0xff, n);
    return;
  }
  u32 o = a - SBASE;
  memcpy(to, &M.shared[o], n);
  u32 me = M.epoch << 6 | (w.id + 1);
  bool uninit = false, flight = false, race = false, unsynced = false;
  for (u32 i = o; i < o + n; i++) {
    u32 t = M.wtag[i];
    if (t == 0)
      uninit = true;
    else if (t == IN_FLIGHT)
      flight = true;
    else if (t >> 6 == M.epoch) {
      if (t != me)
        race = true;
      else if (M.wlane[i] != lane && M.wsync[i] == w.syncs)
        unsynced = true;
    }
    if (M.repoch[i] != M.epoch) {
      M.repoch[i] = M.epoch;
      M.rmask[i] = 0;
    }
    M.rmask[i] |= 1u << w.id;
  }
  if (uninit) M.report(SHARED_UNINIT, w.cur, w.id, lane, n, o, 0, 0);
  if (flight) M.report(SHARED_IN_FLIGHT, w.cur, w.id, lane, n, o, 0, 0);
  if (race) M.report(RACE_READ_AFTER_WRITE, w.cur, w.id, lane, n, o, 0, (M.wtag[o] & 63) - 1);
  if (unsynced) M.report(WARP_UNSYNCED, w.cur, w.id, lane, n, o, 0, M.wlane[o]);
}
// data null: an asynchronous copy is under way
static void shared_write(Warp& w, u32 a, u32 n, int lane, const u8* data, bool arrival) {
  Machine& M = *w.m;
  if (!shared_ok(w, a, n, lane)) return;
  u32 o = a - SBASE;
  u32 me = M.epoch << 6 | (w.id + 1);
  bool ww = false, war = false, flight = false, lanes = false;
  bool same = data && memcmp(&M.shared[o], data, n) == 0;
  if (!arrival)
    for (u32 i = o; i < o + n; i++) {
      u32 t = M.wtag[i];
      if (t == IN_FLIGHT)
        flight = true;
      else if (t && t >> 6 == M.epoch && t != me)
        ww = true;
      if (t == me && M.wstamp[i] == M.stamp && M.wlane[i] != lane) lanes = true;
      if (M.repoch[i] == M.epoch && (M.rmask[i] & ~(1u << w.id))) war = true;
    }
  if (M.wgmma) {
    if (!arrival && M.wreaders[o >> 4])
      M.report(WGMMA_OVERWRITE, w.cur, w.id, lane, n, o, 0, M.wreaders[o >> 4]);
    for (u32 i = o; i < o + n; i++) {
      M.wproxy[i] = w.proxies;
      M.wcopy[i] = arrival;
    }
  }
  if (flight) M.report(SHARED_IN_FLIGHT, w.cur, w.id, lane, n, o, 0, 1);
  if (ww)
    M.report(same ? SAME_VALUE_WRITE_WRITE : RACE_WRITE_WRITE, w.cur, w.id, lane, n, o, 0,
             (M.wtag[o] & 63) - 1);
  if (lanes && !same) M.report(LANES_WRITE_WRITE, w.cur, w.id, lane, n, o, 0, M.wlane[o]);
  if (war) M.report(RACE_WRITE_AFTER_READ, w.cur, w.id, lane, n, o, 0, M.rmask[o]);
  for (u32 i = o; i < o + n; i++) {
    M.wtag[i] = data ? me : IN_FLIGHT;
    M.wlane[i] = lane;
    M.wsync[i] = w.syncs;
    M.wstamp[i] = M.stamp;
  }
  if (data)
    memcpy(&M.shared[o], data, n);
  else
    memset(&M.shared[o], 0xff, n);
}
// Wavefronts: 32 banks of 4 bytes; 64- and 128-bit requests go by half and quarter warps.
static void banks(Warp& w, const u32* a, u32 n, u32 m) {
  if (!m) return;
  u32 group = n <= 4 ? 32 : n == 8 ? 16 : 8;
  Stat& S = w.m->stats[w.cur];
  S.requests++;
  S.used_bytes += (u64)n * __builtin_popcount(m);
  for (u32 g = 0; g < 32; g += group) {
    u32 words[32][32];
    u32 k[32] = {0};
    u32 most = 0;
    bool any = false;
    for (u32 l = g; l < g + group; l++)
      if (m >> l & 1) {
        any = true;
        for (u32 b = a[l] >> 2; b <= (a[l] + n - 1) >> 2; b++) {
          u32 bank = b & 31;
          bool seen = false;
          for (u32 i = 0; i < k[bank]; i++)
            if (words[bank][i] == b) seen = true;
          if (!seen) {
            words[bank][k[bank]++] = b;
            if (k[bank] > most) most = k[bank];
          }
        }
      }
    if (any) {
      S.waves += most;
      S.phases++;
    }
  }
}
static void ld_shared(Warp& w, const Ins& I, u32 m) {
  u32 t = I.aux[0], v = I.aux[1], n = t * v;
  u32 a[32];
  const u32* base = ROW(u32, I.s[0]);
  for (int l = 0; l < 32; l++) a[l] = base[l] + (u32)I.imm;
  banks(w, a, n, m);
  u8 buf[16];
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      shared_read(w, a[l], n, l, buf);
      for (u32 i = 0; i < v; i++) {
        u64 x = 0;
        memcpy(&x, buf + i * t, t);
        if (I.d[i] >= 0) put(w, I.d[i], I.dk[i], l, x, t, I.aux[2]);
      }
    }
}
static void st_shared(Warp& w, const Ins& I, u32 m) {
  u32 t = I.aux[0], v = I.aux[1], n = t * v;
  u32 a[32];
  const u32* base = ROW(u32, I.s[0]);
  for (int l = 0; l < 32; l++) a[l] = base[l] + (u32)I.imm;
  banks(w, a, n, m);
  u8 buf[16];
  w.m->stamp++;
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      for (u32 i = 0; i < v; i++) {
        u64 x = get(w, I.s[1 + i], I.sk[1 + i], l);
        memcpy(buf + i * t, &x, t);
      }
      shared_write(w, a[l], n, l, buf, false);
    }
}
static void cp_async(Warp& w, const Ins& I,
                     u32 m) {  // s: dst, src, [src size]; imm: dst offset, aux: 0 size, 1 src offset
  u32 n = I.aux[0];
  u32 d[32];
  u64 a[32];
  u32 some = 0;
  w.m->stamp++;
  for (int l = 0; l < 32; l++) {
    d[l] = ROW(u32, I.s[0])[l] + (u32)I.imm;
    a[l] = ROW(u64, I.s[1])[l] + I.aux[1];
    u32 size = I.ns > 2 ? ROW(u32, I.s[2])[l] : n;
    if ((m >> l & 1) && size) some |= 1u << l;
  }
  sectors(w, a, n, some);
  Stat& S = w.m->stats[w.cur];
  u64 req = S.requests;
  u64 used = S.used_bytes;
  banks(w, d, n, m);
  S.requests = req + (some ? 0 : 1);
  S.used_bytes = used;
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      Pending p;
      p.lane = l;
      p.dst = d[l];
      p.size = n;
      p.pc = w.cur;
      memset(p.data, 0, 16);
      u32 size = I.ns > 2 ? ROW(u32, I.s[2])[l] : n;
      if (size > n) {
        w.m->fail("cp.async: source size above the copy's");
        return;
      }
      if (a[l] % n && size) w.m->report(MISALIGNED, w.cur, w.id, l, n, a[l] & 0xffffffffff, a[l] >> 40, 1);
      if (size) {
        u8 buf[16];
        if (size == n)
          read_global(w, I, a[l], n, l, buf, 1);
        else
          for (u32 i = 0; i < size; i++) read_global(w, I, a[l] + i, 1, l, buf + i, 1);
        memcpy(p.data, buf, size);
      }
      if (shared_ok(w, d[l], n, l)) {
        shared_write(w, d[l], n, l, nullptr, false);
        w.open.push_back(p);
      }
    }
}
static bool converged(Warp& w, u32 m) {
  if (m != w.alive) {
    w.m->report(DIVERGENT_SYNC, w.cur, w.id, 0, 0, m, 0, w.alive);
    return false;
  }
  return true;
}
static void arrive(Warp& w, u32 left) {
  while (w.groups.size() > left) {
    for (auto& p : w.groups.front()) {
      u32 pc = w.cur;
      shared_write(w, p.dst, p.size, p.lane, p.data, true);
      w.cur = pc;
    }
    w.groups.pop_front();
  }
}
static void cp_commit(Warp& w, const Ins& I, u32 m) {
  if (!converged(w, m)) w.m->fail("cp.async.commit_group by a part of a warp");
  w.groups.push_back(std::move(w.open));
  w.open.clear();
}
static void cp_wait(Warp& w, const Ins& I, u32 m) {
  if (!converged(w, m)) w.m->fail("cp.async.wait_group by a part of a warp");
  w.m->stamp++;
  arrive(w, (u32)I.imm);
}
static void cp_wait_all(Warp& w, const Ins& I, u32 m) {
  cp_commit(w, I, m);
  arrive(w, 0);
}

static void ldmatrix(Warp& w, const Ins& I, u32 m) {  // aux: 0 count, 1 trans
  converged(w, m);
  u32 n = I.aux[0];
  const u32* base = ROW(u32, I.s[0]);
  u16 mat[4][8][8];
  u32 a[32];
  u32 used = 0;
  for (u32 l = 0; l < 8 * n; l++) {
    a[l] = base[l] + (u32)I.imm;
    used |= 1u << l;
    shared_read(w, a[l], 16, l, (u8*)mat[l / 8][l % 8]);
  }
  u32 aa[32] = {0};
  memcpy(aa, a, 4 * 8 * n);
  banks(w, aa, 16, used);
  for (u32 k = 0; k < n; k++)
    for (int l = 0; l < 32; l++) {
      int row = l / 4, c = l % 4 * 2;
      u16 lo = I.aux[1] ? mat[k][c][row] : mat[k][row][c],
          hi = I.aux[1] ? mat[k][c + 1][row] : mat[k][row][c + 1];
      ROW(u32, I.d[k])[l] = (u32)hi << 16 | lo;
    }
}
static void stmatrix(Warp& w, const Ins& I, u32 m) {
  converged(w, m);
  u32 n = I.aux[0];
  const u32* base = ROW(u32, I.s[0]);
  u16 mat[4][8][8];
  u32 a[32] = {0};
  u32 used = 0;
  for (u32 k = 0; k < n; k++)
    for (int l = 0; l < 32; l++) {
      int row = l / 4, c = l % 4 * 2;
      u32 x = ROW(u32, I.s[1 + k])[l];
      if (I.aux[1]) {
        mat[k][c][row] = (u16)x;
        mat[k][c + 1][row] = (u16)(x >> 16);
      } else {
        mat[k][row][c] = (u16)x;
        mat[k][row][c + 1] = (u16)(x >> 16);
      }
    }
  w.m->stamp++;
  for (u32 l = 0; l < 8 * n; l++) {
    a[l] = base[l] + (u32)I.imm;
    used |= 1u << l;
  }
  banks(w, a, 16, used);
  for (u32 l = 0; l < 8 * n; l++) shared_write(w, a[l], 16, l, (u8*)mat[l / 8][l % 8], false);
}

// ---- tensor cores ----
// Mode 0: exact products, summed in float64, rounded once to float32 (nearest).
// Mode 1: as measured on A100: sums of `block` products and the accumulator, aligned to the largest exponent,
// cut off one bit (F: 24) below float32's last, the sum cut to float32. Bit 2 of the mode, H100's: sums of 16
// (TF32: 8), two bits (25). TF32 operands lose their last 13 bits, as in hardware; with bit 1 of the mode
// they are rounded instead, to tell what that costs.
static inline void mma_hw(const float* A, const float* B, float* C, int K, int block, int F) {
  for (int k0 = 0; k0 < K; k0 += block)
    for (int r = 0; r < 16; r++)
      for (int c = 0; c < 8; c++) {
        double t[17];
        int n = 0;
        int emax = -100000;
        double special = 0;
        bool bad = false;
        for (int k = k0; k < k0 + block; k++) {
          float x = A[r * K + k], y = B[k * 8 + c];
          double p = (double)x * y;
          t[n++] = p;
          if (!std::isfinite(p))
            bad = true;
          else if (p != 0) {
            int ex, ey;
            std::frexp(x, &ex);
            std::frexp(y, &ey);
            int e = ex + ey - 2;
            if (e > emax) emax = e;
          }
          special += p;
        }
        float cc = C[r * 8 + c];
        t[n++] = cc;
        special += cc;
        if (!std::isfinite(cc))
          bad = true;
        else if (cc != 0) {
          int e;
          std::frexp(cc, &e);
          if (e - 1 > emax) emax = e - 1;
        }
        if (bad) {
          C[r * 8 + c] = (float)special;
          continue;
        }
        if (emax == -100000) {
          C[r * 8 + c] = 0;
          continue;
        }
        double unit = std::ldexp(1.0, emax - F), sum = 0, inv = std::ldexp(1.0, F - emax);
        for (int i = 0; i < n; i++) sum += std::trunc(t[i] * inv);
        sum *= unit;
        float f = (float)sum;
        if (std::fabs((double)f) > std::fabs(sum)) f = std::nextafterf(f, 0.0f);
        C[r * 8 + c] = f;
      }
}
static inline void mma_exact(const float* A, const float* B, float* C, int K) {
  for (int r = 0; r < 16; r++) {
    double acc[8];
    for (int c = 0; c < 8; c++) acc[c] = C[r * 8 + c];
    for (int k = 0; k < K; k++) {
      double x = A[r * K + k];
      for (int c = 0; c < 8; c++) acc[c] += x * (double)B[k * 8 + c];
    }
    for (int c = 0; c < 8; c++) C[r * 8 + c] = (float)acc[c];
  }
}
template <int T, int K>
void mma(Warp& w, const Ins& I, u32 m) {  // T: 0 f16, 1 bf16, 2 tf32; s: A, B, C
  converged(w, m);
  float A[16 * K], B[K * 8], C[128];
  const int na = T == 2 ? K / 2 : K / 4, nb = na / 2;
  const bool round = w.m->mma_mode & 2;
  for (int l = 0; l < 32; l++) {
    int g = l >> 2, q = l & 3;
    for (int i = 0; i < na; i++) {
      u32 x = ROW(u32, I.s[i])[l];
      int row = g + (i & 1 ? 8 : 0);
      if (T == 2)
        A[row * K + q + (i >> 1) * 4] = flt((round ? to_tf32_rna(x) : x) & 0xffffe000);
      else {
        int k = q * 2 + (i >> 1) * 8;
        A[row * K + k] = T ? bf16(x) : f16(x);
        A[row * K + k + 1] = T ? bf16(x >> 16) : f16(x >> 16);
      }
    }
    for (int i = 0; i < nb; i++) {
      u32 x = ROW(u32, I.s[na + i])[l];
      if (T == 2)
        B[(q + i * 4) * 8 + g] = flt((round ? to_tf32_rna(x) : x) & 0xffffe000);
      else {
        int k = q * 2 + i * 8;
        B[k * 8 + g] = T ? bf16(x) : f16(x);
        B[(k + 1) * 8 + g] = T ? bf16(x >> 16) : f16(x >> 16);
      }
    }
    for (int i = 0; i < 4; i++)
      C[(g + (i & 2 ? 8 : 0)) * 8 + q * 2 + (i & 1)] = ROW(float, I.s[na + nb + i])[l];
  }
  if (false)
    mma_exact(A, B, C, K);
  else if (w.m->mma_mode & 1)
    mma_hw(A, B, C, K, std::min(K, T == 2 ? 8 : 16), 25);
  else
    mma_hw(A, B, C, K, T == 2 ? 4 : 8, 24);
  for (int l = 0; l < 32; l++) {
    int g = l >> 2, q = l & 3;
    for (int i = 0; i < 4; i++) ROW(float, I.d[i])[l] = C[(g + (i & 2 ? 8 : 0)) * 8 + q * 2 + (i & 1)];
  }
}

// ---- warpgroups ----
// Each warp computes its own 16 rows when it issues the instruction. Until the wait that retires it the
// accumulators hold NaN (their values are in the shadow registers, where the next wgmma finds them) and the
// bytes of shared memory count as being read.
static inline Row& row_of(Warp& w, u32 off) { return w.rows[off >> 6]; }
static void watch(Warp& w, const Ins& I) {
  Machine& M = *w.m;
  const s32* e = M.extra + I.watch;
  u32 nr = e[0], nw = e[1];
  for (u32 i = 0; i < nr + nw; i++) {
    Row& R = row_of(w, e[2 + i]);
    bool write = i >= nr;
    if (R.use == ACCUMULATOR || (R.use == OPERAND && write))
      M.report(WGMMA_REGISTER, w.cur, w.id, 0, 4, e[2 + i], 0, write);
    else if (R.use == OPERAND)
      M.report(WGMMA_OPERAND_READ, w.cur, w.id, 0, 4, e[2 + i], 0, write);
    R.touched = w.wfences + 1;
  }
}
static bool whole(
    Warp& w, u32 m,
    u64 what) {  // all lanes, and (compared at the next barrier) all warps of the warpgroup alike
  if (m != FULL || w.alive != FULL) {
    w.m->report(DIVERGENT_SYNC, w.cur, w.id, 0, 0, m, 0, w.alive);
    w.m->fail("wgmma by a part of a warp");
    return false;
  }
  w.whash = (w.whash ^ ((u64)w.cur << 40) ^ what) * 0x9E3779B97F4A7C15ull + 1;
  w.wlast = w.cur;
  return true;
}
static void proxy_fence(Warp& w, const Ins& I, u32 m) {
  if (m == w.alive) {
    w.proxies++;
    w.proxy_epoch = w.m->epoch;
  }
}
static void wg_fence(Warp& w, const Ins& I, u32 m) {
  if (whole(w, m, 1)) w.wfences++;
}
static void wg_commit(Warp& w, const Ins& I, u32 m) {
  if (whole(w, m, 2)) {
    w.wgroups.push_back(std::move(w.wopen));
    w.wopen.clear();
    w.wcommitted++;
  }
}
static void read_mark(Warp& w, u32 chunk) {
  Machine& M = *w.m;
  for (u32 i = 16 * chunk; i < 16 * chunk + 16 && i < M.shared_size; i++) {
    if (M.repoch[i] != M.epoch) {
      M.repoch[i] = M.epoch;
      M.rmask[i] = 0;
    }
    M.rmask[i] |= 1u << w.id;
  }
}
static void wg_wait(Warp& w, const Ins& I, u32 m) {
  if (!whole(w, m, 3)) return;
  while (w.wgroups.size() > (u64)I.imm) {
    w.wretired++;
    for (auto& g : w.wgroups.front()) {
      for (u32 c : g.chunks) {
        w.m->wreaders[c]--;
        read_mark(w, c);
      }
      for (u32 r : g.rows) {
        Row& R = row_of(w, r);
        if (R.use != FREE && R.group <= w.wretired) {
          if (R.use == ACCUMULATOR) memcpy(w.r + r, &w.shadow[r], 128);
          R.use = FREE;
        }
      }
    }
    w.wgroups.pop_front();
  }
}
static u64 wg_seen;  // forms of operands met: bit 6 × swizzle code (of B: 4 more) + 2 × type + major; 48 +
                     // type: A in registers
struct Desc {
  u32 start, lead, stride;
  int width;
  bool major;
};  // width: bytes of the swizzle, 16: none; major: M or N is contiguous
static bool descriptor(Warp& w, const u64* row, Desc& D, bool major, u32 form) {
  Machine& M = *w.m;
  u64 d = row[0];
  bool same = true;
  for (int l = 1; l < 32; l++) same &= row[l] == d;
  if (!same) M.report(WGMMA_DIVERGENT, w.cur, w.id, 0, 8, d, 0, 1);
  static const int widths[4] = {16, 128, 64, 32};
  wg_seen |= 1ull << (6 * (form * 4 + (d >> 62)) + 2 * w.m->code[w.cur].aux[2] + major);
  D.start = (d & 0x3fff) << 4;
  D.lead = (d >> 16 & 0x3fff) << 4;
  D.stride = (d >> 32 & 0x3fff) << 4;
  D.width = widths[d >> 62];
  D.major = major;
  if (d >> 49 & 7) {
    M.fail("wgmma: a matrix base offset");
    return false;
  }
  if (d & 0x3fffc000c000c000ull & ~(7ull << 49))
    M.report(WGMMA_DESCRIPTOR, w.cur, w.id, 0, 8, d, 0, 0);  // reserved bits
  return true;
}
// Address of the 16 bytes at row `i` (M or N) and 16-byte column `j` of K; where M or N is contiguous, at `k`
// and column `j` of M or N.
static inline u32 piece(const Desc& D, u32 i, u32 j) {
  u32 a = D.start, W = D.width;
  if (!D.major)
    a += W == 16 ? i / 8 * D.stride + i % 8 * 16 + j * D.lead : i / 8 * D.stride + i % 8 * W + j * 16;
  else
    a += W == 16 ? j * D.stride + i % 8 * 16 + i / 8 * D.lead
                 : j / (W / 16) * D.lead + j % (W / 16) * 16 + i / 8 * D.stride + i % 8 * W;
  return W == 16 ? a : a ^ ((a >> 7 & (W / 16 - 1)) << 4);
}
static void wg_read(Warp& w, u32 a, u8* to, Wgmma& G) {
  Machine& M = *w.m;
  shared_read(w, a, 16, 0, to);
  if (a < SBASE || (u64)a + 16 > (u64)SBASE + M.shared_size) return;
  u32 o = a - SBASE;
  bool store = false, copy = false;
  G.chunks.push_back(o >> 4);
  M.wreaders[o >> 4]++;
  for (u32 i = o; i < o + 16; i++) {
    u32 t = M.wtag[i];
    if (t == 0 || t == IN_FLIGHT) continue;
    Warp& by = M.warps[(t & 63) - 1];
    u32 seen = &by == &w ? by.proxies : by.proxies_before;  // fences of the writer that this warp can know of
    if (seen <= M.wproxy[i] && w.proxy_epoch <= t >> 6) (M.wcopy[i] ? copy : store) = true;
  }
  if (store) M.report(WGMMA_PROXY, w.cur, w.id, 0, 16, o, 0, (M.wtag[o] & 63) - 1);
  if (copy) M.report(WGMMA_PROXY_COPY, w.cur, w.id, 0, 16, o, 0, (M.wtag[o] & 63) - 1);
}
static inline int exponent(float x, int least) {
  if (x == 0) return -100000;
  int e;
  std::frexp(x, &e);
  return std::max(e - 1, least);
}
template <int K>
static void wg_sum(const float* A, const float* B, float* C, int N, int least,
                   bool hardware) {  // C += A B: 16 × K, K × N
  static thread_local int eb[16 * 256];
  static thread_local double db[16 * 256];
  int ea[16 * K];
  bool bad = false;
  for (int i = 0; i < 16 * K; i++) {
    ea[i] = exponent(A[i], least);
    bad |= !std::isfinite(A[i]);
  }
  for (int i = 0; i < K * N; i++) {
    eb[i] = exponent(B[i], least);
    db[i] = B[i];
    bad |= !std::isfinite(B[i]);
  }
  for (int r = 0; r < 16; r++) {
    double sum[256], inv[256];
    int emax[256];
    float* c = C + r * N;
    if (!hardware || bad)
      for (int n = 0; n < N; n++) sum[n] = c[n];
    if (!hardware || bad)
      for (int k = 0; k < K; k++) {
        double x = A[r * K + k];
        for (int n = 0; n < N; n++) sum[n] += x * db[k * N + n];
      }
    if (!hardware) {
      for (int n = 0; n < N; n++) c[n] = (float)sum[n];
      continue;
    }
    double special[256];
    if (bad) memcpy(special, sum, 8 * N);
    for (int n = 0; n < N; n++) emax[n] = exponent(c[n], -126);
    for (int k = 0; k < K; k++) {
      int x = ea[r * K + k];
      for (int n = 0; n < N; n++) {
        int e = x + eb[k * N + n];
        emax[n] = e > emax[n] ? e : emax[n];
      }
    }
    for (int n = 0; n < N; n++) {
      u64 b = emax[n] < -900 ? 0 : (u64)(1023 + 25 - emax[n]) << 52;
      memcpy(&inv[n], &b, 8);
      sum[n] = std::trunc(c[n] * inv[n]);
    }
    for (int k = 0; k < K; k++) {
      double x = A[r * K + k];
      for (int n = 0; n < N; n++) sum[n] += std::trunc(x * db[k * N + n] * inv[n]);
    }
    for (int n = 0; n < N; n++) {
      if (bad && !std::isfinite(special[n])) {
        c[n] = (float)special[n];
        continue;
      }
      if (!std::isfinite(c[n])) continue;
      if (emax[n] < -900) {
        c[n] = 0;
        continue;
      }
      double s = sum[n] / inv[n];
      float f = (float)s;
      if (std::fabs((double)f) > std::fabs(s)) f = std::nextafterf(f, 0.0f);
      c[n] = f;
    }
  }
}
template <int T>
static void wg_elements(const u8* p, float* to, int step) {
  if (T == 2)
    for (int i = 0; i < 4; i++) {
      u32 x;
      memcpy(&x, p + 4 * i, 4);
      to[i * step] = flt(x);
    }
  else
    for (int i = 0; i < 8; i++) {
      u16 x;
      memcpy(&x, p + 2 * i, 2);
      to[i * step] = T ? bf16(x) : f16(x);
    }
}
template <int T>
static void wg_mma_t(Warp& w, const Ins& I) {
  const int K = T == 2 ? 8 : 16, E = T == 2 ? 4 : 8;
  Machine& M = *w.m;
  const int N = I.aux[1], flags = I.aux[3];
  const bool regs = flags & 1;
  static thread_local float A[64 * 16], B[16 * 256], C[16 * 256];
  Wgmma G;
  u8 p[16];
  const int na = regs ? 4 : 1;
  const s32* acc = M.extra + I.aux[0];
  const u32 shape = N << 2 | T;
  const u32 group = w.wcommitted + 1;
  bool unfenced = w.wfences == 0, busy = false;
  const u32 sd = w.p[I.s[na + 1]];
  if (sd != 0 && sd != FULL) {
    M.fail("wgmma: scale-d differs between lanes");
    return;
  }
  Desc D;
  if (!descriptor(w, ROW(u64, I.s[na]), D, flags >> 4 & 1, 1)) return;
  if (!D.major) {
    for (int n = 0; n < N; n++)
      for (int j = 0; j < 2; j++) {
        wg_read(w, piece(D, n, j), p, G);
        wg_elements<T>(p, B + j * E * N + n, N);
      }
  } else
    for (int k = 0; k < K; k++)
      for (int j = 0; j < N / E; j++) {
        wg_read(w, piece(D, k, j), p, G);
        wg_elements<T>(p, B + k * N + j * E, 1);
      }
  float* mine = A;
  if (regs) wg_seen |= 1ull << (48 + T);
  if (regs)
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {
        u32 x = ROW(u32, I.s[i])[l];
        int g = l >> 2, q = l & 3, r = g + (i & 1 ? 8 : 0);
        if (T == 2)
          A[r * K + q + (i >> 1) * 4] = flt(x);
        else {
          int k = q * 2 + (i >> 1) * 8;
          A[r * K + k] = T ? bf16(x) : f16(x);
          A[r * K + k + 1] = T ? bf16(x >> 16) : f16(x >> 16);
        }
      }
  else {  // all 64 rows are read: the warpgroup reads them, whichever warp
    if (!descriptor(w, ROW(u64, I.s[0]), D, flags >> 3 & 1, 0)) return;
    if (!D.major) {
      for (int r = 0; r < 64; r++)
        for (int j = 0; j < 2; j++) {
          wg_read(w, piece(D, r, j), p, G);
          wg_elements<T>(p, A + r * K + j * E, 1);
        }
    } else
      for (int k = 0; k < K; k++)
        for (int j = 0; j < 64 / E; j++) {
          wg_read(w, piece(D, k, j), p, G);
          wg_elements<T>(p, A + j * E * K + k, K);
        }
    mine = A + (w.id & 3) * 16 * K;
  }
  if (T == 2) {
    const bool round = M.mma_mode & 2;
    for (int i = 0; i < 16 * K; i++)
      mine[i] = flt((round ? to_tf32_rna(bits(mine[i])) : bits(mine[i])) & 0xffffe000);
    for (int i = 0; i < K * N; i++) B[i] = flt((round ? to_tf32_rna(bits(B[i])) : bits(B[i])) & 0xffffe000);
  }
  if ((flags >> 1 ^ flags >> 2) & 1)
    for (int i = 0; i < 16 * K; i++) mine[i] = -mine[i];
  for (int i = 0; i < N / 2; i++) {
    Row& R = row_of(w, acc[i]);
    if (R.touched == w.wfences + 1) unfenced = true;
    if (R.use == OPERAND || (R.use == ACCUMULATOR && R.shape != shape)) busy = true;
    const float* from = R.use == ACCUMULATOR ? (const float*)&w.shadow[acc[i]] : ROW(float, acc[i]);
    for (int l = 0; l < 32; l++)
      C[((l >> 2) + (i & 2 ? 8 : 0)) * N + i / 4 * 8 + (l & 3) * 2 + (i & 1)] = sd ? from[l] : 0.0f;
  }
  if (regs)
    for (int i = 0; i < 4; i++) {
      Row& R = row_of(w, I.s[i]);
      if (R.touched == w.wfences + 1) unfenced = true;
      if (R.use == ACCUMULATOR) busy = true;
    }
  if (unfenced) M.report(WGMMA_UNFENCED, w.cur, w.id, 0, 4, w.wfences, 0, 0);
  if (busy) M.report(WGMMA_REGISTER, w.cur, w.id, 0, 4, 0, 0, 2);
  wg_sum<K>(mine, B, C, N, T == 0 ? -14 : -126, true);
  for (int i = 0; i < N / 2; i++) {
    Row& R = row_of(w, acc[i]);
    R.use = ACCUMULATOR;
    R.group = group;
    R.shape = shape;
    G.rows.push_back(acc[i]);
    float* to = (float*)&w.shadow[acc[i]];
    for (int l = 0; l < 32; l++)
      to[l] = C[((l >> 2) + (i & 2 ? 8 : 0)) * N + i / 4 * 8 + (l & 3) * 2 + (i & 1)];
    memset(w.r + acc[i], 0xff, 128);
  }
  if (regs)
    for (int i = 0; i < 4; i++) {
      Row& R = row_of(w, I.s[i]);
      if (R.use != ACCUMULATOR) {
        R.use = OPERAND;
        R.group = group;
        G.rows.push_back(I.s[i]);
      }
    }
  w.wopen.push_back(std::move(G));
}
static void wg_mma(Warp& w, const Ins& I, u32 m) {
  const bool regs = I.aux[3] & 1;
  u64 what = (u64)w.p[I.s[regs ? 5 : 2]] ^ ROW(u64, I.s[regs ? 4 : 1])[0] * 31 ^
             (regs ? 0 : ROW(u64, I.s[0])[0] * 1009);
  if (!whole(w, m, what)) return;
  if (I.aux[2] == 0)
    wg_mma_t<0>(w, I);
  else if (I.aux[2] == 1)
    wg_mma_t<1>(w, I);
  else
    wg_mma_t<2>(w, I);
}
static void compare_groups(Warp* ws, u32 nw) {  // at barriers and at the end
  for (u32 g = 0; g + 3 < nw; g += 4)
    for (u32 i = 1; i < 4; i++)
      if (ws[g + i].whash != ws[g].whash) {
        ws[g].m->report(WGMMA_DIVERGENT, ws[g + i].wlast, g + i, 0, 0, ws[g].wlast, 0, 0);
        ws[g + i].whash = ws[g].whash;
      }
}

// ---- warp operations, control ----
template <int MODE>
void shfl(Warp& w, const Ins& I, u32 m) {  // s: a, b, c, mask
  converged(w, m);
  u32 a[32], b[32], c[32];
  memcpy(a, ROW(u32, I.s[0]), 128);
  memcpy(b, ROW(u32, I.s[1]), 128);
  memcpy(c, ROW(u32, I.s[2]), 128);
  u32 ps = 0, members = ROW(u32, I.s[3])[0];
  if ((m & members) != m) w.m->report(DIVERGENT_SYNC, w.cur, w.id, 0, 1, members, 0, m);
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      int bv = b[l] & 31, seg = c[l] >> 8 & 31, cl = c[l] & 31;
      int maxl = (l & seg) | (cl & ~seg), minl = l & seg;
      int j;
      bool p;
      if (MODE == 0) {
        j = l - bv;
        p = j >= maxl;
      } else if (MODE == 1) {
        j = l + bv;
        p = j <= maxl;
      } else if (MODE == 2) {
        j = l ^ bv;
        p = j <= maxl;
      } else {
        j = minl | (bv & ~seg);
        p = j <= maxl;
      }
      if (!p) j = l;
      ROW(u32, I.d[0])[l] = a[j];
      ps |= (u32)p << l;
    }
  if (I.nd > 1) w.p[I.d[1]] = (w.p[I.d[1]] & ~m) | (ps & m);
}
template <int MODE>
void vote(Warp& w, const Ins& I, u32 m) {  // 0 ballot 1 all 2 any
  converged(w, m);
  u32 v = w.p[I.s[0]] & m;
  if (MODE == 0) {
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) ROW(u32, I.d[0])[l] = v;
  } else {
    u32 r = (MODE == 1 ? v == m : v != 0) ? FULL : 0;
    w.p[I.d[0]] = (w.p[I.d[0]] & ~m) | (r & m);
  }
}
static void bra(Warp& w, const Ins& I, u32 m) {}
static void nop(Warp& w, const Ins& I, u32 m) {}
static void bar_warp(Warp& w, const Ins& I, u32 m) {
  converged(w, m);
  w.syncs++;
}

#define BIN(name, T, expr) {name, bin<T, T, T, [](T a, T b) -> T { return (expr); }>}
#define FBIN(name, expr) {name, bin<float, float, float, [](float a, float b) -> float { return (expr); }>}
#define FUN(name, expr) {name, un<float, float, [](float a) -> float { return (expr); }>}
#define CMPS(T, S)                                                 \
  {"setp.eq." S, setp<T, [](T a, T b) { return (a == b); }>},      \
      {"setp.ne." S, setp<T, [](T a, T b) { return (a != b); }>},  \
      {"setp.lt." S, setp<T, [](T a, T b) { return (a < b); }>},   \
      {"setp.le." S, setp<T, [](T a, T b) { return (a <= b); }>},  \
      {"setp.gt." S, setp<T, [](T a, T b) { return (a > b); }>}, { \
    "setp.ge." S, setp<T, [](T a, T b) { return (a >= b); }>       \
  }
#define INTS(T, S)                                                                                        \
  BIN("add." S, T, (T)(a + b)), BIN("sub." S, T, (T)(a - b)), BIN("mul.lo." S, T, (T)((u64)a * (u64)b)),  \
      BIN("min." S, T, a < b ? a : b), BIN("max." S, T, a > b ? a : b), CMPS(T, S),                       \
      BIN("div." S, T,                                                                                    \
          b == 0                           ? (T) - 1                                                      \
          : (T(-1) < T(0) && b == (T) - 1) ? (T)(0 - (u64)a)                                              \
                                           : (T)(a / b)),                                                 \
      BIN("rem." S, T,                                                                                    \
          b == 0                           ? a                                                            \
          : (T(-1) < T(0) && b == (T) - 1) ? (T)0                                                         \
                                           : (T)(a % b)),                                                 \
      {"mad.lo." S, tri<T, T, T, T, [](T a, T b, T c) -> T { return ((T)((u64)a * (u64)b + (u64)c)); }>}, \
      {"neg." S, un<T, T, [](T a) -> T { return ((T)(0 - (u64)a)); }>}, {                                 \
    "abs." S, un<T, T, [](T a) -> T { return (a < 0 ? (T)(0 - (u64)a) : a); }>                            \
  }
#define BITS(T, S)                                                                                   \
  BIN("and." S, T, a& b), BIN("or." S, T, a | b), BIN("xor." S, T, a ^ b),                           \
      {"not." S, un<T, T, [](T a) -> T { return (~a); }>}, {"selp." S, selp<T>},                     \
      {"mov." S, un<T, T, [](T a) -> T { return (a); }>}, {                                          \
    "shl." S, bin<T, T, u32, [](T a, u32 b) -> T { return (b >= sizeof(T) * 8 ? 0 : (T)(a << b)); }> \
  }
#define SHR(T, S) \
  {"shr." S,      \
   bin<T, T, u32, [](T a, u32 b) -> T { return (b >= sizeof(T) * 8 ? (T)(a < 0 ? -1 : 0) : (T)(a >> b)); }>}
#define CVT(D, DR, DN, S, SR, SN) {"cvt." DN "." SN, un<DR, SR, [](SR a) -> DR { return ((DR)(D)(S)a); }>}
#define CVTS(D, DR, DN)                                                                                  \
  CVT(D, DR, DN, u8, u16, "u8"), CVT(D, DR, DN, s8, u16, "s8"), CVT(D, DR, DN, u16, u16, "u16"),         \
      CVT(D, DR, DN, s16, u16, "s16"), CVT(D, DR, DN, u32, u32, "u32"), CVT(D, DR, DN, s32, u32, "s32"), \
      CVT(D, DR, DN, u64, u64, "u64"), CVT(D, DR, DN, s64, u64, "s64")

struct Entry {
  const char* name;
  Exec fn;
};
static const Entry TABLE[] = {
    {"bra", bra},
    {"ret", nop},
    {"bar.sync", nop},
    {"bar.warp.sync", bar_warp},
    {"nop", nop},
    INTS(u16, "u16"),
    INTS(s16, "s16"),
    INTS(u32, "u32"),
    INTS(s32, "s32"),
    INTS(u64, "u64"),
    INTS(s64, "s64"),
    BITS(u16, "b16"),
    BITS(u32, "b32"),
    BITS(u64, "b64"),
    SHR(u16, "u16"),
    SHR(s16, "s16"),
    SHR(u32, "u32"),
    SHR(s32, "s32"),
    SHR(u64, "u64"),
    SHR(s64, "s64"),
    SHR(u32, "b32"),
    SHR(u64, "b64"),
    SHR(u16, "b16"),
    {"setp.eq.b16", setp<u16, [](u16 a, u16 b) { return (a == b); }>},
    {"setp.ne.b16", setp<u16, [](u16 a, u16 b) { return (a != b); }>},
    {"setp.eq.b32", setp<u32, [](u32 a, u32 b) { return (a == b); }>},
    {"setp.ne.b32", setp<u32, [](u32 a, u32 b) { return (a != b); }>},
    {"setp.eq.b64", setp<u64, [](u64 a, u64 b) { return (a == b); }>},
    {"setp.ne.b64", setp<u64, [](u64 a, u64 b) { return (a != b); }>},
    CMPS(float, "f32"),
    {"setp.ltu.f32", setp<float, [](float a, float b) { return (!(a >= b)); }>},
    {"setp.leu.f32", setp<float, [](float a, float b) { return (!(a > b)); }>},
    {"setp.gtu.f32", setp<float, [](float a, float b) { return (!(a <= b)); }>},
    {"setp.geu.f32", setp<float, [](float a, float b) { return (!(a < b)); }>},
    {"setp.neu.f32", setp<float, [](float a, float b) { return (!(a == b)); }>},
    {"setp.equ.f32", setp<float, [](float a, float b) { return (!(a < b) && !(a > b)); }>},
    {"setp.nan.f32", setp<float, [](float a, float b) { return (a != a || b != b); }>},
    {"setp.num.f32", setp<float, [](float a, float b) { return (a == a && b == b); }>},
    {"and.pred", predop<[](u32 a, u32 b) { return (a & b); }>},
    {"or.pred", predop<[](u32 a, u32 b) { return (a | b); }>},
    {"xor.pred", predop<[](u32 a, u32 b) { return (a ^ b); }>},
    {"not.pred", predop<[](u32 a, u32) { return (~a); }>},
    {"mov.pred", predop<[](u32 a, u32) { return (a); }>},
    {"mul.hi.u32", bin<u32, u32, u32, [](u32 a, u32 b) -> u32 { return ((u64)a * b >> 32); }>},
    {"mul.hi.s32", bin<s32, s32, s32, [](s32 a, s32 b) -> s32 { return ((s64)a * b >> 32); }>},
    {"mul.hi.u64", bin<u64, u64, u64, [](u64 a, u64 b) -> u64 { return ((u128)a * b >> 64); }>},
    {"mul.hi.s64", bin<s64, s64, s64, [](s64 a, s64 b) -> s64 { return ((s128)a * b >> 64); }>},
    {"mul.wide.u16", bin<u32, u16, u16, [](u16 a, u16 b) -> u32 { return ((u32)a * b); }>},
    {"mul.wide.s16", bin<s32, s16, s16, [](s16 a, s16 b) -> s32 { return ((s32)a * b); }>},
    {"mul.wide.u32", bin<u64, u32, u32, [](u32 a, u32 b) -> u64 { return ((u64)a * b); }>},
    {"mul.wide.s32", bin<s64, s32, s32, [](s32 a, s32 b) -> s64 { return ((s64)a * b); }>},
    {"mad.wide.u32", tri<u64, u32, u32, u64, [](u32 a, u32 b, u64 c) -> u64 { return ((u64)a * b + c); }>},
    {"mad.wide.s32",
     tri<s64, s32, s32, s64, [](s32 a, s32 b, s64 c) -> s64 { return ((s64)((u64)((s64)a * b) + (u64)c)); }>},
    {"mad.wide.u16", tri<u32, u16, u16, u32, [](u16 a, u16 b, u32 c) -> u32 { return ((u32)a * b + c); }>},
    {"mad.wide.s16", tri<s32, s16, s16, s32, [](s16 a, s16 b, s32 c) -> s32 { return ((s32)a * b + c); }>},
    {"mad.hi.u32",
     tri<u32, u32, u32, u32, [](u32 a, u32 b, u32 c) -> u32 { return ((u32)((u64)a * b >> 32) + c); }>},
    {"bfe.u32", tri<u32, u32, u32, u32, bfe1<u32>>},
    {"bfe.s32", tri<s32, s32, u32, u32, bfe1<s32>>},
    {"bfe.u64", tri<u64, u64, u32, u32, bfe1<u64>>},
    {"bfe.s64", tri<s64, s64, u32, u32, bfe1<s64>>},
    {"bfi.b32", bfi},
    {"lop3.b32", lop3},
    {"prmt.b32", tri<u32, u32, u32, u32, prmt1>},
    {"popc.b32", un<u32, u32, [](u32 a) -> u32 { return (__builtin_popcount(a)); }>},
    {"clz.b32", un<u32, u32, [](u32 a) -> u32 { return (a ? __builtin_clz(a) : 32); }>},
    {"shf.l.wrap.b32", tri<u32, u32, u32, u32,
                           [](u32 a, u32 b, u32 c) -> u32 {
                             c &= 31;
                             return (c ? b << c | a >> (32 - c) : b);
                           }>},
    {"shf.r.wrap.b32", tri<u32, u32, u32, u32,
                           [](u32 a, u32 b, u32 c) -> u32 {
                             c &= 31;
                             return (c ? a >> c | b << (32 - c) : a);
                           }>},
    FBIN("add.f32", a + b),
    FBIN("sub.f32", a - b),
    FBIN("mul.f32", a* b),
    FBIN("div.f32", a / b),
    FBIN("min.f32", std::fmin(a, b)),
    FBIN("max.f32", std::fmax(a, b)),
    FBIN("min.NaN.f32", (a != a || b != b) ? NAN : std::fmin(a, b)),
    FBIN("max.NaN.f32", (a != a || b != b) ? NAN : std::fmax(a, b)),
    {"add.f32x2", pair<2, [](float a, float b, float) -> float { return (a + b); }>},
    {"mul.f32x2", pair<2, [](float a, float b, float) -> float { return (a * b); }>},
    {"sub.f32x2", pair<2, [](float a, float b, float) -> float { return (a - b); }>},
    {"fma.f32x2", pair<3, [](float a, float b, float c) -> float { return (__builtin_fmaf(a, b, c)); }>},
    {"add.f32.f16", bin<float, u16, float, [](u16 a, float b) -> float { return (f16(a) + b); }>},
    {"add.f32.bf16", bin<float, u16, float, [](u16 a, float b) -> float { return (bf16(a) + b); }>},
    {"fma.f32.f16", tri<float, u16, u16, float,
                        [](u16 a, u16 b, float c) -> float { return (__builtin_fmaf(f16(a), f16(b), c)); }>},
    {"fma.f32.bf16",
     tri<float, u16, u16, float,
         [](u16 a, u16 b, float c) -> float { return (__builtin_fmaf(bf16(a), bf16(b), c)); }>},
    FBIN("add.ftz.f32", ftz(ftz(a) + ftz(b))),
    FBIN("mul.ftz.f32", ftz(ftz(a) * ftz(b))),
    {"fma.f32", tri<float, float, float, float,
                    [](float a, float b, float c) -> float { return (__builtin_fmaf(a, b, c)); }>},
    FUN("neg.f32", -a),
    FUN("abs.f32", std::fabs(a)),
    FUN("ex2.approx.f32", std::exp2(a)),
    FUN("ex2.approx.ftz.f32", ftz(std::exp2(ftz(a)))),
    FUN("lg2.approx.f32", std::log2(a)),
    FUN("rcp.f32", 1.0f / a),
    FUN("sqrt.f32", std::sqrt(a)),
    FUN("rsqrt.f32", 1.0f / std::sqrt(a)),
    CVTS(u8, u16, "u8"),
    CVTS(s8, u16, "s8"),
    CVTS(u16, u16, "u16"),
    CVTS(s16, u16, "s16"),
    CVTS(u32, u32, "u32"),
    CVTS(s32, u32, "s32"),
    CVTS(u64, u64, "u64"),
    CVTS(s64, u64, "s64"),
    {"cvt.f32.f16", un<float, u16, f16>},
    {"cvt.f32.bf16", un<float, u16, bf16>},
    {"cvt.rn.f16.f32", un<u16, float, to_f16>},
    {"cvt.rn.bf16.f32", un<u16, float, to_bf16>},
    {"cvt.rn.f16x2.f32",
     bin<u32, float, float, [](float a, float b) -> u32 { return ((u32)to_f16(a) << 16 | to_f16(b)); }>},
    {"cvt.rn.bf16x2.f32",
     bin<u32, float, float, [](float a, float b) -> u32 { return ((u32)to_bf16(a) << 16 | to_bf16(b)); }>},
    {"cvt.rn.f32.f64", un<float, double, [](double a) -> float { return (float)a; }>},
    {"cvt.f64.f32", un<double, float, [](float a) -> double { return (double)a; }>},
    {"cvt.rn.f64.s32", un<double, s32, [](s32 a) -> double { return (double)a; }>},
    {"cvt.rn.f64.s64", un<double, s64, [](s64 a) -> double { return (double)a; }>},
    {"add.f64", bin<double, double, double, [](double a, double b) -> double { return (a + b); }>},
    {"sub.f64", bin<double, double, double, [](double a, double b) -> double { return (a - b); }>},
    {"mul.f64", bin<double, double, double, [](double a, double b) -> double { return (a * b); }>},
    {"fma.f64", tri<double, double, double, double,
                    [](double a, double b, double c) -> double { return (__builtin_fma(a, b, c)); }>},
    CMPS(double, "f64"),
    {"cvt.rna.tf32.f32", un<u32, u32, to_tf32_rna>},
    {"cvt.rn.f32.s32", un<float, s32, [](s32 a) -> float { return ((float)a); }>},
    {"cvt.rn.f32.u32", un<float, u32, [](u32 a) -> float { return ((float)a); }>},
    {"cvt.rn.f32.s64", un<float, s64, [](s64 a) -> float { return ((float)a); }>},
    {"cvt.rn.f32.u64", un<float, u64, [](u64 a) -> float { return ((float)a); }>},
    {"cvt.rn.f32.s16", un<float, s16, [](s16 a) -> float { return ((float)a); }>},
    {"cvt.rn.f32.u16", un<float, u16, [](u16 a) -> float { return ((float)a); }>},
    {"cvt.rzi.s32.f32", un<s32, float, to_int<s32, float, 0>>},
    {"cvt.rzi.u32.f32", un<u32, float, to_int<u32, float, 0>>},
    {"cvt.rzi.s64.f32", un<s64, float, to_int<s64, float, 0>>},
    {"pack.b32.2", pack<u32, 2>},
    {"pack.b64.2", pack<u64, 2>},
    {"pack.b64.4", pack<u64, 4>},
    {"unpack.b32.2", unpack<u32, 2>},
    {"unpack.b64.2", unpack<u64, 2>},
    {"unpack.b64.4", unpack<u64, 4>},
    {"ld.global", ld_global},
    {"st.global", st_global},
    {"ld.param", ld_param},
    {"ld.shared", ld_shared},
    {"st.shared", st_shared},
    {"atom.global.add.f32", atom_global<true, 0>},
    {"atom.global.add.u32", atom_global<false, 0>},
    {"atom.global.add.s32", atom_global<false, 0>},
    {"cp.async", cp_async},
    {"cp.async.commit_group", cp_commit},
    {"cp.async.wait_group", cp_wait},
    {"cp.async.wait_all", cp_wait_all},
    {"ldmatrix", ldmatrix},
    {"stmatrix", stmatrix},
    {"fence.proxy.async", proxy_fence},
    {"wgmma.fence", wg_fence},
    {"wgmma.mma", wg_mma},
    {"wgmma.commit_group", wg_commit},
    {"wgmma.wait_group", wg_wait},
    {"mma.m16n8k16.f16", mma<0, 16>},
    {"mma.m16n8k8.f16", mma<0, 8>},
    {"mma.m16n8k16.bf16", mma<1, 16>},
    {"mma.m16n8k8.bf16", mma<1, 8>},
    {"mma.m16n8k8.tf32", mma<2, 8>},
    {"mma.m16n8k4.tf32", mma<2, 4>},
    {"shfl.up", shfl<0>},
    {"shfl.down", shfl<1>},
    {"shfl.bfly", shfl<2>},
    {"shfl.idx", shfl<3>},
    {"vote.ballot", vote<0>},
    {"vote.all", vote<1>},
    {"vote.any", vote<2>},
};
static const u32 OP_BRA = 0, OP_RET = 1, OP_BAR = 2;

static void step(Warp& w, u32 active) {  // one instruction for the lanes in `active`; sets w.next or lane pcs
  Machine& M = *w.m;
  const Ins& I = M.code[w.cur];
  u32 m = active;
  if (I.pred >= 0) {
    u32 p = w.p[I.pred];
    m &= I.neg ? ~p : p;
  }
  Stat& S = M.stats[w.cur];
  S.exec++;
  S.lanes += __builtin_popcount(m);
  if (I.watch >= 0 && m) watch(w, I);
  if (I.op == OP_BRA) {
    u32 t = (u32)I.imm;
    if (m == active)
      w.next = t;
    else if (m == 0)
      w.next = w.cur + 1;
    else {  // diverge
      if (w.uniform) {
        w.uniform = false;
        for (int l = 0; l < 32; l++) w.pcs[l] = w.cur;
      }
      for (int l = 0; l < 32; l++)
        if (active >> l & 1) w.pcs[l] = (m >> l & 1) ? t : w.cur + 1;
      w.jumped = true;
      return;
    }
  } else if (I.op == OP_RET) {
    w.alive &= ~m;
    w.next = w.cur + 1;
  } else if (I.op == OP_BAR) {
    if (m != w.alive) {
      M.report(DIVERGENT_SYNC, w.cur, w.id, 0, 0, m, 0, w.alive);
      M.fail("bar.sync by a part of a warp");
    }
    w.waiting = true;
    w.syncs++;
    w.next = w.cur + 1;
  } else {
    if (m) TABLE[I.op].fn(w, I, m);
    w.next = w.cur + 1;
  }
  w.jumped = false;
}
static void run_warp(Warp& w) {
  Machine& M = *w.m;
  while (w.alive && !w.waiting && !M.failed) {
    if (++w.steps > 2000000000ull) {
      M.fail("too many steps");
      return;
    }
    if (w.uniform) {
      w.cur = w.pc;
      if (w.cur >= M.n) {
        M.fail("ran past the end");
        return;
      }
      step(w, w.alive);
      if (!w.jumped) w.pc = w.next;
    } else {
      u32 lowest = ~0u, active = 0;
      for (int l = 0; l < 32; l++)
        if ((w.alive >> l & 1) && w.pcs[l] < lowest) lowest = w.pcs[l];
      for (int l = 0; l < 32; l++)
        if ((w.alive >> l & 1) && w.pcs[l] == lowest) active |= 1u << l;
      if (active == w.alive) {
        w.uniform = true;
        w.pc = lowest;
        continue;
      }
      w.cur = lowest;
      if (w.cur >= M.n) {
        M.fail("ran past the end");
        return;
      }
      step(w, active);
      if (!w.jumped)
        for (int l = 0; l < 32; l++)
          if (active >> l & 1) w.pcs[l] = w.next;
    }
  }
}

extern "C" {
u32 emu_ops() { return sizeof TABLE / sizeof *TABLE; }
const char* emu_op_name(u32 i) { return TABLE[i].name; }
u32 emu_ins_size() { return sizeof(Ins); }
u32 emu_shared_base() { return SBASE; }
u32 emu_kinds() { return KINDS; }
const char* emu_kind_name(u32 i) { return KIND_TEXTS[i]; }
u64 emu_wgmma_seen() { return wg_seen; }

// special: offsets of the rows of tid.x, ctaid.x, y, z, laneid, warpid (or -1)
int emu_launch(const Ins* code, u32 n, u32 nregbytes, u32 npreds, const u8* init, const u32* pinit,
               const s32* special, const u32* grid, u32 threads, u32 shared_size, const u8* params,
               Region* regions, u32 nregions, Stat* stats, Report* reports, u32 max_reports, u32* nreports,
               u64* kind_pc, u32 mma_mode, const s32* extra, u32 wgmma, char* error) {
  Machine M;
  M.code = code;
  M.n = n;
  M.nregbytes = nregbytes;
  M.npreds = npreds;
  M.init = init;
  M.params = params;
  M.regions = regions;
  M.nregions = nregions;
  memcpy(M.grid, grid, 12);
  M.threads = threads;
  M.shared_size = shared_size;
  M.stats = stats;
  M.reports = reports;
  M.max_reports = max_reports;
  M.nreports = 0;
  M.kind_pc = kind_pc;
  M.mma_mode = mma_mode;
  M.error = error;
  M.failed = false;
  M.stamp = 0;
  u32 nw = (threads + 31) / 32;
  std::vector<Warp> ws(nw);
  u8* mem = nullptr;
  size_t per = ((size_t)nregbytes + 4095) / 4096 * 4096;
  if (posix_memalign((void**)&mem, 4096, per * nw)) return 1;
  std::vector<std::vector<u32>> preds(nw, std::vector<u32>(npreds));
  M.shared.resize(shared_size);
  M.wtag.resize(shared_size);
  M.wstamp.resize(shared_size);
  M.repoch.resize(shared_size);
  M.rmask.resize(shared_size);
  M.wsync.resize(shared_size);
  M.wlane.resize(shared_size);
  M.extra = extra;
  M.wgmma = wgmma;
  M.warps = ws.data();
  if (wgmma && threads % 128) {
    snprintf(error, 500, "wgmma without whole warpgroups");
    free(mem);
    return 1;
  }
  if (wgmma) {
    M.wreaders.resize(shared_size / 16 + 1);
    M.wproxy.resize(shared_size);
    M.wcopy.resize(shared_size);
    for (auto& w : ws) {
      w.shadow.resize(nregbytes);
      w.rows.resize(nregbytes / 64 + 1);
    }
  }
  u64 total = (u64)grid[0] * grid[1] * grid[2];
  for (u64 k = 0; k < total && !M.failed; k++) {
    u64 c = k;
    M.cta = (u32)c;
    M.epoch = 1;
    memset(M.shared.data(), 0xff, shared_size);
    std::fill(M.wtag.begin(), M.wtag.end(), 0);
    std::fill(M.repoch.begin(), M.repoch.end(), 0);
    std::fill(M.wstamp.begin(), M.wstamp.end(), 0);
    M.stamp = 0;
    std::fill(M.wreaders.begin(), M.wreaders.end(), 0);
    for (u32 i = 0; i < nw; i++) {
      Warp& w = ws[i];
      w.m = &M;
      w.r = mem + per * i;
      w.p = preds[i].data();
      w.id = i;
      w.pc = 0;
      w.uniform = true;
      w.waiting = false;
      w.syncs = 0;
      w.steps = 0;
      w.alive = threads - 32 * i >= 32 ? FULL : (1u << (threads - 32 * i)) - 1;
      w.open.clear();
      w.groups.clear();
      w.wopen.clear();
      w.wgroups.clear();
      std::fill(w.rows.begin(), w.rows.end(), Row{});
      w.wfences = w.wcommitted = w.wretired = w.proxies = w.proxies_before = w.proxy_epoch = w.wlast = 0;
      w.whash = 0;
      memcpy(w.r, init, nregbytes);
      memcpy(w.p, pinit, npreds * 4);
      u32 values[4] = {0, (u32)(c % grid[0]), (u32)(c / grid[0] % grid[1]), (u32)(c / grid[0] / grid[1])};
      for (int l = 0; l < 32; l++) {
        if (special[0] >= 0) ROW(u32, special[0])[l] = 32 * i + l;
        for (int j = 1; j < 4; j++)
          if (special[j] >= 0) ROW(u32, special[j])[l] = values[j];
        if (special[4] >= 0) ROW(u32, special[4])[l] = l;
        if (special[5] >= 0) ROW(u32, special[5])[l] = i;
      }
    }
    for (;;) {
      u32 done = 0, waiting = 0;
      for (u32 j = 0; j < nw; j++) {
        Warp& w = ws[j];
        if (w.alive && !w.waiting) run_warp(w);
      }
      if (M.failed) break;
      if (wgmma) {
        compare_groups(ws.data(), nw);
        for (auto& w : ws) w.proxies_before = w.proxies;
      }
      for (auto& w : ws) {
        if (!w.alive)
          done++;
        else if (w.waiting)
          waiting++;
      }
      if (done == nw) {
        for (auto& w : ws)
          if (w.wopen.size() || w.wgroups.size())
            M.report(WGMMA_NOT_WAITED, w.wlast, w.id, 0, 0, w.wopen.size(), 0, w.wgroups.size());
        break;
      }
      if (waiting && done) M.report(EXIT_BEFORE_BARRIER, ws[0].cur, 0, 0, 0, done, 0, waiting);
      for (auto& w : ws) w.waiting = false;
      M.epoch++;
    }
  }
  *nreports = M.nreports;
  free(mem);
  return M.failed;
}
}
