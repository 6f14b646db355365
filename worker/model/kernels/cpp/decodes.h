// Attention of the decodes of a step over the paged KV cache.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "convert.h"
#include "exponential.h"
#include "layout.h"

namespace lorelay {

constexpr int64_t KEYS_AT_ONCE = 4;
constexpr int64_t KEYS_AHEAD = 16;  // prefetch distance; hardware can't prefetch blocks, which are scattered in memory

template <typename T, typename Acc>
[[gnu::always_inline]] inline Acc dot(const Acc* left, const T* right, int64_t size) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) {
    sum += left[i] * static_cast<Acc>(right[i]);
  }
  return sum;
}

template <typename T>
[[gnu::always_inline]] inline void prefetch(const T* entry, int64_t size) {
  constexpr int64_t CACHE_LINE_BYTES = 64;
  for (int64_t i = 0; i < size; i += CACHE_LINE_BYTES / sizeof(T)) {
    __builtin_prefetch(entry + i);
  }
}

template <typename Acc>
void softmax(Acc* scores, int64_t size) {
  Acc largest = -std::numeric_limits<Acc>::infinity();
  for (int64_t i = 0; i < size; ++i) {
    largest = std::max(largest, scores[i]);
  }
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) {
    scores[i] = exponential<Acc>(scores[i] - largest);
    sum += scores[i];
  }
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    scores[i] /= sum;
  }
}

// Computes the outputs of the query heads that share one KV head, for one sequence. DIM is head_dim, so that the
// compiler knows it, or 0 for any other head_dim.
template <typename T, typename Acc, int64_t DIM>
void attend(const T* query, const T* keys, const T* values, const int64_t* table, int64_t position,
            Acc scaling, const Sizes& sizes, std::vector<Acc>& buffer, T* output) {
  const int64_t head_dim = DIM ? DIM : sizes.head_dim, value_dim = DIM ? DIM : sizes.value_dim;
  const int64_t group = sizes.num_heads / sizes.num_kv_heads;
  const int64_t first = sizes.window > 0 ? std::max<int64_t>(0, position - sizes.window + 1) : 0;
  const int64_t num_keys = position + 1 - first;
  buffer.resize(group * (num_keys + head_dim + value_dim));
  Acc* scores = buffer.data();
  Acc* queries = scores + group * num_keys;
  Acc* sums = queries + group * head_dim;
  for (int64_t head = 0; head < group; ++head) {
    convert(query + head * sizes.query_head_stride, head_dim, queries + head * head_dim);
  }
  // If this function were not inlined, GCC would take it for one without effects, and drop the calls.
  const auto prefetch_entries = [&](int64_t key) __attribute__((always_inline)) {
    const int64_t index = sizes.cache_index(table, first + key);
    prefetch(keys + index * sizes.num_kv_heads * head_dim, head_dim);
    prefetch(values + index * sizes.num_kv_heads * value_dim, value_dim);
  };
  for (int64_t key = 0; key < std::min(KEYS_AHEAD, num_keys); ++key) {
    prefetch_entries(key);
  }
  for (int64_t key = 0; key < num_keys; ++key) {
    if (key + KEYS_AHEAD < num_keys) {
      prefetch_entries(key + KEYS_AHEAD);
    }
    const T* stored = keys + sizes.cache_index(table, first + key) * sizes.num_kv_heads * head_dim;
    for (int64_t head = 0; head < group; ++head) {
      scores[head * num_keys + key] = scaling * dot(queries + head * head_dim, stored, head_dim);
    }
  }
  for (int64_t head = 0; head < group; ++head) {
    softmax(scores + head * num_keys, num_keys);
  }
  std::fill(sums, sums + group * value_dim, Acc(0));
  for (int64_t key = 0; key < num_keys; key += KEYS_AT_ONCE) {
    const T* stored[KEYS_AT_ONCE];
    for (int64_t n = 0; n < KEYS_AT_ONCE; ++n) {
      stored[n] = values + sizes.cache_index(table, std::min(key + n, num_keys - 1) + first) * sizes.num_kv_heads * value_dim;
    }
    for (int64_t head = 0; head < group; ++head) {
      Acc weights[KEYS_AT_ONCE];
      for (int64_t n = 0; n < KEYS_AT_ONCE; ++n) {
        weights[n] = key + n < num_keys ? scores[head * num_keys + key + n] : Acc(0);
      }
      Acc* sum = sums + head * value_dim;
#pragma omp simd
      for (int64_t i = 0; i < value_dim; ++i) {
        Acc part = sum[i];
        for (int64_t n = 0; n < KEYS_AT_ONCE; ++n) {
          part += weights[n] * static_cast<Acc>(stored[n][i]);
        }
        sum[i] = part;
      }
    }
  }
  for (int64_t i = 0; i < group * value_dim; ++i) {
    output[i] = static_cast<T>(sums[i]);
  }
}

template <typename T, int64_t DIM>
void attend_decodes(const Tensor& query, const Tensor& keys, const Tensor& values, const AttentionMetadata& metadata,
                    double scaling, const Sizes& sizes, const Tensor& output) {
  using Acc = at::opmath_type<T>;
  const T* queries = query.const_data_ptr<T>();
  const T* key_data = keys.const_data_ptr<T>();
  const T* value_data = values.const_data_ptr<T>();
  const int64_t* row_data = metadata.rows.const_data_ptr<int64_t>();
  const int64_t* table_data = metadata.tables.const_data_ptr<int64_t>();
  const int64_t* position_data = metadata.positions.const_data_ptr<int64_t>();
  T* outputs = output.mutable_data_ptr<T>();
  const int64_t group = sizes.num_heads / sizes.num_kv_heads;
  at::parallel_for(0, metadata.tables.size(0) * sizes.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> buffer;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / sizes.num_kv_heads, kv_head = task % sizes.num_kv_heads, row = row_data[n];
      attend<T, Acc, DIM>(
          queries + kv_head * group * sizes.query_head_stride + row * sizes.query_row_stride,
          key_data + kv_head * sizes.head_dim, value_data + kv_head * sizes.value_dim,
          table_data + n * metadata.tables.stride(0), position_data[n], static_cast<Acc>(scaling), sizes, buffer,
          outputs + (row * sizes.num_heads + kv_head * group) * sizes.value_dim);
    }
  });
}

}  // namespace lorelay
