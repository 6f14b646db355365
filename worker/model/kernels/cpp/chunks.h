// Attention of the prompt chunks of a step over the paged KV cache.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <vector>

#include "convert.h"
#include "exponential.h"
#include "layout.h"

namespace lorelay {

#ifdef __AVX512F__
constexpr int64_t VECTOR_BYTES = 64, ROWS_AT_ONCE = 8;
#else
constexpr int64_t VECTOR_BYTES = 32, ROWS_AT_ONCE = 4;
#endif
constexpr int64_t COLUMNS_AT_ONCE = 32;  // columns are padded to a multiple of this, i.e. of two vectors
constexpr int64_t TYPICAL_COLUMNS = 96;  // number of columns of a tile that fits into the L1 and L2 caches
constexpr int64_t KEYS_PER_TILE = 32;

inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// One vector register. If arrays were used, the compiler would keep them in memory.
template <typename Acc>
struct VectorOf {
  typedef Acc Type __attribute__((vector_size(VECTOR_BYTES)));
  static Type load(const Acc* from) {
    Type vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
  }
};

// Adds left x right to sums (num_rows, width). left is (num_rows, size) with any strides; right is (size, width).
template <typename Acc>
void add_product(const Acc* left, int64_t row_stride, int64_t stride, int64_t num_rows, int64_t size,
                 const Acc* right, int64_t width, Acc* sums) {
  using Vector = typename VectorOf<Acc>::Type;
  constexpr auto load = VectorOf<Acc>::load;
  constexpr int64_t LENGTH = VECTOR_BYTES / sizeof(Acc);
  for (int64_t column = 0; column < width; column += 2 * LENGTH) {
    for (int64_t row = 0; row < num_rows; row += ROWS_AT_ONCE) {
      Vector sum[ROWS_AT_ONCE][2];
#pragma GCC unroll 8
      for (int64_t r = 0; r < ROWS_AT_ONCE; ++r) {
        sum[r][0] = load(sums + (row + r) * width + column);
        sum[r][1] = load(sums + (row + r) * width + column + LENGTH);
      }
      for (int64_t i = 0; i < size; ++i) {
        const Vector first = load(right + i * width + column);
        const Vector second = load(right + i * width + column + LENGTH);
#pragma GCC unroll 8
        for (int64_t r = 0; r < ROWS_AT_ONCE; ++r) {
          const Acc factor = left[(row + r) * row_stride + i * stride];
          sum[r][0] += factor * first;
          sum[r][1] += factor * second;
        }
      }
#pragma GCC unroll 8
      for (int64_t r = 0; r < ROWS_AT_ONCE; ++r) {
        std::memcpy(sums + (row + r) * width + column, &sum[r][0], sizeof(Vector));
        std::memcpy(sums + (row + r) * width + column + LENGTH, &sum[r][1], sizeof(Vector));
      }
    }
  }
}

// Some queries of one chunk, for the query heads that share a KV head. A column is one query of one head. All columns
// are multiplied with KEYS_PER_TILE keys at a time, and the softmax is corrected from tile to tile, as in
// FlashAttention (Dao et al. 2022, arXiv:2205.14135).
template <typename Acc>
class QueryTile {
 public:
  QueryTile(const Sizes& sizes, int64_t max_num_queries)
      : sizes_(sizes),
        group_(sizes.num_heads / sizes.num_kv_heads),
        num_columns_(round_up(max_num_queries * group_, COLUMNS_AT_ONCE)),
        width_(round_up(sizes.value_dim, COLUMNS_AT_ONCE)),
        queries_(sizes.head_dim * num_columns_),
        outputs_(num_columns_ * width_),
        largest_(num_columns_),
        sums_(num_columns_),
        corrections_(num_columns_),
        keys_(KEYS_PER_TILE * sizes.head_dim),
        values_(KEYS_PER_TILE * width_),
        scores_(KEYS_PER_TILE * num_columns_) {}

  // query points to the first query of the first head.
  template <typename T>
  void begin(const T* query, int64_t first_position, int64_t num_queries, Acc scaling) {
    first_position_ = first_position, num_queries_ = num_queries;
    for (int64_t column = 0; column < num_queries * group_; ++column) {
      const T* from =
          query + column % group_ * sizes_.query_head_stride + column / group_ * sizes_.query_row_stride;
      for (int64_t i = 0; i < sizes_.head_dim; ++i) {
        queries_[i * num_columns_ + column] = scaling * static_cast<Acc>(from[i]);
      }
    }
    std::fill(outputs_.begin(), outputs_.end(), Acc(0));
    std::fill(sums_.begin(), sums_.end(), Acc(0));
    std::fill(largest_.begin(), largest_.end(), -INFINITE);
  }

  template <typename T>
  void see_all(const T* keys, const T* values, const int64_t* table) {
    const int64_t end = first_position_ + num_queries_;
    int64_t key = sizes_.window > 0 ? std::max<int64_t>(0, first_position_ - sizes_.window + 1) : 0;
    for (; key < end; key += KEYS_PER_TILE) {
      const int64_t num_keys = std::min(KEYS_PER_TILE, end - key);
      read(keys, values, table, key, num_keys);
      std::fill(scores_.begin(), scores_.end(), Acc(0));
      add_product(keys_.data(), sizes_.head_dim, 1, KEYS_PER_TILE, sizes_.head_dim, queries_.data(), num_columns_,
                  scores_.data());
      weigh(key, num_keys);
      add_product(scores_.data(), 1, num_columns_, num_columns_, num_keys, values_.data(), width_,
                  outputs_.data());
    }
  }

  // output points to the first query's output of the first head. A row of the output has all heads.
  template <typename T>
  void store(T* output) const {
    for (int64_t column = 0; column < num_queries_ * group_; ++column) {
      const Acc* from = outputs_.data() + column * width_;
      T* to = output + (column / group_ * sizes_.num_heads + column % group_) * sizes_.value_dim;
      for (int64_t i = 0; i < sizes_.value_dim; ++i) {
        to[i] = static_cast<T>(from[i] / sums_[column]);
      }
    }
  }

 private:
  static constexpr Acc INFINITE = std::numeric_limits<Acc>::infinity();

  template <typename T>
  void read(const T* keys, const T* values, const int64_t* table, int64_t first_key, int64_t num_keys) {
    for (int64_t n = 0; n < num_keys; ++n) {
      const int64_t entry = sizes_.cache_index(table, first_key + n) * sizes_.num_kv_heads;
      convert(keys + entry * sizes_.head_dim, sizes_.head_dim, keys_.data() + n * sizes_.head_dim);
      convert(values + entry * sizes_.value_dim, sizes_.value_dim, values_.data() + n * width_);
    }
  }

  // Turns scores into softmax weights, 0 where a query does not see a key; rescales the sums of earlier tiles.
  void weigh(int64_t first_key, int64_t num_keys) {
    corrections_ = largest_;
    for (int64_t n = 0; n < num_keys; ++n) {
      Acc* score = scores_.data() + n * num_columns_;
      hide(first_key + n, score);
#pragma omp simd
      for (int64_t column = 0; column < num_columns_; ++column) {
        largest_[column] = std::max(largest_[column], score[column]);
      }
    }
#pragma omp simd
    for (int64_t column = 0; column < num_columns_; ++column) {
      const Acc top = largest_[column];
      // While a query has seen no key, the old and the new maximum are minus infinity: their difference would be NaN.
      corrections_[column] = corrections_[column] == top ? Acc(1) : exponential<Acc>(corrections_[column] - top);
      sums_[column] *= corrections_[column];
    }
    for (int64_t column = 0; column < num_columns_; ++column) {
      Acc* output = outputs_.data() + column * width_;
      for (int64_t i = 0; i < width_; ++i) {
        output[i] *= corrections_[column];
      }
    }
    for (int64_t n = 0; n < num_keys; ++n) {
      Acc* score = scores_.data() + n * num_columns_;
#pragma omp simd
      for (int64_t column = 0; column < num_columns_; ++column) {
        const Acc weight = exponential<Acc>(score[column] - largest_[column]);
        score[column] = score[column] == -INFINITE ? Acc(0) : weight;
        sums_[column] += score[column];
      }
    }
  }

  // Hides a key from the queries that must not see it: queries before the key, and queries beyond its window.
  // Columns are ordered by query, so that each of the two groups is a range of columns.
  void hide(int64_t key, Acc* score) const {
    const auto column_of = [&](int64_t position) {
      return std::clamp<int64_t>((position - first_position_) * group_, 0, num_columns_);
    };
    std::fill(score, score + column_of(key), -INFINITE);
    if (sizes_.window > 0) {
      std::fill(score + column_of(key + sizes_.window), score + num_columns_, -INFINITE);
    }
  }

  const Sizes& sizes_;
  const int64_t group_, num_columns_, width_;  // width_: value_dim, padded
  int64_t first_position_ = 0, num_queries_ = 0;
  std::vector<Acc> queries_;  // (head_dim, num_columns), scaled
  std::vector<Acc> outputs_;  // (num_columns, width)
  std::vector<Acc> largest_, sums_, corrections_;
  std::vector<Acc> keys_, values_;
  std::vector<Acc> scores_;  // (KEYS_PER_TILE, num_columns), then the weights
};

struct ChunkTask {
  int64_t first_row, num_rows, first_position, kv_head;
  const int64_t* table;
};

inline std::vector<ChunkTask> divide(const AttentionMetadata& metadata, const Sizes& sizes, int64_t num_rows) {
  const auto chunk = metadata.chunks.accessor<int64_t, 2>();
  std::vector<ChunkTask> tasks;
  for (int64_t n = 0; n < chunk.size(0); ++n) {
    for (int64_t row = 0; row < chunk[n][1]; row += num_rows) {
      for (int64_t head = 0; head < sizes.num_kv_heads; ++head) {
        tasks.push_back({chunk[n][0] + row, std::min(num_rows, chunk[n][1] - row), chunk[n][2] + row, head,
                         metadata.chunk_tables[n].const_data_ptr<int64_t>()});
      }
    }
  }
  return tasks;
}

template <typename T>
void attend_chunks(const Tensor& query, const Tensor& keys, const Tensor& values, const AttentionMetadata& metadata,
                   double scaling, const Sizes& sizes, const Tensor& output) {
  using Acc = at::opmath_type<T>;
  const T* queries = query.const_data_ptr<T>();
  const T* key_data = keys.const_data_ptr<T>();
  const T* value_data = values.const_data_ptr<T>();
  T* outputs = output.mutable_data_ptr<T>();
  const int64_t group = sizes.num_heads / sizes.num_kv_heads;
  const int64_t max_num_rows = std::max<int64_t>(1, TYPICAL_COLUMNS / group);
  const std::vector<ChunkTask> tasks = divide(metadata, sizes, max_num_rows);
  // Each thread takes the next task, the longest ones first. If threads had fixed shares of the tasks, one busy core
  // would delay the whole step.
  std::atomic<int64_t> num_left = tasks.size();
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks.size()), 1, [&](int64_t, int64_t) {
    QueryTile<Acc> tile(sizes, max_num_rows);
    for (int64_t n = --num_left; n >= 0; n = --num_left) {
      const ChunkTask& task = tasks[n];
      const int64_t head = task.kv_head * group;
      tile.begin(queries + head * sizes.query_head_stride + task.first_row * sizes.query_row_stride,
                 task.first_position, task.num_rows, static_cast<Acc>(scaling));
      tile.see_all(key_data + task.kv_head * sizes.head_dim, value_data + task.kv_head * sizes.value_dim,
                   task.table);
      tile.store(outputs + (task.first_row * sizes.num_heads + head) * sizes.value_dim);
    }
  });
}

}  // namespace lorelay
