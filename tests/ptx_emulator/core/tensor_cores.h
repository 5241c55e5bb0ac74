// Products of matrices, summed like tensor cores do, and mma.sync.
#pragma once
#include "shared_memory.h"

enum Type { F16, BF16, TF32 };

// `block` products and the accumulator are aligned to the largest exponent, truncated `kept` bits below it, and added.
// The sum is truncated to float32. Fasi et al. (2021) measured the numbers for A100, which stand for every mma.sync
// architecture; MMA-Sim (arXiv 2511.10909) those for H100.
struct Sums {
  int block, kept;
};
static Sums sums_of(const Job& job, int type) {
  if (job.hopper) return {type == TF32 ? 8 : 16, 25};
  return {type == TF32 ? 4 : 8, 24};
}
static inline float from_half(u32 bits, int type) { return type == BF16 ? from_bf16((u16)bits) : from_f16((u16)bits); }
// TF32 operands lose their last 13 bits, as in hardware.
static inline float from_tf32(u32 bits) {
  return bit_cast<float>(bits & 0xffffe000);
}

static const int NONE = -100000;  // the exponent of zero
static inline int exponent(float x, int least) {
  if (x == 0) return NONE;
  return std::max((int)(bit_cast<u32>(x) >> 23 & 255) - 127, least);
}
static inline float cut_to_float(double x) {
  float f = (float)x;
  return std::fabs((double)f) > std::fabs(x) ? std::nextafterf(f, 0.0f) : f;
}

// C += A B: A is 16 × K, B is K × N, at most 16 × 256.
static void multiply(const float* A, const float* B, float* C, int K, int N, int type, const Job& job) {
  static thread_local int b_exponents[16 * 256];
  static thread_local double b_values[16 * 256];
  const Sums sums = sums_of(job, type);
  const int block = std::min(sums.block, K), least = type == F16 ? -14 : -126;
  int a_exponents[16 * 16];
  bool finite = true;
  for (int i = 0; i < 16 * K; i++) a_exponents[i] = exponent(A[i], least), finite &= std::isfinite(A[i]);
  for (int i = 0; i < K * N; i++) {
    b_exponents[i] = exponent(B[i], least);
    b_values[i] = B[i];
    finite &= std::isfinite(B[i]);
  }
  for (int r = 0; r < 16; r++)
    for (int first = 0; first < K; first += block) {
      float* c = C + r * N;
      double sum[256], scale[256], plain[256];
      int top[256];
      for (int n = 0; n < N; n++) top[n] = exponent(c[n], -126), plain[n] = c[n];
      for (int k = first; k < first + block; k++) {
        const double a = A[r * K + k];
        const int e = a_exponents[r * K + k];
        for (int n = 0; n < N; n++) top[n] = std::max(top[n], e + b_exponents[k * N + n]);
        if (!finite)
          for (int n = 0; n < N; n++) plain[n] += a * b_values[k * N + n];
      }
      for (int n = 0; n < N; n++) {  // 2^(kept - top)
        scale[n] = bit_cast<double>(top[n] < NONE / 2 ? 0 : (u64)(1023 + sums.kept - top[n]) << 52);
        sum[n] = std::trunc(c[n] * scale[n]);
      }
      for (int k = first; k < first + block; k++) {
        const double a = A[r * K + k];
        for (int n = 0; n < N; n++) sum[n] += std::trunc(a * b_values[k * N + n] * scale[n]);
      }
      for (int n = 0; n < N; n++) {
        if (!std::isfinite(plain[n]))
          c[n] = (float)plain[n];  // infinite or NaN
        else
          c[n] = scale[n] == 0 ? 0 : cut_to_float(sum[n] / scale[n]);
      }
    }
}

// The registers of A (16 × K) that a lane has: the row of its group of four lanes and the row 8 below, pairs of columns
// (TF32: single columns).
template <int T, int K>
static void unpack_left(Warp& w, const s32* rows, float* A) {
  const int count = T == TF32 ? K / 2 : K / 4;
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < count; i++) {
      const u32 bits = w.row<u32>(rows[i])[l];
      float* row = A + (l / 4 + i % 2 * 8) * K;
      if (T == TF32) {
        row[l % 4 + i / 2 * 4] = from_tf32(bits);
      } else {
        row[l % 4 * 2 + i / 2 * 8] = from_half(bits, T);
        row[l % 4 * 2 + i / 2 * 8 + 1] = from_half(bits >> 16, T);
      }
    }
}
// The index in the 16 × N accumulators of a lane's register i, of N / 2.
static inline int accumulator(int l, int i, int N) { return (l / 4 + (i & 2 ? 8 : 0)) * N + i / 4 * 8 + l % 4 * 2 + i % 2; }

template <int T, int K>
void mma(Warp& w, const Instruction& I, u32 lanes) {  // sources: A, B (K × 8), C
  converged(w, lanes);
  const int left = T == TF32 ? K / 2 : K / 4, right = left / 2;
  float A[16 * K], B[K * 8], C[16 * 8];
  unpack_left<T, K>(w, I.s, A);
  for (int l = 0; l < 32; l++) {
    for (int i = 0; i < right; i++) {
      const u32 bits = w.row<u32>(I.s[left + i])[l];
      if (T == TF32) {
        B[(l % 4 + i * 4) * 8 + l / 4] = from_tf32(bits);
      } else {
        B[(l % 4 * 2 + i * 8) * 8 + l / 4] = from_half(bits, T);
        B[(l % 4 * 2 + i * 8 + 1) * 8 + l / 4] = from_half(bits >> 16, T);
      }
    }
    for (int i = 0; i < 4; i++) C[accumulator(l, i, 8)] = w.row<float>(I.s[left + right + i])[l];
  }
  multiply(A, B, C, K, 8, T, w.m->job);
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) w.row<float>(I.d[i])[l] = C[accumulator(l, i, 8)];
}
