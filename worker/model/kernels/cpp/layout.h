// The places of a step's rows in the cache and in their sequences, and the sizes of heads and blocks.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace lorelay {

using at::Tensor;

struct AttentionMetadata {
  Tensor cache_indices;            // (T,): the places of all rows' keys and values in the cache
  Tensor rows, tables, positions;  // the rows that decode: (n,), block tables (n, m), (n,)
  Tensor chunks;                   // (k, 3), all other rows: first row, number of rows, first position
  std::vector<Tensor> chunk_tables;
};

struct Sizes {
  int64_t num_heads, num_kv_heads, head_dim, value_dim, block_size, window;
  int64_t query_head_stride, query_row_stride;

  // The place in the cache of a position of a sequence with this block table.
  int64_t cache_index(const int64_t* table, int64_t position) const {
    return table[position / block_size] * block_size + position % block_size;
  }
};

}  // namespace lorelay
