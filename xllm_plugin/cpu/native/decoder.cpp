// A decoder layer around its attention, as two calls: all that comes before it and all that comes
// after.  Both take any number of tokens; only attention, which depends on each request's length,
// stays outside (arXiv 2510.14686, 4.2, "partial graph").
//
// Plain C functions over raw pointers: no header of torch, so it builds in seconds and against any
// torch.  Every rounding to bfloat16 is where vLLM's compiled graph has one.

#include <omp.h>

#include <cmath>

#include "gemm.h"

namespace xllm {

struct Layer {
  Linear qkv, out, gate_up, down;
  const bf16 *input_norm, *attention_norm;  // [hidden]
  const bf16 *query_norm, *key_norm;        // [head_size], or null
  const bf16* cos_sin;                      // [positions][rotary_dim]: cosines, then sines
  float epsilon;
  std::int32_t num_heads, num_kv_heads, head_size, rotary_dim;

  int hidden() const { return qkv.k; }
};

inline float mean_square(const bf16* x, const bf16* residual, int size) {
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < size; i += kLanes) {
    __m512 v = load(x + i);
    if (residual != nullptr) v = _mm512_add_ps(v, load(residual + i));
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  return _mm512_reduce_add_ps(sum) / size;
}

// y = norm(x + residual) * weight; the sum goes to `new_residual`, which may be `residual` itself.
void add_and_norm(const bf16* x, const bf16* residual, bf16* new_residual, const bf16* weight,
                  float epsilon, bf16* y, int size) {
  const __m512 scale =
      _mm512_set1_ps(1.0f / std::sqrt(mean_square(x, residual, size) + epsilon));
  for (int i = 0; i < size; i += kLanes) {
    __m512 v = load(x + i);
    if (residual != nullptr) v = _mm512_add_ps(v, load(residual + i));
    if (new_residual != nullptr) store(new_residual + i, v);
    store(y + i, _mm512_mul_ps(rounded(_mm512_mul_ps(v, scale)), load(weight + i)));
  }
}

// Rotates one head in place (the halves of a head are the pairs: "neox style").
void rotate(bf16* head, const bf16* cos_sin, int rotary_dim) {
  const int half = rotary_dim / 2;
  for (int i = 0; i < half; i += kLanes) {
    const __mmask16 mask = half - i >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (half - i)) - 1);
    const auto take = [mask](const bf16* from) {
      return _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
    };
    const __m512 first = take(head + i), second = take(head + half + i);
    const __m512 cosine = take(cos_sin + i), sine = take(cos_sin + half + i);
    const __m512 low = _mm512_sub_ps(_mm512_mul_ps(first, cosine), _mm512_mul_ps(second, sine));
    const __m512 high = _mm512_add_ps(_mm512_mul_ps(second, cosine), _mm512_mul_ps(first, sine));
    _mm256_mask_storeu_epi16(head + i, mask, to_bf16(low));
    _mm256_mask_storeu_epi16(head + half + i, mask, to_bf16(high));
  }
}

void norm_and_rotate(const Layer& layer, bf16* qkv, std::int64_t position) {
  const bf16* cos_sin = layer.cos_sin + position * layer.rotary_dim;
  for (int head = 0; head < layer.num_heads + layer.num_kv_heads; ++head) {
    bf16* at = qkv + head * layer.head_size;
    const bf16* weight = head < layer.num_heads ? layer.query_norm : layer.key_norm;
    if (weight != nullptr)
      add_and_norm(at, nullptr, nullptr, weight, layer.epsilon, at, layer.head_size);
    rotate(at, cos_sin, layer.rotary_dim);
  }
}

}  // namespace xllm

using namespace xllm;

extern "C" {

// Bytes of `Layer` and `Linear`, so that the caller can check its own idea of them.
int xllm_layer_bytes() { return sizeof(Layer); }
int xllm_linear_bytes() { return sizeof(Linear); }

// Packs a row-major [n, k] weight; k is even.  `packed` has ceil(n / 32) * 32 * k elements.
void xllm_pack(const bf16* weight, bf16* packed, int n, int k) {
  const int blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel for
  for (int block = 0; block < blocks; ++block) {
    bf16* to = packed + std::int64_t(block) * kBlock * k;
    for (int pair = 0; pair < k / 2; ++pair)
      for (int column = 0; column < kBlock; ++column)
        for (int i = 0; i < 2; ++i) {
          const int row = block * kBlock + column;
          *to++ = row < n ? weight[std::int64_t(row) * k + 2 * pair + i] : bf16(0);
        }
  }
}

// y[num_rows, n] = x[num_rows, k] W^T; strides in elements.
void xllm_linear(const Linear* linear, const bf16* x, std::int64_t x_stride, bf16* y,
                 std::int64_t y_stride, int num_rows) {
  const int threads = omp_get_max_threads();
  const Gemm gemm(*linear, num_rows, threads);
  Tiles tiles(gemm.num_tiles());
#pragma omp parallel num_threads(threads)
  gemm.run(tiles, x, x_stride, y, y_stride);
}

// y[num_rows, size] = norm(x + residual) * weight.  residual may be null; new_residual gets the sum.
void xllm_norm(const bf16* x, const bf16* residual, bf16* new_residual, const bf16* weight,
               float epsilon, bf16* y, int size, int num_rows) {
#pragma omp parallel for if (num_rows > 8)
  for (int row = 0; row < num_rows; ++row) {
    const std::int64_t at = std::int64_t(row) * size;
    add_and_norm(x + at, residual ? residual + at : nullptr, new_residual ? new_residual + at : nullptr,
                 weight, epsilon, y + at, size);
  }
}

// Up to the attention: residual sum, norm, qkv projection, query and key norm, rotation.
//
// x, residual, new_residual, normed: [num_tokens, hidden]; residual is null in the first layer.
// qkv: [num_tokens, (num_heads + 2 num_kv_heads) * head_size].  positions: [num_tokens].
void xllm_before_attention(const Layer* layer, const bf16* x, const bf16* residual,
                           bf16* new_residual, bf16* normed, bf16* qkv,
                           const std::int64_t* positions, int num_tokens) {
  const int hidden = layer->hidden(), width = layer->qkv.n, threads = omp_get_max_threads();
  const Gemm gemm(layer->qkv, num_tokens, threads);
  Tiles tiles(gemm.num_tiles());
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int token = 0; token < num_tokens; ++token) {
      const std::int64_t at = std::int64_t(token) * hidden;
      add_and_norm(x + at, residual ? residual + at : nullptr, new_residual + at, layer->input_norm,
                   layer->epsilon, normed + at, hidden);
    }
    gemm.run(tiles, normed, hidden, qkv, width);
#pragma omp barrier
#pragma omp for
    for (int token = 0; token < num_tokens; ++token)
      norm_and_rotate(*layer, qkv + std::int64_t(token) * width, positions[token]);
  }
}

// From the attention on: output projection, residual sum, norm, gated feed-forward.
//
// attention: [num_tokens, num_heads * head_size]; residual: [num_tokens, hidden], replaced by the sum.
// projected, normed: scratch [num_tokens, hidden]; activated: scratch [num_tokens, intermediate].
// y: [num_tokens, hidden].
void xllm_after_attention(const Layer* layer, const bf16* attention, bf16* residual, bf16* projected,
                          bf16* normed, bf16* activated, bf16* y, int num_tokens) {
  const int hidden = layer->hidden(), threads = omp_get_max_threads();
  const Gemm out(layer->out, num_tokens, threads), down(layer->down, num_tokens, threads);
  const GatedGemm gate_up(layer->gate_up, num_tokens);
  Tiles out_tiles(out.num_tiles()), gate_up_tiles(gate_up.num_tiles()), down_tiles(down.num_tiles());
#pragma omp parallel num_threads(threads)
  {
    out.run(out_tiles, attention, layer->out.k, projected, hidden);
#pragma omp barrier
#pragma omp for
    for (int token = 0; token < num_tokens; ++token) {
      const std::int64_t at = std::int64_t(token) * hidden;
      add_and_norm(projected + at, residual + at, residual + at, layer->attention_norm,
                   layer->epsilon, normed + at, hidden);
    }
    gate_up.run(gate_up_tiles, normed, hidden, activated, layer->down.k);
#pragma omp barrier
    down.run(down_tiles, activated, layer->down.k, y, hidden);
  }
}

}  // extern "C"
