// A compiled forward pass. PyTorch's own binding would keep Python's lock (the GIL) for as long as it runs.
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

  // The path in the exported model of each tensor that the graph takes, by its name in the graph.
  c10::Dict<std::string, std::string> tensor_paths() const {
    c10::Dict<std::string, std::string> paths;
    for (const auto& [name, path] : runner.getConstantNamesToOriginalFQNs()) {
      paths.insert(name, path);
    }
    return paths;
  }

  // The graph reads these tensors where they are.
  void set_tensors(const c10::Dict<std::string, Tensor>& tensors) {
    std::unordered_map<std::string, Tensor> by_name;
    for (const auto& entry : tensors) {
      by_name.emplace(entry.key(), entry.value());
    }
    runner.update_constant_buffer(by_name, /*use_inactive=*/false, /*validate_full_updates=*/true,
                                  /*user_managed=*/true);
  }

  Tensor run(const Tensor& token_ids, const Tensor& positions, const Tensor& kept) {
    return runner.run({token_ids, positions, kept}).at(0);
  }
};

}  // namespace lorelay
