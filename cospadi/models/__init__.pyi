from .config_check import errors_in_one_line, refuse_absurd_counts
from .dense_model import OpenModel, make_skeleton, model_class, open_model, read_config, read_tokenizer
from .embedded import embedded_model
from .experts import fuse_experts, split_experts
from .groups import Group, form_groups, in_order
from .host_memory import BATCH, LIBRARIES, gib, keep_small_heap, loading_bytes, outside_bytes, resident_bytes, trim_heap
from .layers import Layer, ModelMap, find_blocks, is_linear, map_model, weight_matrix
from .residency import Residency
from .weights import FolderWeights, Weights

__all__ = [
    "BATCH",
    "LIBRARIES",
    "FolderWeights",
    "Group",
    "Layer",
    "ModelMap",
    "OpenModel",
    "Residency",
    "Weights",
    "embedded_model",
    "errors_in_one_line",
    "find_blocks",
    "form_groups",
    "fuse_experts",
    "gib",
    "in_order",
    "is_linear",
    "keep_small_heap",
    "loading_bytes",
    "make_skeleton",
    "map_model",
    "model_class",
    "open_model",
    "outside_bytes",
    "read_config",
    "read_tokenizer",
    "refuse_absurd_counts",
    "resident_bytes",
    "split_experts",
    "trim_heap",
    "weight_matrix",
]
