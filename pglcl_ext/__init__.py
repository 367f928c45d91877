"""Pseudo-label guided contrastive losses for PyTorch, fused in C++ and CUDA."""

from pglcl_ext import reference
from pglcl_ext._arguments import Side
from pglcl_ext._library import build_info
from pglcl_ext.class_patches import ClassPatches, class_patches
from pglcl_ext.coverage_threshold import CoverageThreshold
from pglcl_ext.embedding_queue import EmbeddingQueue
from pglcl_ext.gaussian_contrast import GaussianContrastLoss, gaussian_contrast_loss
from pglcl_ext.hard_negatives import hard_negative_statistics
from pglcl_ext.patch_contrast import PatchContrastLoss, patch_contrast_loss
from pglcl_ext.patch_embeddings import PatchBatch, PatchRows, patch_embeddings
from pglcl_ext.patch_statistics import PatchStatistics, patch_entropy, patch_statistics
from pglcl_ext.semantic_disparity import semantic_disparity

__all__ = [
    "ClassPatches",
    "CoverageThreshold",
    "EmbeddingQueue",
    "GaussianContrastLoss",
    "PatchBatch",
    "PatchContrastLoss",
    "PatchRows",
    "PatchStatistics",
    "Side",
    "build_info",
    "class_patches",
    "gaussian_contrast_loss",
    "hard_negative_statistics",
    "patch_contrast_loss",
    "patch_embeddings",
    "patch_entropy",
    "patch_statistics",
    "reference",
    "semantic_disparity",
]
