// Attention of all rows of a step over the paged KV cache.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>

#include "chunks.h"
#include "decodes.h"
#include "layout.h"

namespace lorelay {

constexpr int64_t ROWS_PER_TASK = 64;  // minimum number of rows that a thread stores

template <typename T>
inline T storable(T value) {  // same result as torch.nan_to_num
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

// Stores new_entries (num_kv_heads, T, head_dim) in layer (number of cache indices, num_kv_heads, head_dim). The last
// stride of new_entries must be 1; the others may be any.
template <typename T>
void write(const Tensor& new_entries, const int64_t* indices, const Tensor& layer) {
  const int64_t num_heads = new_entries.size(0), num_rows = new_entries.size(1), size = new_entries.size(2);
  const int64_t head_stride = new_entries.stride(0), row_stride = new_entries.stride(1);
  const T* source = new_entries.const_data_ptr<T>();
  T* target = layer.mutable_data_ptr<T>();
  at::parallel_for(0, num_rows, ROWS_PER_TASK, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < num_heads; ++head) {
        const T* from = source + head * head_stride + row * row_stride;
        T* to = target + (indices[row] * num_heads + head) * size;
        for (int64_t i = 0; i < size; ++i) {
          to[i] = storable(from[i]);
        }
      }
    }
  });
}

inline Tensor with_dense_entries(const Tensor& tensor) {
  return tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// Stores all keys and values in the cache, and returns the attention of all queries: (T, num_heads, value_dim). query
// is (num_heads, T, head_dim); key and value are (num_kv_heads, T, head_dim).
inline Tensor paged_attention(const Tensor& any_query, const Tensor& key, const Tensor& value, Tensor keys,
                              Tensor values, const AttentionMetadata& metadata, double scaling, int64_t window) {
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous(), "the cache must be contiguous");
  const Tensor query = with_dense_entries(any_query);
  const Sizes sizes{query.size(0), keys.size(2), query.size(2),   values.size(3),
                    keys.size(1),  window,       query.stride(0), query.stride(1)};
  Tensor output = at::empty({query.size(1), query.size(0), sizes.value_dim}, query.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, query.scalar_type(), "paged_attention", [&] {
    write<scalar_t>(with_dense_entries(key), metadata.cache_indices.const_data_ptr<int64_t>(), keys);
    write<scalar_t>(with_dense_entries(value), metadata.cache_indices.const_data_ptr<int64_t>(), values);
    const bool is_square = sizes.head_dim == sizes.value_dim;
    const auto attend_decodes_of = is_square && sizes.head_dim == 64    ? attend_decodes<scalar_t, 64>
                                   : is_square && sizes.head_dim == 128 ? attend_decodes<scalar_t, 128>
                                                                        : attend_decodes<scalar_t, 0>;
    attend_decodes_of(query, keys, values, metadata, scaling, sizes, output);
    attend_chunks<scalar_t>(query, keys, values, metadata, scaling, sizes, output);
  });
  return output;
}

}  // namespace lorelay
