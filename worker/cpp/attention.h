// Attention of the rows of a step that decode, over the paged cache.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "convert.h"

namespace lorelay {

using at::Tensor;

constexpr int64_t KEYS_AT_ONCE = 4;
constexpr int64_t ROWS_PER_TASK = 64;  // of entries to store: fewer are not worth another thread

template <typename T, typename Acc>
[[gnu::always_inline]] inline Acc dot(const Acc* left, const T* right, int64_t size) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) {
    sum += left[i] * static_cast<Acc>(right[i]);
  }
  return sum;
}

template <typename Acc>
inline Acc exponential(Acc x) {
  return std::exp(x);
}

// e^x for x <= 0, vectorised by the compiler: 2^n by the exponent's bits, the rest by Taylor's series.
template <>
inline float exponential(float x) {
  const float halves = std::max(x, -87.0f) * 1.44269504f;
  const float whole = std::nearbyint(halves);
  const float rest = (halves - whole) * 0.69314718f;
  float value = 1.0f / 720;
  value = value * rest + 1.0f / 120;
  value = value * rest + 1.0f / 24;
  value = value * rest + 1.0f / 6;
  value = value * rest + 0.5f;
  value = value * rest + 1.0f;
  value = value * rest + 1.0f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x == x ? value * power : x;
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

template <typename T>
inline T storable(T value) {  // like nan_to_num
  using Acc = at::opmath_type<T>;
  const Acc number = value;
  if (std::isfinite(number)) {
    return value;
  }
  if (std::isnan(number)) {
    return T(0);
  }
  return number > 0 ? std::numeric_limits<T>::max() : std::numeric_limits<T>::lowest();
}

// new_entries (num_kv_heads, T, head_dim), any strides but the last; layer (num_slots, num_kv_heads, head_dim).
template <typename T>
void write(const Tensor& new_entries, const int64_t* slots, const Tensor& layer) {
  const int64_t num_heads = new_entries.size(0), num_rows = new_entries.size(1), size = new_entries.size(2);
  const int64_t head_stride = new_entries.stride(0), row_stride = new_entries.stride(1);
  const T* source = new_entries.const_data_ptr<T>();
  T* target = layer.mutable_data_ptr<T>();
  at::parallel_for(0, num_rows, ROWS_PER_TASK, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < num_heads; ++head) {
        const T* from = source + head * head_stride + row * row_stride;
        T* to = target + (slots[row] * num_heads + head) * size;
        for (int64_t i = 0; i < size; ++i) {
          to[i] = storable(from[i]);
        }
      }
    }
  });
}

struct Sizes {
  int64_t num_heads, num_kv_heads, head_dim, value_dim, block_size, window;
  int64_t query_head_stride, query_row_stride;
};

// One KV head of one sequence: the outputs of the query heads that share it. DIM is head_dim where the compiler
// should know it, else 0.
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
  const auto slot = [&](int64_t key) {
    return table[key / sizes.block_size] * sizes.block_size + key % sizes.block_size;
  };
  for (int64_t key = 0; key < num_keys; ++key) {
    const T* stored = keys + slot(first + key) * sizes.num_kv_heads * head_dim;
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
      stored[n] = values + slot(std::min(key + n, num_keys - 1) + first) * sizes.num_kv_heads * value_dim;
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
void attend_all(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& rows,
                const Tensor& tables, const Tensor& positions, double scaling, const Sizes& sizes,
                Tensor& output) {
  using Acc = at::opmath_type<T>;
  const T* queries = query.const_data_ptr<T>();
  const T* key_data = keys.const_data_ptr<T>();
  const T* value_data = values.const_data_ptr<T>();
  const int64_t* row_data = rows.const_data_ptr<int64_t>();
  const int64_t* table_data = tables.const_data_ptr<int64_t>();
  const int64_t* position_data = positions.const_data_ptr<int64_t>();
  T* outputs = output.mutable_data_ptr<T>();
  const int64_t group = sizes.num_heads / sizes.num_kv_heads;
  at::parallel_for(0, tables.size(0) * sizes.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> buffer;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / sizes.num_kv_heads, kv_head = task % sizes.num_kv_heads, row = row_data[n];
      attend<T, Acc, DIM>(
          queries + kv_head * group * sizes.query_head_stride + row * sizes.query_row_stride,
          key_data + kv_head * sizes.head_dim, value_data + kv_head * sizes.value_dim,
          table_data + n * tables.stride(0), position_data[n], static_cast<Acc>(scaling), sizes, buffer,
          outputs + (row * sizes.num_heads + kv_head * group) * sizes.value_dim);
    }
  });
}

inline Tensor with_dense_entries(const Tensor& tensor) {
  return tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

inline Tensor paged_attention(const Tensor& any_query, const Tensor& key, const Tensor& value, const Tensor& slots,
                       Tensor keys, Tensor values, const Tensor& rows, const Tensor& tables,
                       const Tensor& positions, double scaling, int64_t window) {
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous(), "the cache must be contiguous");
  const Tensor query = with_dense_entries(any_query);
  const Sizes sizes{query.size(0),  keys.size(2), query.size(2),   values.size(3),
                    keys.size(1),   window,       query.stride(0), query.stride(1)};
  Tensor output = at::empty({query.size(1), query.size(0), sizes.value_dim}, query.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, query.scalar_type(), "paged_attention", [&] {
    write<scalar_t>(with_dense_entries(key), slots.const_data_ptr<int64_t>(), keys);
    write<scalar_t>(with_dense_entries(value), slots.const_data_ptr<int64_t>(), values);
    const bool is_square = sizes.head_dim == sizes.value_dim;
    const auto attend = is_square && sizes.head_dim == 64    ? attend_all<scalar_t, 64>
                        : is_square && sizes.head_dim == 128 ? attend_all<scalar_t, 128>
                                                             : attend_all<scalar_t, 0>;
    attend(query, keys, values, rows, tables, positions, scaling, sizes, output);
  });
  return output;
}

}  // namespace lorelay
