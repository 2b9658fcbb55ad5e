// Decoder layers: all of them with their attention and the last norm as one call ("full graph"), or
// one layer around vLLM's attention as two ("partial graph"; arXiv 2510.14686, 4.2).  Any number of
// tokens of any mixture of requests: nothing is captured or compiled for a shape.
//
// Plain C functions over raw pointers: no header of torch, so it builds in seconds and against any
// torch.  Every rounding to bfloat16 outside attention is where vLLM's compiled graph has one.

#include <omp.h>

#include <cmath>

#include "attention.h"
#include "gemm.h"

namespace xllm {

struct Layer {
  Linear qkv, out, gate_up, down;
  const bf16 *input_norm, *attention_norm;  // [hidden]
  const bf16 *query_norm, *key_norm;        // [head_size], or null
  const bf16* cos_sin;                      // [positions][rotary_dim]: cosines, then sines
  bf16* cache;                              // keys and values of all blocks, or null
  float epsilon;
  Heads heads;
  std::int32_t rotary_dim;

  int hidden() const { return qkv.k; }
};

// Scratch of a step, shared by its layers.
struct Workspace {
  bf16 *normed, *projected;  // [num_tokens, hidden]
  bf16* qkv;                 // [num_tokens, heads.width()]
  bf16* attention;           // [num_tokens, num_heads * head_size]
  bf16* activated;           // [num_tokens, intermediate]
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
  const Heads& heads = layer.heads;
  for (int head = 0; head < heads.num_heads + heads.num_kv_heads; ++head) {
    bf16* at = qkv + head * heads.head_size;
    const bf16* weight = head < heads.num_heads ? layer.query_norm : layer.key_norm;
    if (weight != nullptr)
      add_and_norm(at, nullptr, nullptr, weight, layer.epsilon, at, heads.head_size);
    rotate(at, cos_sin, layer.rotary_dim);
  }
}

// Who does what next, phase by phase, in one layer.
struct LayerTickets {
  Tickets qkv, attention, out, gate_up, down;
};

// The functions below are called by all threads of a team with the same arguments, and begin and end
// with the team together.

// Residual sum, norm, qkv projection.  residual is null in the first layer.
void project_to_heads(const Layer& layer, LayerTickets& tickets, const Workspace& space,
                      const bf16* x, const bf16* residual, bf16* new_residual, int num_tokens) {
  const int hidden = layer.hidden();
#pragma omp for
  for (int token = 0; token < num_tokens; ++token) {
    const std::int64_t at = std::int64_t(token) * hidden;
    add_and_norm(x + at, residual ? residual + at : nullptr, new_residual + at, layer.input_norm,
                 layer.epsilon, space.normed + at, hidden);
  }
  Gemm(layer.qkv, num_tokens, omp_get_num_threads())
      .run(tickets.qkv, space.normed, hidden, space.qkv, layer.qkv.n);
#pragma omp barrier
}

// Norm of queries and keys, rotation; keys and values into the cache, if there is an attention.
void prepare_heads(const Layer& layer, const Workspace& space, const std::int64_t* positions,
                   int num_tokens, int num_cached, const Attention* attention) {
#pragma omp for
  for (int token = 0; token < num_tokens; ++token) {
    norm_and_rotate(layer, space.qkv + std::int64_t(token) * layer.qkv.n, positions[token]);
    if (token < num_cached) attention->write_to_cache(token, layer.cache, space.qkv);
  }
}

// From the attention on: output projection, residual sum, norm, gated feed-forward.
void project_and_feed_forward(const Layer& layer, LayerTickets& tickets, const Workspace& space,
                              bf16* residual, bf16* y, int num_tokens) {
  const int hidden = layer.hidden(), threads = omp_get_num_threads();
  Gemm(layer.out, num_tokens, threads)
      .run(tickets.out, space.attention, layer.out.k, space.projected, hidden);
#pragma omp barrier
#pragma omp for
  for (int token = 0; token < num_tokens; ++token) {
    const std::int64_t at = std::int64_t(token) * hidden;
    add_and_norm(space.projected + at, residual + at, residual + at, layer.attention_norm,
                 layer.epsilon, space.normed + at, hidden);
  }
  GatedGemm(layer.gate_up, num_tokens)
      .run(tickets.gate_up, space.normed, hidden, space.activated, layer.down.k);
#pragma omp barrier
  Gemm(layer.down, num_tokens, threads)
      .run(tickets.down, space.activated, layer.down.k, y, hidden);
#pragma omp barrier
}

}  // namespace xllm

using namespace xllm;

extern "C" {

// Bytes of the structures, so that the caller can check its own idea of them.
int xllm_layer_bytes() { return sizeof(Layer); }
int xllm_linear_bytes() { return sizeof(Linear); }
int xllm_batch_bytes() { return sizeof(Batch); }
int xllm_workspace_bytes() { return sizeof(Workspace); }

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
  Tickets tickets;
#pragma omp parallel
  Gemm(*linear, num_rows, omp_get_num_threads()).run(tickets, x, x_stride, y, y_stride);
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

// Partial graph, up to the attention: x, residual, new_residual: [num_tokens, hidden]; residual is null
// in the first layer.  positions: [num_tokens].  The heads are left in space->qkv.
void xllm_before_attention(const Layer* layer, const Workspace* space, const bf16* x,
                           const bf16* residual, bf16* new_residual,
                           const std::int64_t* positions, int num_tokens) {
  LayerTickets tickets;
#pragma omp parallel
  {
    project_to_heads(*layer, tickets, *space, x, residual, new_residual, num_tokens);
    prepare_heads(*layer, *space, positions, num_tokens, 0, nullptr);
  }
}

// Partial graph, from space->attention on.  residual, y: [num_tokens, hidden]; residual is replaced by
// the sum.
void xllm_after_attention(const Layer* layer, const Workspace* space, bf16* residual, bf16* y,
                          int num_tokens) {
  LayerTickets tickets;
#pragma omp parallel
  project_and_feed_forward(*layer, tickets, *space, residual, y, num_tokens);
}

// Full graph: all layers with their attention, and the norm at the end.
//
// x, residual, hidden, y: [num_tokens, hidden]; x is left as it is, residual and hidden are scratch.
// Tokens that no request has (a run without requests, to measure memory) get an attention of zeros.
void xllm_forward(const Layer* layers, int num_layers, const bf16* last_norm, const Batch* batch,
                  const Workspace* space, const bf16* x, bf16* residual, bf16* hidden, bf16* y) {
  const int num_tokens = batch->num_tokens, num_cached = batch->num_cached_tokens();
  const int size = layers->hidden(), attention_size = layers->out.k;
  std::vector<LayerTickets> tickets(num_layers);
  Attention attention(*batch, layers->heads);
  std::fill(space->attention + std::int64_t(num_cached) * attention_size,
            space->attention + std::int64_t(num_tokens) * attention_size, bf16(0));
#pragma omp parallel
  {
    for (int i = 0; i < num_layers; ++i) {
      const Layer& layer = layers[i];
      project_to_heads(layer, tickets[i], *space, i == 0 ? x : hidden, i == 0 ? nullptr : residual,
                       residual, num_tokens);
      prepare_heads(layer, *space, batch->positions, num_tokens, num_cached, &attention);
      attention.run(tickets[i].attention, layer.cache, space->qkv, space->attention);
#pragma omp barrier
      project_and_feed_forward(layer, tickets[i], *space, residual, hidden, num_tokens);
    }
#pragma omp for
    for (int token = 0; token < num_tokens; ++token) {
      const std::int64_t at = std::int64_t(token) * size;
      add_and_norm(hidden + at, residual + at, nullptr, last_norm, layers->epsilon, y + at, size);
    }
  }
}

}  // extern "C"
