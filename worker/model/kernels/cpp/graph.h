// A compiled forward pass. PyTorch's own Python binding would hold the GIL while it runs, and block all other threads.
#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>
#include <torch/custom_class.h>

#include <string>
#include <unordered_map>
#include <vector>

namespace lorelay {

using at::Tensor;

struct CompiledGraph : torch::CustomClassHolder {
  torch::inductor::AOTIModelContainerRunnerCpu runner;

  explicit CompiledGraph(const std::string& library) : runner(library) {}

  // Returns the tensors that the graph reads: name in the graph to path in the exported model.
  c10::Dict<std::string, std::string> tensor_paths() const {
    c10::Dict<std::string, std::string> paths;
    for (const auto& [name, path] : runner.getConstantNamesToOriginalFQNs()) {
      paths.insert(name, path);
    }
    return paths;
  }

  // Sets the tensors that the graph reads; they are not copied.
  void set_tensors(const c10::Dict<std::string, Tensor>& tensors) {
    std::unordered_map<std::string, Tensor> by_name;
    for (const auto& entry : tensors) {
      by_name.emplace(entry.key(), entry.value());
    }
    runner.update_constant_buffer(by_name, /*use_inactive=*/false, /*validate_full_updates=*/true,
                                  /*user_managed=*/true);
  }

  Tensor run(const Tensor& token_ids, const Tensor& positions, const Tensor& sampled_rows) {
    return runner.run({token_ids, positions, sampled_rows}).at(0);
  }
};

}  // namespace lorelay
