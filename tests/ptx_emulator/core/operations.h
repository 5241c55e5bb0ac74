// Every operation, by the name that instructions.py uses.
#pragma once
#include "warpgroups.h"

// ---- between the lanes of a warp ----

enum Shuffle { UP, DOWN, BUTTERFLY, INDEX };
template <Shuffle HOW>
void shuffle(Warp& w, const Instruction& I, u32 lanes) {  // sources: value, distance, clamp and segment, members
  converged(w, lanes);
  u32 value[32], distance[32], control[32], inside = 0;
  memcpy(value, w.row<u32>(I.s[0]), sizeof value);
  memcpy(distance, w.row<u32>(I.s[1]), sizeof distance);
  memcpy(control, w.row<u32>(I.s[2]), sizeof control);
  const u32 members = w.row<u32>(I.s[3])[0];
  if ((lanes & members) != lanes) w.m->report(DIVERGENT_SYNC, w, 0, 1, members, 0, lanes);
  EACH(lanes) {
    const int by = distance[l] & 31, segment = control[l] >> 8 & 31, clamp = control[l] & 31;
    const int most = (l & segment) | (clamp & ~segment), least = l & segment;
    int from = HOW == UP ? l - by : HOW == DOWN ? l + by : HOW == BUTTERFLY ? l ^ by : least | (by & ~segment);
    const bool valid = HOW == UP ? from >= most : from <= most;
    w.row<u32>(I.d[0])[l] = value[valid ? from : l];
    inside |= (u32)valid << l;
  }
  if (I.destinations > 1) set_predicate(w, I.d[1], lanes, inside);
}
static void sum_lanes(Warp& w, const Instruction& I, u32 lanes) {  // sources: value, members
  converged(w, lanes);
  const u32 members = w.row<u32>(I.s[1])[0];
  if ((lanes & members) != lanes) w.m->report(DIVERGENT_SYNC, w, 0, 1, members, 0, lanes);
  u32 sum = 0;
  EACH(members) sum += w.row<u32>(I.s[0])[l];
  EACH(lanes) w.row<u32>(I.d[0])[l] = sum;
}
static void synchronise_warp(Warp& w, const Instruction& I, u32 lanes) {
  converged(w, lanes);
  w.syncs++;
}
static void nothing(Warp& w, const Instruction& I, u32 lanes) {}

// ---- the table ----

#define ONE(name, D, A, expr) {name, unary<D, A, [](A a) -> D { return (D)(expr); }>}
#define TWO(name, D, A, B, expr) {name, binary<D, A, B, [](A a, B b) -> D { return (D)(expr); }>}
#define THREE(name, D, A, B, C, expr) {name, ternary<D, A, B, C, [](A a, B b, C c) -> D { return (D)(expr); }>}
#define TEST(name, T, expr) {name, compare<T, [](T a, T b) { return (bool)(expr); }>}
#define PREDICATE(name, expr) {name, of_predicates<[](u32 a, u32 b) { return (u32)(expr); }>}
#define PAIRS(name, count, expr) {name, float_pairs<count, [](float a, float b, float c) -> float { return expr; }>}
#define FLOAT1(name, expr) ONE(name, float, float, expr)
#define FLOAT2(name, expr) TWO(name, float, float, float, expr)

#define EQUALITY(T, S) TEST("setp.eq." S, T, a == b), TEST("setp.ne." S, T, a != b)
#define ORDER(T, S)                                                          \
  TEST("setp.lt." S, T, a < b), TEST("setp.le." S, T, a <= b), TEST("setp.gt." S, T, a > b), \
      TEST("setp.ge." S, T, a >= b)
// The least number divided by -1 overflows. Division by 0 is undefined.
#define DIVISION(T, a, b, by_zero, overflow, result) \
  b == 0 ? by_zero : (T(-1) < T(0) && b == (T)-1) ? overflow : result
#define INTEGERS(T, S)                                                                             \
  TWO("add." S, T, T, T, (u64)a + (u64)b), TWO("sub." S, T, T, T, (u64)a - (u64)b),                \
      TWO("mul.lo." S, T, T, T, (u64)a * (u64)b), TWO("min." S, T, T, T, a < b ? a : b),           \
      TWO("max." S, T, T, T, a > b ? a : b), EQUALITY(T, S), ORDER(T, S),                          \
      TWO("div." S, T, T, T, DIVISION(T, a, b, (T)-1, (T)(0 - (u64)a), (T)(a / b))),               \
      TWO("rem." S, T, T, T, DIVISION(T, a, b, a, (T)0, (T)(a % b))),                              \
      THREE("mad.lo." S, T, T, T, T, (u64)a * (u64)b + (u64)c), ONE("neg." S, T, T, 0 - (u64)a),   \
      ONE("abs." S, T, T, a < 0 ? (T)(0 - (u64)a) : a), RIGHT(T, S)
#define RIGHT(T, S) TWO("shr." S, T, T, u32, b >= sizeof(T) * 8 ? (T)(a < 0 ? -1 : 0) : (T)(a >> b))
#define BITS(T, S)                                                                                       \
  TWO("and." S, T, T, T, a & b), TWO("or." S, T, T, T, a | b), TWO("xor." S, T, T, T, a ^ b),            \
      ONE("not." S, T, T, ~a), ONE("mov." S, T, T, a), {"selp." S, select<T>}, EQUALITY(T, S),           \
      TWO("shl." S, T, T, u32, b >= sizeof(T) * 8 ? (T)0 : (T)(a << b)), RIGHT(T, S)
// From a type S in a row of SR: a row of 16 bits holds numbers of 8 bits.
#define CONVERSION(D, DR, DN, S, SR, SN) ONE("cvt." DN "." SN, DR, SR, (D)(S)a)
#define CONVERSIONS(D, DR, DN)                                                                 \
  CONVERSION(D, DR, DN, u8, u16, "u8"), CONVERSION(D, DR, DN, s8, u16, "s8"),                  \
      CONVERSION(D, DR, DN, u16, u16, "u16"), CONVERSION(D, DR, DN, s16, u16, "s16"),          \
      CONVERSION(D, DR, DN, u32, u32, "u32"), CONVERSION(D, DR, DN, s32, u32, "s32"),          \
      CONVERSION(D, DR, DN, u64, u64, "u64"), CONVERSION(D, DR, DN, s64, u64, "s64")
#define TO_FLOAT(S, SN) ONE("cvt.rn.f32." SN, float, S, a)

struct Operation {
  const char* name;
  Execute execute;
};
static const Operation OPERATIONS[] = {
    // Control: `step` in core.cpp relies on the order of the first three.
    {"bra", nothing}, {"ret", nothing}, {"bar.sync", nothing}, {"bar.warp.sync", synchronise_warp}, {"nop", nothing},
    // Integers
    INTEGERS(u16, "u16"), INTEGERS(s16, "s16"), INTEGERS(u32, "u32"), INTEGERS(s32, "s32"), INTEGERS(u64, "u64"),
    INTEGERS(s64, "s64"),
    TWO("mul.hi.u32", u32, u32, u32, (u64)a * b >> 32), TWO("mul.hi.s32", s32, s32, s32, (s64)a * b >> 32),
    TWO("mul.hi.u64", u64, u64, u64, (u128)a * b >> 64), TWO("mul.hi.s64", s64, s64, s64, (s128)a * b >> 64),
    TWO("mul.wide.u16", u32, u16, u16, (u32)a * b), TWO("mul.wide.s16", s32, s16, s16, (s32)a * b),
    TWO("mul.wide.u32", u64, u32, u32, (u64)a * b), TWO("mul.wide.s32", s64, s32, s32, (s64)a * b),
    THREE("mad.wide.u16", u32, u16, u16, u32, (u32)a * b + c),
    THREE("mad.wide.s16", s32, s16, s16, s32, (u32)((s32)a * b) + (u32)c),
    THREE("mad.wide.u32", u64, u32, u32, u64, (u64)a * b + c),
    THREE("mad.wide.s32", s64, s32, s32, s64, (u64)((s64)a * b) + (u64)c),
    THREE("mad.hi.u32", u32, u32, u32, u32, (u32)((u64)a * b >> 32) + c),
    // Bits
    BITS(u16, "b16"), BITS(u32, "b32"), BITS(u64, "b64"),
    THREE("bfe.u32", u32, u32, u32, u32, extract_bits(a, b, c)),
    THREE("bfe.s32", s32, s32, u32, u32, extract_bits(a, b, c)),
    THREE("bfe.u64", u64, u64, u32, u32, extract_bits(a, b, c)),
    THREE("bfe.s64", s64, s64, u32, u32, extract_bits(a, b, c)),
    THREE("prmt.b32", u32, u32, u32, u32, permute_bytes(a, b, c)),
    {"pack.b32.2", pack<u32, 2>}, {"pack.b64.2", pack<u64, 2>}, {"pack.b64.4", pack<u64, 4>},
    {"unpack.b32.2", unpack<u32, 2>}, {"unpack.b64.2", unpack<u64, 2>}, {"unpack.b64.4", unpack<u64, 4>},
    // Predicates
    PREDICATE("and.pred", a & b), PREDICATE("or.pred", a | b), PREDICATE("xor.pred", a ^ b),
    PREDICATE("not.pred", ~a), PREDICATE("mov.pred", a),
    // Floating point. Comparisons with NaN are false, except those that end in u.
    FLOAT2("add.f32", a + b), FLOAT2("sub.f32", a - b), FLOAT2("mul.f32", a * b), FLOAT2("div.f32", a / b),
    FLOAT2("add.ftz.f32", flushed(flushed(a) + flushed(b))), FLOAT2("mul.ftz.f32", flushed(flushed(a) * flushed(b))),
    FLOAT2("min.f32", std::fmin(a, b)), FLOAT2("max.f32", std::fmax(a, b)),
    FLOAT2("min.NaN.f32", a != a || b != b ? NAN : std::fmin(a, b)),
    FLOAT2("max.NaN.f32", a != a || b != b ? NAN : std::fmax(a, b)),
    THREE("fma.f32", float, float, float, float, __builtin_fmaf(a, b, c)),
    FLOAT1("neg.f32", -a), FLOAT1("abs.f32", std::fabs(a)),
    PAIRS("add.f32x2", 2, a + b), PAIRS("sub.f32x2", 2, a - b), PAIRS("mul.f32x2", 2, a * b),
    PAIRS("fma.f32x2", 3, __builtin_fmaf(a, b, c)),
    TEST("setp.eq.f32", float, a == b), TEST("setp.ne.f32", float, a < b || a > b), ORDER(float, "f32"),
    TEST("setp.equ.f32", float, !(a < b || a > b)), TEST("setp.neu.f32", float, !(a == b)),
    TEST("setp.ltu.f32", float, !(a >= b)), TEST("setp.leu.f32", float, !(a > b)),
    TEST("setp.gtu.f32", float, !(a <= b)), TEST("setp.geu.f32", float, !(a < b)),
    TEST("setp.nan.f32", float, a != a || b != b), TEST("setp.num.f32", float, a == a && b == b),
    // Conversions
    CONVERSIONS(u8, u16, "u8"), CONVERSIONS(s8, u16, "s8"), CONVERSIONS(u16, u16, "u16"),
    CONVERSIONS(s16, u16, "s16"), CONVERSIONS(u32, u32, "u32"), CONVERSIONS(s32, u32, "s32"),
    CONVERSIONS(u64, u64, "u64"), CONVERSIONS(s64, u64, "s64"),
    TO_FLOAT(s16, "s16"), TO_FLOAT(u16, "u16"), TO_FLOAT(s32, "s32"), TO_FLOAT(u32, "u32"), TO_FLOAT(s64, "s64"),
    TO_FLOAT(u64, "u64"),
    ONE("cvt.rzi.s32.f32", s32, float, truncated<s32>(a)), ONE("cvt.rzi.u32.f32", u32, float, truncated<u32>(a)),
    ONE("cvt.rzi.s64.f32", s64, float, truncated<s64>(a)),
    ONE("cvt.rn.f32.f64", float, double, a), ONE("cvt.f64.f32", double, float, a),
    ONE("cvt.f32.f16", float, u16, from_f16(a)), ONE("cvt.f32.bf16", float, u16, from_bf16(a)),
    ONE("cvt.rn.f16.f32", u16, float, to_f16(a)), ONE("cvt.rn.bf16.f32", u16, float, to_bf16(a)),
    TWO("cvt.rn.f16x2.f32", u32, float, float, (u32)to_f16(a) << 16 | to_f16(b)),
    TWO("cvt.rn.bf16x2.f32", u32, float, float, (u32)to_bf16(a) << 16 | to_bf16(b)),
    ONE("cvt.rna.tf32.f32", u32, u32, round_tf32(a)),
    // Memory
    {"ld.param", load_parameter}, {"ld.global", load_global}, {"st.global", store_global},
    {"ld.shared", load_shared}, {"st.shared", store_shared}, {"ldmatrix", load_matrices}, {"stmatrix", store_matrices},
    {"cp.async", copy_async}, {"cp.async.commit_group", commit_copies}, {"cp.async.wait_group", wait_for_copies},
    {"cp.async.wait_all", wait_for_all_copies},
    // Products
    {"mma.m16n8k16.f16", mma<F16, 16>}, {"mma.m16n8k8.f16", mma<F16, 8>}, {"mma.m16n8k16.bf16", mma<BF16, 16>},
    {"mma.m16n8k8.bf16", mma<BF16, 8>}, {"mma.m16n8k8.tf32", mma<TF32, 8>}, {"mma.m16n8k4.tf32", mma<TF32, 4>},
    {"fence.proxy.async", fence_proxy}, {"wgmma.fence", fence_wgmma}, {"wgmma.mma", wgmma},
    {"wgmma.commit_group", commit_wgmma}, {"wgmma.wait_group", wait_for_wgmma},
    // Between lanes
    {"shfl.up", shuffle<UP>}, {"shfl.down", shuffle<DOWN>}, {"shfl.bfly", shuffle<BUTTERFLY>},
    {"shfl.idx", shuffle<INDEX>}, {"redux.add", sum_lanes},
};
static const u32 BRANCH = 0, END = 1, BARRIER = 2;
