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

// Hands out the tasks of one phase to whichever thread is free: on a machine whose cores serve other
// processes as well, a thread that is held up must not hold up the others.
class Tickets {
 public:
  // Numbers from 0; whoever draws one knows how many tasks there are.
  int take() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<int> next_{0};
};

// Stores 16 outputs, or fewer at the end of a row.
inline void store_up_to(bf16* target, __m512 value, int count) {
  if (count >= kLanes) {
    store(target, value);
  } else if (count > 0) {
    _mm256_mask_storeu_epi16(target, static_cast<__mmask16>((1u << count) - 1), to_bf16(value));
  }
}

// Where a tile's sums start from, and where they go.  A row is one of the rows handed to `rows`.
class Plain {
 public:
  Plain(const Linear& linear, const int* index, bf16* y, std::int64_t y_stride)
      : linear_(linear), index_(index), y_(y), y_stride_(y_stride) {}

  __m512 start(int, int block, int half) const {
    if (linear_.bias == nullptr) return _mm512_setzero_ps();
    return _mm512_loadu_ps(linear_.bias + index_[block] * kBlock + half * kLanes);
  }

  template <int kBlocks>
  void write(int row, const __m512 (&sums)[kBlocks][2]) const {
    for (int block = 0; block < kBlocks; ++block)
      for (int half = 0; half < 2; ++half) {
        const int column = index_[block] * kBlock + half * kLanes;
        store_up_to(y_ + row * y_stride_ + column, sums[block][half], linear_.n - column);
      }
  }

 protected:
  const Linear& linear_;
  const int* index_;
  bf16* y_;
  std::int64_t y_stride_;
};

// Block 0 is of the gate, block 1 of the same columns of the up projection.
class SiluAndMul : public Plain {
 public:
  using Plain::Plain;

  template <int kBlocks>
  void write(int row, const __m512 (&sums)[kBlocks][2]) const {
    for (int half = 0; half < 2; ++half) {
      const __m512 product = _mm512_mul_ps(silu(rounded(sums[0][half])), rounded(sums[1][half]));
      store(y_ + row * y_stride_ + index_[0] * kBlock + half * kLanes, product);
    }
  }
};

// kRows rows of x times kBlocks packed blocks, each of `pairs` pairs of k.
template <int kRows, int kBlocks, typename Output>
inline void tile(const bf16* const* blocks, int pairs, const bf16* x, std::int64_t x_stride,
                 const Output& output, int first_row) {
  // With few rows one chain of sums a register would wait for itself: two chains then.
  constexpr int kChains = kRows * kBlocks <= 3 ? 2 : 1;
  __m512 sums[kChains][kRows][kBlocks][2];
#pragma GCC unroll 2
  for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
          sums[c][m][b][half] =
              c == 0 ? output.start(first_row + m, b, half) : _mm512_setzero_ps();
  for (int pair = 0; pair < pairs; pair += kChains) {
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c) {
      __m512bh w[kBlocks][2];
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) {
        const bf16* at = blocks[b] + std::int64_t(pair + c) * kBlock * 2;
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
    output.write(first_row + m, sums[0][m]);
  }
}

// `count` rows of x times kBlocks packed blocks.  `pairs` is even.
template <int kBlocks, typename Output>
inline void rows(const bf16* const* blocks, int pairs, const bf16* x, std::int64_t x_stride,
                 int count, const Output& output) {
  int m = 0;
  for (; count - m >= kMaxRows; m += kMaxRows)
    tile<kMaxRows, kBlocks>(blocks, pairs, x + m * x_stride, x_stride, output, m);
  const bf16* from = x + m * x_stride;
  switch (count - m) {
    case 5: tile<5, kBlocks>(blocks, pairs, from, x_stride, output, m); break;
    case 4: tile<4, kBlocks>(blocks, pairs, from, x_stride, output, m); break;
    case 3: tile<3, kBlocks>(blocks, pairs, from, x_stride, output, m); break;
    case 2: tile<2, kBlocks>(blocks, pairs, from, x_stride, output, m); break;
    case 1: tile<1, kBlocks>(blocks, pairs, from, x_stride, output, m); break;
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

  void run(Tickets& tickets, const bf16* x, std::int64_t x_stride, bf16* y,
           std::int64_t y_stride) const {
    for (int tile; (tile = tickets.take()) < num_tiles();) {
      // Neighbouring tiles share their rows of x.
      const int first = tile / columns_ * kRowChunk;
      const int count = std::min(kRowChunk, num_rows_ - first);
      const int index[2] = {tile % columns_ * width_, tile % columns_ * width_ + 1};
      const bf16* blocks[2] = {linear_.block(index[0]), linear_.block(index[1])};
      const Plain output(linear_, index, y + first * y_stride, y_stride);
      if (width_ == 2 && index[1] < linear_.blocks()) {
        rows<2>(blocks, linear_.k / 2, x + first * x_stride, x_stride, count, output);
      } else {
        rows<1>(blocks, linear_.k / 2, x + first * x_stride, x_stride, count, output);
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

  void run(Tickets& tickets, const bf16* x, std::int64_t x_stride, bf16* y,
           std::int64_t y_stride) const {
    for (int tile; (tile = tickets.take()) < num_tiles();) {
      const int first = tile / columns_ * kRowChunk;
      const int count = std::min(kRowChunk, num_rows_ - first);
      const int index[2] = {tile % columns_, tile % columns_ + columns_};
      const bf16* blocks[2] = {linear_.block(index[0]), linear_.block(index[1])};
      rows<2>(blocks, linear_.k / 2, x + first * x_stride, x_stride, count,
              SiluAndMul(linear_, index, y + first * y_stride, y_stride));
    }
  }

 private:
  const Linear& linear_;
  int num_rows_, columns_, chunks_;
};

}  // namespace xllm
