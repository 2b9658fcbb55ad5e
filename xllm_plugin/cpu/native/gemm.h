// Linear layers over packed bfloat16 weights.
//
// A weight of shape [n, k] is packed as [ceil(n / 32)][k / 2][32][2]: one block holds 32 outputs, and
// within it the two neighbours of k that one VDPBF16PS lane multiplies stand side by side.  A block is
// read once from start to end, so a decode step, which is bound by memory, streams the weights.
#pragma once

#include <algorithm>
#include <atomic>

#include "vector.h"

namespace xllm {

constexpr int kBlock = 32;    // outputs of one packed block
constexpr int kMaxRows = 6;   // rows of one tile: 6 x 2 blocks x 2 registers = 24 accumulators of 32
constexpr int kRowChunk = 96;  // rows that share one pass over a pair of blocks; fit the L2 cache

struct Linear {
  const bf16* weight;
  const float* bias;  // null without one; padded to whole blocks
  std::int32_t n;
  std::int32_t k;

  int blocks() const { return (n + kBlock - 1) / kBlock; }
  const bf16* block(int index) const { return weight + std::int64_t(index) * k * kBlock; }
};

// Hands out the tiles of one phase to whichever thread is free: on a machine whose cores serve other
// processes as well, a thread that is held up must not hold up the others.
class Tiles {
 public:
  explicit Tiles(int count) : count_(count) {}
  // Index of the next tile, or -1 when there is none.
  int take() {
    const int tile = next_.fetch_add(1, std::memory_order_relaxed);
    return tile < count_ ? tile : -1;
  }

 private:
  alignas(64) std::atomic<int> next_{0};
  const int count_;
};

// Stores 16 outputs, or fewer at the end of a row.
inline void store_up_to(bf16* target, __m512 value, int count) {
  if (count >= kLanes) {
    store(target, value);
  } else if (count > 0) {
    _mm256_mask_storeu_epi16(target, static_cast<__mmask16>((1u << count) - 1), to_bf16(value));
  }
}

struct Plain {
  // Writes block `index`'s outputs of one row.
  static void write(const Linear& linear, bf16* row, const int* index, __m512 (*sums)[2], int blocks) {
    for (int b = 0; b < blocks; ++b) {
      for (int half = 0; half < 2; ++half) {
        const int column = index[b] * kBlock + half * kLanes;
        store_up_to(row + column, sums[b][half], linear.n - column);
      }
    }
  }
};

struct SiluAndMul {
  // Block 0 is of the gate, block 1 of the same columns of the up projection.
  static void write(const Linear&, bf16* row, const int* index, __m512 (*sums)[2], int) {
    for (int half = 0; half < 2; ++half) {
      const __m512 product =
          _mm512_mul_ps(silu(rounded(sums[0][half])), rounded(sums[1][half]));
      store(row + index[0] * kBlock + half * kLanes, product);
    }
  }
};

// kRows rows times kBlocks packed blocks.
template <int kRows, int kBlocks, typename Epilogue>
inline void tile(const Linear& linear, const bf16* x, std::int64_t x_stride, bf16* y,
                 std::int64_t y_stride, const int* index) {
  // With few rows one chain of sums a register would wait for itself: two chains then.
  constexpr int kChains = kRows * kBlocks <= 3 ? 2 : 1;
  __m512 sums[kChains][kRows][kBlocks][2];
  const bf16* weights[kBlocks];
#pragma GCC unroll 2
  for (int b = 0; b < kBlocks; ++b) weights[b] = linear.block(index[b]);
#pragma GCC unroll 2
  for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
          sums[c][m][b][half] = c == 0 && linear.bias != nullptr
                                    ? _mm512_loadu_ps(linear.bias + index[b] * kBlock + half * kLanes)
                                    : _mm512_setzero_ps();
  const int pairs = linear.k / 2;
  for (int pair = 0; pair < pairs; pair += kChains) {
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c) {
      __m512bh w[kBlocks][2];
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) {
        const bf16* at = weights[b] + std::int64_t(pair + c) * kBlock * 2;
        w[b][0] = (__m512bh)_mm512_loadu_si512(at);
        w[b][1] = (__m512bh)_mm512_loadu_si512(at + 2 * kLanes);
      }
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) {
        std::int32_t two;
        __builtin_memcpy(&two, x + m * x_stride + 2 * (pair + c), sizeof(two));
        const __m512bh a = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) {
          sums[c][m][b][0] = _mm512_dpbf16_ps(sums[c][m][b][0], w[b][0], a);
          sums[c][m][b][1] = _mm512_dpbf16_ps(sums[c][m][b][1], w[b][1], a);
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
    if constexpr (kChains == 2) {
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
          sums[0][m][b][half] = _mm512_add_ps(sums[0][m][b][half], sums[1][m][b][half]);
    }
    Epilogue::write(linear, y + m * y_stride, index, sums[0][m], kBlocks);
  }
}

template <int kBlocks, typename Epilogue>
inline void rows(const Linear& linear, const bf16* x, std::int64_t x_stride, bf16* y,
                 std::int64_t y_stride, int count, const int* index) {
  int m = 0;
  for (; count - m >= kMaxRows; m += kMaxRows)
    tile<kMaxRows, kBlocks, Epilogue>(linear, x + m * x_stride, x_stride, y + m * y_stride,
                                      y_stride, index);
  const bf16* from = x + m * x_stride;
  bf16* to = y + m * y_stride;
  switch (count - m) {
    case 5: tile<5, kBlocks, Epilogue>(linear, from, x_stride, to, y_stride, index); break;
    case 4: tile<4, kBlocks, Epilogue>(linear, from, x_stride, to, y_stride, index); break;
    case 3: tile<3, kBlocks, Epilogue>(linear, from, x_stride, to, y_stride, index); break;
    case 2: tile<2, kBlocks, Epilogue>(linear, from, x_stride, to, y_stride, index); break;
    case 1: tile<1, kBlocks, Epilogue>(linear, from, x_stride, to, y_stride, index); break;
    default: break;
  }
}

// One thread's share of y = x W^T (+ bias); all threads of a team call it with the same arguments.
//
// A tile is a chunk of rows times one or two blocks: two where there are enough of them to go round,
// because a row of x that is read then serves twice as many multiplications.
class Gemm {
 public:
  Gemm(const Linear& linear, int num_rows, int num_threads)
      : linear_(linear),
        num_rows_(num_rows),
        width_(linear.blocks() >= 8 * num_threads || num_rows > kRowChunk ? 2 : 1),
        columns_((linear.blocks() + width_ - 1) / width_),
        chunks_((num_rows + kRowChunk - 1) / kRowChunk) {}

  int num_tiles() const { return columns_ * chunks_; }

  void run(Tiles& tiles, const bf16* x, std::int64_t x_stride, bf16* y, std::int64_t y_stride) const {
    for (int tile = tiles.take(); tile >= 0; tile = tiles.take()) {
      // Neighbouring tiles share their rows of x.
      const int first = tile / columns_ * kRowChunk;
      const int count = std::min(kRowChunk, num_rows_ - first);
      const int index[2] = {tile % columns_ * width_, tile % columns_ * width_ + 1};
      const bf16* from = x + first * x_stride;
      bf16* to = y + first * y_stride;
      if (width_ == 2 && index[1] < linear_.blocks()) {
        rows<2, Plain>(linear_, from, x_stride, to, y_stride, count, index);
      } else {
        rows<1, Plain>(linear_, from, x_stride, to, y_stride, count, index);
      }
    }
  }

 private:
  const Linear& linear_;
  int num_rows_, width_, columns_, chunks_;
};

// One thread's share of y = silu(gate) * up, where x W^T is gate and up side by side.
class GatedGemm {
 public:
  GatedGemm(const Linear& linear, int num_rows)
      : linear_(linear),
        num_rows_(num_rows),
        columns_(linear.blocks() / 2),
        chunks_((num_rows + kRowChunk - 1) / kRowChunk) {}

  int num_tiles() const { return columns_ * chunks_; }

  void run(Tiles& tiles, const bf16* x, std::int64_t x_stride, bf16* y, std::int64_t y_stride) const {
    for (int tile = tiles.take(); tile >= 0; tile = tiles.take()) {
      const int first = tile / columns_ * kRowChunk;
      const int index[2] = {tile % columns_, tile % columns_ + columns_};
      rows<2, SiluAndMul>(linear_, x + first * x_stride, x_stride, y + first * y_stride, y_stride,
                          std::min(kRowChunk, num_rows_ - first), index);
    }
  }

 private:
  const Linear& linear_;
  int num_rows_, columns_, chunks_;
};

}  // namespace xllm
