"""Pseudo-label guided contrastive losses for PyTorch, fused in C++ and CUDA."""

from pglcl_ext import reference
from pglcl_ext._library import build_info
from pglcl_ext.patch_contrast import PatchContrastLoss, patch_contrast_loss
from pglcl_ext.patch_statistics import PatchStatistics, patch_entropy, patch_statistics
from pglcl_ext.semantic_disparity import semantic_disparity

__all__ = [
    "PatchContrastLoss",
    "PatchStatistics",
    "build_info",
    "patch_contrast_loss",
    "patch_entropy",
    "patch_statistics",
    "reference",
    "semantic_disparity",
]
