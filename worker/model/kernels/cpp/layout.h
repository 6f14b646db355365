// Attention metadata of a step, and the sizes of heads and blocks.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace lorelay {

using at::Tensor;

struct AttentionMetadata {
  Tensor cache_indices;            // (T,): cache index of the keys and values of each row
  Tensor rows, tables, positions;  // of the n decodes: rows (n,), block tables (n, m), positions (n,)
  Tensor chunks;                   // (k, 3): first row, number of rows and first position of each chunk
  std::vector<Tensor> chunk_tables;
};

struct Sizes {
  int64_t num_heads, num_kv_heads, head_dim, value_dim, block_size, window;
  int64_t query_head_stride, query_row_stride;

  // Returns the cache index of a position of the sequence with this block table.
  int64_t cache_index(const int64_t* table, int64_t position) const {
    return table[position / block_size] * block_size + position % block_size;
  }
};

}  // namespace lorelay
