// Causal attention over the paged cache, for any mixture of prefill and decode.
//
// The cache is vLLM's memory in an order of ours.  In the [2 * block_size, head_size] elements that one
// block has for one head of keys and values,
//
//   keys   are [block_size / 32][head_size / 2][32 tokens][2]: 32 tokens are a packed block of a linear
//          layer that maps a query to its scores;
//   values are [head_size / 32][block_size / 2][32 columns][2]: as a linear layer that maps weights of
//          tokens to the output.
//
// So both products run in the tiles of gemm.h.  The softmax between them is computed piece by piece
// (FlashAttention, arXiv 2205.14135), and long contexts are split between threads (Flash-Decoding).
#pragma once

#include <memory>
#include <vector>

#include "gemm.h"

namespace xllm {

constexpr int kQueryRows = 96;   // queries times heads that share one pass over keys and values
constexpr int kKeyChunk = 128;   // keys of one piece of the softmax
constexpr int kSplit = 256;      // keys of one task, where all queries of a request fit one pass
constexpr int kMaxHead = 256;
constexpr float kLowest = -1e30f;  // a maximum of nothing; exp(kLowest - x) is 0, where -inf gives NaN

// The requests of one step.
struct Batch {
  const std::int64_t* positions;   // [num_tokens]
  const std::int64_t* slots;       // [num_cached_tokens]: block * block_size + offset, or negative
  const std::int32_t* query_start;  // [num_seqs + 1]: first token of each request
  const std::int32_t* seq_lens;     // [num_seqs]: tokens up to the last query, cached ones included
  const std::int32_t* block_table;  // [num_seqs][block_table_stride]
  std::int64_t block_table_stride;
  std::int64_t block_stride, head_stride;  // of the cache, in elements
  std::int32_t block_size;                 // a multiple of 32
  std::int32_t num_tokens, num_seqs;

  int num_cached_tokens() const { return num_seqs == 0 ? 0 : query_start[num_seqs]; }
};

struct Heads {
  std::int32_t num_heads, num_kv_heads, head_size;
  float scale;

  int group() const { return num_heads / num_kv_heads; }
  // Elements of one token: queries, keys, values.
  int width() const { return (num_heads + 2 * num_kv_heads) * head_size; }
};

// Keys and values of one block and one head.
class Page {
 public:
  Page(bf16* cache, const Batch& batch, const Heads& heads, std::int64_t block, int head)
      : keys_(cache + block * batch.block_stride + head * batch.head_stride),
        values_(keys_ + std::int64_t(batch.block_size) * heads.head_size),
        block_size_(batch.block_size),
        head_size_(heads.head_size) {}

  // The 32 tokens from `token` on, which is a multiple of 32.
  const bf16* keys(int token) const { return keys_ + std::int64_t(token) * head_size_; }
  // 32 columns of the tokens from `token` on, which is even.
  const bf16* values(int token, int columns) const { return values_ + at(token, columns); }

  void write(int token, const bf16* key, const bf16* value) {
    bf16* to = keys_ + std::int64_t(token / kBlock * kBlock) * head_size_ + token % kBlock * 2;
    for (int i = 0; i < head_size_; i += 2) {
      to[i * kBlock] = key[i];
      to[i * kBlock + 1] = key[i + 1];
    }
    for (int i = 0; i < head_size_; ++i)
      values_[at(token, i / kBlock) + i % kBlock * 2 + token % 2] = value[i];
  }

  // Values are multiplied four tokens at a time.  Those after a request's last token get weight 0, but
  // 0 times what another request may have left there need not be 0.
  void clear_rest_of_four(int token) {
    for (++token; token % 4 != 0; ++token)
      for (int i = 0; i < head_size_; ++i)
        values_[at(token, i / kBlock) + i % kBlock * 2 + token % 2] = 0;
  }

 private:
  std::int64_t at(int token, int columns) const {
    return (std::int64_t(columns) * block_size_ + token / 2 * 2) * kBlock;
  }

  bf16 *keys_, *values_;
  int block_size_, head_size_;
};

// What one thread needs while it works on one task.
struct AttentionScratch {
  alignas(64) bf16 queries[kQueryRows * kMaxHead];
  alignas(64) float scores[kQueryRows * kKeyChunk];
  alignas(64) bf16 weights[kQueryRows * kKeyChunk];
  alignas(64) float sums[kQueryRows * kMaxHead];
  alignas(64) float top[kQueryRows], total[kQueryRows], factor[kQueryRows];
};

// Scores of 32 or 64 keys, in float32.
class Scores {
 public:
  explicit Scores(float* at) : at_(at) {}
  __m512 start(int, int, int) const { return _mm512_setzero_ps(); }
  template <int kBlocks>
  void write(int row, const __m512 (&sums)[kBlocks][2]) const {
    for (int block = 0; block < kBlocks; ++block)
      for (int half = 0; half < 2; ++half)
        _mm512_store_ps(at_ + row * kKeyChunk + block * kBlock + half * kLanes, sums[block][half]);
  }

 private:
  float* at_;
};

// Weighted sums of values: what there is, scaled to the new maximum, plus the new ones.
class WeightedSums {
 public:
  WeightedSums(float* at, int stride, const float* factor)
      : at_(at), stride_(stride), factor_(factor) {}
  __m512 start(int row, int block, int half) const {
    return _mm512_mul_ps(_mm512_load_ps(at(row, block, half)), _mm512_set1_ps(factor_[row]));
  }
  template <int kBlocks>
  void write(int row, const __m512 (&sums)[kBlocks][2]) const {
    for (int block = 0; block < kBlocks; ++block)
      for (int half = 0; half < 2; ++half) _mm512_store_ps(at(row, block, half), sums[block][half]);
  }

 private:
  float* at(int row, int block, int half) const {
    return at_ + row * stride_ + block * kBlock + half * kLanes;
  }

  float* at_;
  int stride_;
  const float* factor_;
};

// One step's attention, cut into tasks that are the same for every layer.
//
// A task is up to kQueryRows rows (queries times heads of a group) of one request against all keys they
// may see; where one task has all queries of a request, as in a decode step, against kSplit keys of
// them, and whoever finishes a request's last part puts the parts together.  The cut depends on each
// request alone, so a request's result does not change with its company.
class Attention {
 public:
  Attention(const Batch& batch, const Heads& heads)
      : batch_(batch), heads_(heads), is_last_(batch.num_cached_tokens()) {
    const int queries_of_task = std::max(1, kQueryRows / heads.group());
    int num_rows = 0;
    for (int seq = 0; seq < batch.num_seqs; ++seq) {
      const int length = batch.seq_lens[seq];
      const int num_queries = batch.query_start[seq + 1] - batch.query_start[seq];
      if (num_queries == 0) continue;
      is_last_[batch.query_start[seq + 1] - 1] = 1;
      if (num_queries <= queries_of_task) {
        const int parts = (length + kSplit - 1) / kSplit;
        for (int part = 0; part < parts; ++part) {
          const int end = std::min(length, (part + 1) * kSplit);
          tasks_.push_back({seq, 0, num_queries, part * kSplit, end, part, parts, num_rows});
        }
        if (parts > 1) num_rows += parts * num_queries * heads.group();
        continue;
      }
      for (int first = 0; first < num_queries; first += queries_of_task) {
        const int count = std::min(queries_of_task, num_queries - first);
        const int end = length - num_queries + first + count;
        tasks_.push_back({seq, first, count, 0, end, 0, 1, 0});
      }
    }
    // Long ones first: a short one at the end keeps the other threads waiting less.
    std::stable_sort(tasks_.begin(), tasks_.end(),
                     [](const Task& a, const Task& b) { return a.cost() > b.cost(); });
    partial_rows_ = num_rows;
    partials_.resize(std::size_t(num_rows) * heads.num_kv_heads * (heads.head_size + 2));
    finished_ = std::vector<std::atomic<int>>(std::size_t(batch.num_seqs) * heads.num_kv_heads);
  }

  // Puts one token's keys and values into the cache.
  void write_to_cache(int token, bf16* cache, const bf16* qkv) const {
    const std::int64_t slot = batch_.slots[token];
    if (slot < 0) return;
    const int offset = slot % batch_.block_size;
    for (int head = 0; head < heads_.num_kv_heads; ++head) {
      Page page(cache, batch_, heads_, slot / batch_.block_size, head);
      const bf16* key = qkv + std::int64_t(token) * heads_.width() +
                        std::int64_t(heads_.num_heads + head) * heads_.head_size;
      page.write(offset, key, key + std::int64_t(heads_.num_kv_heads) * heads_.head_size);
      if (is_last_[token]) page.clear_rest_of_four(offset);
    }
  }

  // One thread's share.  qkv: [num_tokens, heads.width()]; y: [num_tokens, num_heads * head_size].
  void run(Tickets& tickets, bf16* cache, const bf16* qkv, bf16* y) {
    // Kept by each thread: too large for its stack.
    static thread_local const auto scratch = std::make_unique<AttentionScratch>();
    const int num_tasks = static_cast<int>(tasks_.size()) * heads_.num_kv_heads;
    for (int ticket; (ticket = tickets.take()) < num_tasks;) {
      const Task& task = tasks_[ticket / heads_.num_kv_heads];
      const int head = ticket % heads_.num_kv_heads;
      attend(*scratch, task, head, cache, qkv);
      if (task.parts == 1) {
        write(*scratch, task, head, y);
      } else {
        keep(*scratch, task, head);
        std::atomic<int>& finished = finished_[task.seq * heads_.num_kv_heads + head];
        if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 == task.parts) {
          finished.store(0, std::memory_order_relaxed);  // for the next layer
          merge(*scratch, task, head);
          write(*scratch, task, head, y);
        }
      }
    }
  }

 private:
  struct Task {
    int seq, first_query, num_queries, first_key, end_key, part, parts, first_partial_row;
    std::int64_t cost() const { return std::int64_t(num_queries) * (end_key - first_key); }
  };

  int num_rows(const Task& task) const { return task.num_queries * heads_.group(); }
  // How many keys a row may see.
  int num_visible(const Task& task, int row) const {
    const int num_queries = batch_.query_start[task.seq + 1] - batch_.query_start[task.seq];
    return batch_.seq_lens[task.seq] - num_queries + task.first_query + row / heads_.group() + 1;
  }

  void attend(AttentionScratch& scratch, const Task& task, int head, bf16* cache,
              const bf16* qkv) const {
    const int rows_here = num_rows(task);
    gather(scratch, task, head, qkv);
    std::fill_n(scratch.top, rows_here, kLowest);
    std::fill_n(scratch.total, rows_here, 0.0f);
    std::fill_n(scratch.sums, rows_here * heads_.head_size, 0.0f);
    const std::int32_t* blocks = batch_.block_table + task.seq * batch_.block_table_stride;
    for (int key = task.first_key; key < task.end_key;) {
      const int offset = key % batch_.block_size;
      const int count =
          std::min({kKeyChunk, batch_.block_size - offset, task.end_key - key});
      const Page page(cache, batch_, heads_, blocks[key / batch_.block_size], head);
      score(scratch, page, offset, count, rows_here);
      soften(scratch, task, key, count, rows_here);
      add_values(scratch, page, offset, count, rows_here);
      key += count;
    }
  }

  // Queries of the group's heads, row by row.
  void gather(AttentionScratch& scratch, const Task& task, int head, const bf16* qkv) const {
    const int size = heads_.head_size, group = heads_.group();
    for (int query = 0; query < task.num_queries; ++query) {
      const std::int64_t token = batch_.query_start[task.seq] + task.first_query + query;
      const bf16* from = qkv + token * heads_.width() + std::int64_t(head) * group * size;
      std::copy_n(from, group * size, scratch.queries + query * group * size);
    }
  }

  void score(AttentionScratch& scratch, const Page& page, int offset, int count, int rows_here) const {
    const int size = heads_.head_size;
    for (int key = 0; key < count; key += 2 * kBlock) {
      const bool is_one = key + kBlock >= count;
      const bf16* blocks[2] = {page.keys(offset + key), is_one ? nullptr : page.keys(offset + key + kBlock)};
      const Scores output(scratch.scores + key);
      if (is_one) {
        rows<1>(blocks, size / 2, scratch.queries, size, rows_here, output);
      } else {
        rows<2>(blocks, size / 2, scratch.queries, size, rows_here, output);
      }
    }
  }

  // Scores to weights, relative to each row's largest score so far.
  void soften(AttentionScratch& scratch, const Task& task, int first_key, int count,
              int rows_here) const {
    const __m512 scale = _mm512_set1_ps(heads_.scale);
    const auto lanes = [](int number) {
      return number >= kLanes ? __mmask16(0xffff)
                              : number <= 0 ? __mmask16(0) : __mmask16((1u << number) - 1);
    };
    const int padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int row = 0; row < rows_here; ++row) {
      const int visible = std::min(count, num_visible(task, row) - first_key);
      const float* scores = scratch.scores + row * kKeyChunk;
      __m512 top = _mm512_set1_ps(kLowest);
      for (int i = 0; i < visible; i += kLanes)
        top = _mm512_mask_max_ps(top, lanes(visible - i), top, _mm512_load_ps(scores + i));
      const float new_top =
          std::max(scratch.top[row], visible > 0 ? _mm512_reduce_max_ps(top) * heads_.scale : kLowest);
      scratch.factor[row] = scratch.top[row] - new_top;
      scratch.top[row] = new_top;
      bf16* weights = scratch.weights + row * kKeyChunk;
      __m512 sum = _mm512_setzero_ps();
      for (int i = 0; i < padded; i += kLanes) {
        const __m512 weight = _mm512_maskz_mov_ps(
            lanes(visible - i),
            exp(_mm512_fmsub_ps(_mm512_load_ps(scores + i), scale, _mm512_set1_ps(new_top))));
        sum = _mm512_add_ps(sum, weight);
        store(weights + i, weight);
      }
      // Kept until the factors of sixteen rows are computed at once, below.
      scratch.scores[row * kKeyChunk] = _mm512_reduce_add_ps(sum);
    }
    for (int row = 0; row < rows_here; row += kLanes) {
      const __m512 factor = exp(_mm512_load_ps(scratch.factor + row));
      _mm512_store_ps(scratch.factor + row, factor);
    }
    for (int row = 0; row < rows_here; ++row)
      scratch.total[row] =
          scratch.total[row] * scratch.factor[row] + scratch.scores[row * kKeyChunk];
  }

  void add_values(AttentionScratch& scratch, const Page& page, int offset, int count,
                  int rows_here) const {
    const int pairs = (count + 3) / 4 * 2;
    for (int column = 0; column < heads_.head_size; column += 2 * kBlock) {
      const bool is_one = column + kBlock >= heads_.head_size;
      const bf16* blocks[2] = {page.values(offset, column / kBlock),
                               is_one ? nullptr : page.values(offset, column / kBlock + 1)};
      const WeightedSums output(scratch.sums + column, heads_.head_size, scratch.factor);
      if (is_one) {
        rows<1>(blocks, pairs, scratch.weights, kKeyChunk, rows_here, output);
      } else {
        rows<2>(blocks, pairs, scratch.weights, kKeyChunk, rows_here, output);
      }
    }
  }

  void write(const AttentionScratch& scratch, const Task& task, int head, bf16* y) const {
    const int size = heads_.head_size, group = heads_.group();
    for (int row = 0; row < num_rows(task); ++row) {
      const std::int64_t token = batch_.query_start[task.seq] + task.first_query + row / group;
      bf16* to = y + (token * heads_.num_heads + head * group + row % group) * size;
      const __m512 share = _mm512_set1_ps(1.0f / scratch.total[row]);
      for (int i = 0; i < size; i += kLanes)
        store(to + i, _mm512_mul_ps(_mm512_load_ps(scratch.sums + row * heads_.head_size + i), share));
    }
  }

  // Where a part's row is kept: sums, then largest score, then total.
  float* partial(const Task& task, int part, int head, int row) {
    const std::size_t index = std::size_t(head) * partial_rows_ + task.first_partial_row +
                              std::size_t(part) * num_rows(task) + row;
    return partials_.data() + index * (heads_.head_size + 2);
  }

  void keep(const AttentionScratch& scratch, const Task& task, int head) {
    for (int row = 0; row < num_rows(task); ++row) {
      float* to = partial(task, task.part, head, row);
      std::copy_n(scratch.sums + row * heads_.head_size, heads_.head_size, to);
      to[heads_.head_size] = scratch.top[row];
      to[heads_.head_size + 1] = scratch.total[row];
    }
  }

  void merge(AttentionScratch& scratch, const Task& task, int head) {
    const int size = heads_.head_size;
    for (int row = 0; row < num_rows(task); ++row) {
      float top = kLowest, total = 0.0f;
      for (int part = 0; part < task.parts; ++part)
        top = std::max(top, partial(task, part, head, row)[size]);
      float* sums = scratch.sums + row * heads_.head_size;
      std::fill_n(sums, size, 0.0f);
      for (int part = 0; part < task.parts; ++part) {
        const float* from = partial(task, part, head, row);
        const float factor = std::exp(from[size] - top);
        total += from[size + 1] * factor;
        for (int i = 0; i < size; ++i) sums[i] += from[i] * factor;
      }
      scratch.total[row] = total;
    }
  }

  const Batch& batch_;
  const Heads heads_;
  std::vector<char> is_last_;  // of its request, by token
  std::vector<Task> tasks_;
  int partial_rows_ = 0;
  std::vector<float> partials_;
  std::vector<std::atomic<int>> finished_;
};

}  // namespace xllm
