// The kernels of a forward pass on the CPU, which eager forward passes and compiled graphs call. native.py builds them
// and describes their arguments.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "attention.h"
#include "graph.h"
#include "lora.h"

namespace lorelay {
namespace {

struct FusedLinears {  // Linears that read the same rows and are computed as one matmul
  std::vector<int64_t> sizes;  // each Linear's number of outputs
  Tensor weight;
  std::optional<Tensor> bias;
  bool is_packed = false, sees_sampled_rows = false;
};

struct Adapters {
  Tensor a, b, ranks;  // all adapters of a Linear, stacked; undefined while it has none
};

struct AdapterRows {
  Tensor index, runs;  // arguments of add_lora
  Tensor long_spans;   // (n, 3): slot, first row, number of rows
  bool is_empty() const { return !runs.defined() || (runs.size(0) == 0 && long_spans.size(0) == 0); }
};

// Inputs that the kernels do not get as arguments: with such arguments, a compiled graph would be valid only for
// certain adapters and sequences.
struct KernelState : torch::CustomClassHolder {
  std::vector<FusedLinears> fused;  // indexed by the number of their first Linear
  std::vector<Adapters> adapters;   // indexed by the number of the Linear
  std::vector<std::pair<Tensor, Tensor>> caches;
  AdapterRows token_rows, sampled_rows;
  AttentionMetadata metadata;

  void set_linears(int64_t number, std::vector<int64_t> sizes, Tensor weight, std::optional<Tensor> bias,
                   bool is_packed, bool sees_sampled_rows) {
    const size_t end = std::max<size_t>(adapters.size(), number + sizes.size());
    fused.resize(end), adapters.resize(end);
    fused[number] = {std::move(sizes), std::move(weight), std::move(bias), is_packed, sees_sampled_rows};
  }

  void set_adapters(int64_t number, Tensor a, Tensor b, Tensor ranks) {
    adapters.at(number) = {std::move(a), std::move(b), std::move(ranks)};
  }

  void set_cache(int64_t layer, Tensor keys, Tensor values) {
    caches.resize(std::max<size_t>(caches.size(), layer + 1));
    caches[layer] = {std::move(keys), std::move(values)};
  }

  void set_adapter_rows(bool sampled, Tensor index, Tensor runs, Tensor long_spans) {
    (sampled ? sampled_rows : token_rows) = {std::move(index), std::move(runs), std::move(long_spans)};
  }
};

// The state of this thread's forward pass; thread-local, because calls in a compiled graph have no argument for it.
thread_local c10::weak_intrusive_ptr<KernelState> current{c10::intrusive_ptr<KernelState>()};

void begin_step(const c10::intrusive_ptr<KernelState>& state, Tensor cache_indices, Tensor rows,
                Tensor tables, Tensor positions, Tensor chunks, std::vector<Tensor> chunk_tables) {
  state->metadata = {std::move(cache_indices), std::move(rows),   std::move(tables),
                   std::move(positions),     std::move(chunks), std::move(chunk_tables)};
  current = c10::weak_intrusive_ptr<KernelState>(state);
}

c10::intrusive_ptr<KernelState> current_state() {
  c10::intrusive_ptr<KernelState> state = current.lock();
  TORCH_CHECK(state, "a kernel of Lorelay was called outside of a step");
  return state;
}

Tensor multiply_packed(const Tensor& rows, const FusedLinears& linears) {
  using Scalars = c10::List<std::optional<at::Scalar>>;
  static const auto multiply =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view, Scalars,
                        std::optional<std::string_view>)>();
  return multiply.call(rows, linears.weight, linears.bias, "none", Scalars(), "");
}

void add_to_long_spans(const Tensor& output, const Tensor& input, const Adapters& adapters,
                       const Tensor& long_spans) {
  const auto span = long_spans.accessor<int64_t, 2>();
  const auto rank = adapters.ranks.accessor<int64_t, 2>();
  for (int64_t n = 0; n < span.size(0); ++n) {
    const int64_t slot = span[n][0];
    if (slot < rank.size(0) && rank[slot][1] > 0) {
      const Tensor a = adapters.a.narrow(0, rank[slot][0], rank[slot][1]);
      const Tensor b = adapters.b.narrow(0, rank[slot][0], rank[slot][1]);
      Tensor part = output.narrow(0, span[n][1], span[n][2]);
      part.add_(at::mm(at::mm(input.narrow(0, span[n][1], span[n][2]), a.t()), b));
    }
  }
}

Tensor linear(const Tensor& rows, int64_t number, int64_t /* num_outputs, which only compile_graph.py reads */) {
  const auto state = current_state();
  const FusedLinears& linears = state->fused.at(number);
  Tensor output = linears.is_packed ? multiply_packed(rows, linears) : at::linear(rows, linears.weight, linears.bias);
  const AdapterRows& owners = linears.sees_sampled_rows ? state->sampled_rows : state->token_rows;
  if (owners.is_empty()) {
    return output;
  }
  const Tensor x = rows.reshape({-1, rows.size(-1)});
  int64_t first = 0;
  for (const int64_t size : linears.sizes) {
    const Adapters& adapters = state->adapters[number++];
    if (adapters.a.defined()) {
      const Tensor y = output.view({-1, output.size(-1)}).narrow(1, first, size);
      add_to_long_spans(y, x, adapters, owners.long_spans);
      add_lora(y, x, adapters.a, adapters.b, owners.index, owners.runs, adapters.ranks);
    }
    first += size;
  }
  return output;
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& sinks,
                 int64_t layer, double scaling, std::optional<int64_t> window, std::optional<double> softcap) {
  const auto state = current_state();
  const bool has_cache = layer < static_cast<int64_t>(state->caches.size()) && state->caches[layer].first.defined();
  if (!has_cache || sinks || softcap) {
    static const auto attend = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("lorelay::attend_in_groups", "")
                                   .typed<decltype(attention)>();
    return attend.call(query, key, value, sinks, layer, scaling, window, softcap);
  }
  const auto& [keys, values] = state->caches[layer];
  return paged_attention(query[0], key[0], value[0], keys, values, state->metadata, scaling, window.value_or(0))
      .unsqueeze(0);
}

}  // namespace
}  // namespace lorelay

TORCH_LIBRARY(lorelay, library) {
  using lorelay::CompiledGraph;
  using lorelay::KernelState;
  library.class_<KernelState>("KernelState")
      .def(torch::init<>())
      .def("set_linears", &KernelState::set_linears)
      .def("set_adapters", &KernelState::set_adapters)
      .def("set_cache", &KernelState::set_cache)
      .def("set_adapter_rows", &KernelState::set_adapter_rows)
      .def("begin_step", &lorelay::begin_step);
  library.class_<CompiledGraph>("CompiledGraph")
      .def(torch::init<std::string>())
      .def("tensor_paths", &CompiledGraph::tensor_paths)
      .def("set_tensors", &CompiledGraph::set_tensors)
      .def("run", &CompiledGraph::run);
  library.def("linear(Tensor rows, int number, int num_outputs) -> Tensor");
  library.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? sinks, int layer, float scaling, int? window, "
      "float? softcap) -> Tensor");
  library.def(
      "attend_in_groups(Tensor query, Tensor key, Tensor value, Tensor? sinks, int layer, float scaling, "
      "int? window, float? softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(lorelay, CPU, library) {
  library.impl("linear", &lorelay::linear);
  library.impl("attention", &lorelay::attention);
}
