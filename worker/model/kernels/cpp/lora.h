// The adapters' low-rank updates: each row of a step gets the update of its own adapter.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "convert.h"

namespace lorelay {

using at::Tensor;

constexpr int64_t OUTPUT_CHUNK = 128;
constexpr int64_t RANKS_AT_ONCE = 4;

struct Segment {  // the rows and ranks of one adapter
  const int64_t* rows;
  int64_t num_rows, first_rank, num_ranks, first_low;
};

// The dot products of one row of the input with RANKS_AT_ONCE rows of A, in one pass over the input row.
template <typename T, typename Acc>
[[gnu::always_inline]] inline void dot_ranks(const Acc* weights, const T* row, int64_t size, Acc* products) {
  static_assert(RANKS_AT_ONCE == 4);
  Acc sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
  for (int64_t i = 0; i < size; ++i) {
    const Acc entry = static_cast<Acc>(row[i]);
    sum0 += weights[i] * entry;
    sum1 += weights[size + i] * entry;
    sum2 += weights[2 * size + i] * entry;
    sum3 += weights[3 * size + i] * entry;
  }
  products[0] = sum0, products[1] = sum1, products[2] = sum2, products[3] = sum3;
}

template <typename T, typename Acc>
void multiply_a(const std::vector<Segment>& segments, const Tensor& input, const Tensor& a, Acc* low) {
  const int64_t size = a.size(1), row_stride = input.stride(0);
  const T* inputs = input.const_data_ptr<T>();
  const T* weights = a.const_data_ptr<T>();
  std::vector<std::pair<const Segment*, int64_t>> tasks;
  for (const Segment& segment : segments) {
    for (int64_t rank = 0; rank < segment.num_ranks; rank += RANKS_AT_ONCE) {
      tasks.emplace_back(&segment, rank);
    }
  }
  at::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> block(RANKS_AT_ONCE * size);
    Acc products[RANKS_AT_ONCE];
    for (int64_t task = begin; task < end; ++task) {
      const auto [segment, rank] = tasks[task];
      const int64_t num_ranks = std::min(RANKS_AT_ONCE, segment->num_ranks - rank);
      convert(weights + (segment->first_rank + rank) * size, num_ranks * size, block.data());
      for (int64_t n = 0; n < segment->num_rows; ++n) {
        dot_ranks(block.data(), inputs + segment->rows[n] * row_stride, size, products);
        std::copy_n(products, num_ranks, low + segment->first_low + n * segment->num_ranks + rank);
      }
    }
  });
}

template <typename T, typename Acc>
void add_b(const std::vector<Segment>& segments, const Acc* low, const Tensor& b, const Tensor& output) {
  const int64_t size = b.size(1), row_stride = output.stride(0);
  const T* weights = b.const_data_ptr<T>();
  T* outputs = output.mutable_data_ptr<T>();
  const int64_t num_chunks = (size + OUTPUT_CHUNK - 1) / OUTPUT_CHUNK;
  at::parallel_for(0, segments.size() * num_chunks, 1, [&](int64_t begin, int64_t end) {
    Acc sum[OUTPUT_CHUNK];
    for (int64_t task = begin; task < end; ++task) {
      const Segment& segment = segments[task / num_chunks];
      const int64_t first = task % num_chunks * OUTPUT_CHUNK;
      const int64_t width = std::min(OUTPUT_CHUNK, size - first);
      for (int64_t n = 0; n < segment.num_rows; ++n) {
        T* target = outputs + segment.rows[n] * row_stride + first;
        for (int64_t i = 0; i < width; ++i) {
          sum[i] = static_cast<Acc>(target[i]);
        }
        for (int64_t rank = 0; rank < segment.num_ranks; ++rank) {
          const Acc factor = low[segment.first_low + n * segment.num_ranks + rank];
          const T* weight = weights + (segment.first_rank + rank) * size + first;
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            sum[i] += factor * static_cast<Acc>(weight[i]);
          }
        }
        for (int64_t i = 0; i < width; ++i) {
          target[i] = static_cast<T>(sum[i]);
        }
      }
    }
  });
}

inline void add_lora(Tensor output, const Tensor& input, const Tensor& a, const Tensor& b, const Tensor& rows,
              const Tensor& runs, const Tensor& ranks) {
  TORCH_CHECK(output.stride(-1) == 1 && input.stride(-1) == 1 && a.is_contiguous() && b.is_contiguous(),
              "the last dimension must be contiguous");
  const int64_t* row_data = rows.const_data_ptr<int64_t>();
  const auto run = runs.accessor<int64_t, 2>();
  const auto rank = ranks.accessor<int64_t, 2>();
  std::vector<Segment> segments;
  int64_t num_low = 0;
  for (int64_t n = 0; n < run.size(0); ++n) {
    const int64_t slot = run[n][0], first = run[n][1], num_rows = run[n][2];
    if (slot < rank.size(0) && rank[slot][1] > 0) {
      segments.push_back({row_data + first, num_rows, rank[slot][0], rank[slot][1], num_low});
      num_low += num_rows * rank[slot][1];
    }
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, input.scalar_type(), "add_lora", [&] {
    using Acc = at::opmath_type<scalar_t>;
    std::vector<Acc> low(num_low);
    multiply_a<scalar_t, Acc>(segments, input, a, low.data());
    add_b<scalar_t, Acc>(segments, low.data(), b, output);
  });
}

}  // namespace lorelay
