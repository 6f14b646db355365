// Where the rows of a step stand, and how large they are.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace lorelay {

using at::Tensor;

struct StepLayout {
  Tensor slots;                    // (T,): where the entries of all rows go in the cache
  Tensor rows, tables, positions;  // of the rows that decode: (n,), block tables (n, m), (n,)
  Tensor chunks;                   // (k, 3) of the others: first row, number of rows, first position
  std::vector<Tensor> chunk_tables;
};

struct Sizes {
  int64_t num_heads, num_kv_heads, head_dim, value_dim, block_size, window;
  int64_t query_head_stride, query_row_stride;

  int64_t slot(const int64_t* table, int64_t position) const {
    return table[position / block_size] * block_size + position % block_size;
  }
};

}  // namespace lorelay
