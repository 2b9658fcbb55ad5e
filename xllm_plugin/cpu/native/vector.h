// Sixteen bfloat16 or float32 lanes, and the few functions of them that a decoder layer needs.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace xllm {

using bf16 = std::uint16_t;
constexpr int kLanes = 16;

inline __m512 load(const bf16* source) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Rounds to nearest even, as torch does.
inline __m256i to_bf16(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }

inline void store(bf16* target, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), to_bf16(value));
}

// What is left of a float32 that went through bfloat16.
inline __m512 rounded(__m512 value) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(value)), 16));
}

// exp(x) to about 2 units in the last place of float32: far below bfloat16's own step.
// 2^n * 2^f with f in [-0.5, 0.5]; the coefficients are ln(2)^i / i!.
inline __m512 exp(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
  const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(scaled, whole);
  __m512 p = _mm512_set1_ps(1.5403530393381609e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558146428443e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291076284772e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504108664821580e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022650695910071e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718055994531e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

}  // namespace xllm
