// Every op's schema, once, and the pybind11 module. Long lists of arguments are those of ops.h.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa/kernel_table.h"
#include "ops.h"

STABLE_TORCH_LIBRARY(pglcl_ext, m) {
  m.def(
      "patch_statistics(Tensor input, int[] patch_size, int[] stride, bool probabilities, bool normalize) -> "
      "(Tensor entropy, Tensor confidence, Tensor class_entropy)");
  m.def(
      "patch_statistics_backward(Tensor grad_entropy, Tensor grad_confidence, Tensor grad_class_entropy, "
      "Tensor input, Tensor confidence, Tensor class_entropy, int[] patch_size, int[] stride, bool probabilities, "
      "bool normalize) -> Tensor");
  m.def("semantic_disparity(Tensor a, Tensor b) -> Tensor");
  m.def(
      "semantic_disparity_backward(Tensor grad, Tensor a, Tensor b, bool needs_a, bool needs_b) -> "
      "(Tensor grad_a, Tensor grad_b)");
  m.def(
      "disparity_bounds(Tensor descriptors, Tensor labels, Tensor key_descriptors, Tensor key_labels, int count, "
      "bool positives, int ignore_index, int self_offset) -> Tensor");
  // Per anchor the logarithm of the denominator is max_logit + log_sum (natural logarithms, -inf both without a pair);
  // positive_logit is the mean logit of its positives. max_logit is the largest logit, before the weight of negatives,
  // or a number above it: no logit exceeds it but by rounding, so that the backward pass needs no exponent above 0. It
  // is a float64 for every type of embeddings, whose logits may leave the range of float32.
  m.def("patch_contrast(" PGLCL_CONTRAST_SCHEMA
        ") -> (Tensor loss, Tensor max_logit, Tensor log_sum, Tensor positive_logit, Tensor num_positives, "
        "Tensor num_valid)");
  m.def(
      "patch_contrast_backward(Tensor grad, Tensor max_logit, Tensor log_sum, Tensor num_positives, "
      "Tensor num_valid, " PGLCL_CONTRAST_SCHEMA
      ", bool needs_anchors, bool needs_keys) -> (Tensor grad_anchors, Tensor grad_keys)");
  // gradients: d loss_i / d anchor_i, which the pass over the classes gives with the loss; empty unless asked for.
  m.def("gaussian_contrast(" PGLCL_GAUSSIAN_SCHEMA ") -> (Tensor loss, Tensor gradients, Tensor num_valid)");
  m.def(
      "gaussian_contrast_backward(Tensor grad, Tensor anchors, Tensor gradients, Tensor num_valid, int reduction) -> "
      "Tensor");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of pglcl_ext; importing it registers them as torch.ops.pglcl_ext.";
  m.def("cpu_instruction_set", [] { return pglcl::kernel_table().name; });
  pybind11::list names;
  for (int level = 0; pglcl::instruction_set(level); ++level) names.append(pglcl::instruction_set(level));
  m.attr("INSTRUCTION_SETS") = pybind11::tuple(names);
  pglcl::kernel_table();  // an unknown PGLCL_CPU_ISA ends the import
}
