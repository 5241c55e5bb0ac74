// Operations on the 32 lanes of rows: arithmetic, comparisons, bits, conversions, packing.
#pragma once
#include <type_traits>

#include "machine.h"

template <class D, class A, auto F>
void unary(Warp& w, const Instruction& I, u32 lanes) {
  D* d = w.row<D>(I.d[0]);
  const A* a = w.row<A>(I.s[0]);
  if (lanes == FULL) {
    LANES d[l] = F(a[l]);
  } else {
    EACH(lanes) d[l] = F(a[l]);
  }
}
template <class D, class A, class B, auto F>
void binary(Warp& w, const Instruction& I, u32 lanes) {
  D* d = w.row<D>(I.d[0]);
  const A* a = w.row<A>(I.s[0]);
  const B* b = w.row<B>(I.s[1]);
  if (lanes == FULL) {
    LANES d[l] = F(a[l], b[l]);
  } else {
    EACH(lanes) d[l] = F(a[l], b[l]);
  }
}
template <class D, class A, class B, class C, auto F>
void ternary(Warp& w, const Instruction& I, u32 lanes) {
  D* d = w.row<D>(I.d[0]);
  const A* a = w.row<A>(I.s[0]);
  const B* b = w.row<B>(I.s[1]);
  const C* c = w.row<C>(I.s[2]);
  if (lanes == FULL) {
    LANES d[l] = F(a[l], b[l], c[l]);
  } else {
    EACH(lanes) d[l] = F(a[l], b[l], c[l]);
  }
}
static void set_predicate(Warp& w, s32 number, u32 lanes, u32 value) {
  w.predicates[number] = (w.predicates[number] & ~lanes) | (value & lanes);
}
template <class A, auto F>
void compare(Warp& w, const Instruction& I, u32 lanes) {
  const A *a = w.row<A>(I.s[0]), *b = w.row<A>(I.s[1]);
  u32 value = 0;
  for (int l = 0; l < 32; l++) value |= (u32)(F(a[l], b[l]) ? 1 : 0) << l;
  set_predicate(w, I.d[0], lanes, value);
}
template <class A>
void select(Warp& w, const Instruction& I, u32 lanes) {
  A* d = w.row<A>(I.d[0]);
  const A *a = w.row<A>(I.s[0]), *b = w.row<A>(I.s[1]);
  u32 which = w.predicates[I.s[2]];
  EACH(lanes) d[l] = (which >> l & 1) ? a[l] : b[l];
}
template <auto F>
void of_predicates(Warp& w, const Instruction& I, u32 lanes) {
  u32 second = I.sources > 1 ? w.predicates[I.s[1]] : 0;
  set_predicate(w, I.d[0], lanes, F(w.predicates[I.s[0]], second));
}

// ---- floating point ----

template <class To, class From>
static inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
static inline float from_f16(u16 h) { return (float)bit_cast<_Float16>(h); }
static inline u16 to_f16(float f) { return bit_cast<u16>((_Float16)f); }
static inline float from_bf16(u16 h) { return bit_cast<float>((u32)h << 16); }
static inline u16 to_bf16(float f) {
  u32 u = bit_cast<u32>(f);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN
  return (u16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline u32 round_tf32(u32 u) {
  if ((u & 0x7f800000) == 0x7f800000) return u;  // infinite, NaN
  return (u + 0x1000) & 0xffffe000;
}
static inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
template <class I>
static inline I truncated(float x) {  // saturates; 0 for NaN
  if (x != x) return 0;
  const bool is_signed = I(-1) < I(0);
  const double top = std::ldexp(1.0, sizeof(I) * 8 - is_signed), bottom = is_signed ? -top : 0.0;
  const double value = std::trunc((double)x);
  if (value >= top) return is_signed ? (I) ~((u64)1 << (sizeof(I) * 8 - 1)) : (I) ~(u64)0;
  return value < bottom ? (I)bottom : (I)value;
}
template <int N, auto F>
void float_pairs(Warp& w, const Instruction& I, u32 lanes) {  // two float32 in 64 bits
  float* d = w.row<float>(I.d[0]);
  const float *a = w.row<float>(I.s[0]), *b = w.row<float>(I.s[1]);
  const float* c = N > 2 ? w.row<float>(I.s[2]) : b;
  for (int i = 0; i < 64; i++)
    if (lanes >> (i / 2) & 1) d[i] = F(a[i], b[i], c[i]);
}

// ---- packing ----

template <class D, int N>
void pack(Warp& w, const Instruction& I, u32 lanes) {
  const int bits = sizeof(D) * 8 / N;
  D* d = w.row<D>(I.d[0]);
  EACH(lanes) {
    D packed = 0;
    for (int i = 0; i < N; i++) {
      u64 part = I.s_width[i] == 2 ? w.row<u16>(I.s[i])[l] : w.row<u32>(I.s[i])[l];
      packed |= (D)(part & ((1ull << bits) - 1)) << (bits * i);
    }
    d[l] = packed;
  }
}
template <class S, int N>
void unpack(Warp& w, const Instruction& I, u32 lanes) {
  const int bits = sizeof(S) * 8 / N;
  S packed[32];
  memcpy(packed, w.row<S>(I.s[0]), sizeof packed);
  for (int i = 0; i < N; i++) {
    if (I.d[i] < 0) continue;  // not used
    EACH(lanes) {
      u64 part = (u64)(packed[l] >> (bits * i));
      if (I.d_width[i] == 2)
        w.row<u16>(I.d[i])[l] = (u16)part;
      else
        w.row<u32>(I.d[i])[l] = (u32)part;
    }
  }
}

// ---- bits ----

static u32 permute_bytes(u32 a, u32 b, u32 selectors) {
  u64 bytes = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 selector = selectors >> (4 * i) & 15;
    u32 byte = (u32)(bytes >> (8 * (selector & 7))) & 255;
    if (selector & 8) byte = (byte & 128) ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
template <class T>
static T extract_bits(T value, u32 position, u32 length) {
  typedef typename std::make_unsigned<T>::type U;
  const u32 width = sizeof(T) * 8;
  position &= 255, length &= 255;
  U bits = (U)value, result = 0, sign = 0;
  if (T(-1) < T(0) && length) sign = bits >> std::min(position + length - 1, width - 1) & 1;
  for (u32 i = 0; i < width; i++)
    result |= (i < length && position + i < width ? bits >> (position + i) & 1 : sign) << i;
  return (T)result;
}
