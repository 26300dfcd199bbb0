from .auto import explain
from .base import BACKENDS, Backend, Placement
from .sparse_linear import SparseLinear, build_group, install, restore_dense, set_backend, sparse_modules
from .tuning import Tuned, processor_name, reset_tuned, store_tuned, stored_tuned, tuned

__all__ = [
    "BACKENDS",
    "Backend",
    "Placement",
    "SparseLinear",
    "Tuned",
    "build_group",
    "explain",
    "install",
    "processor_name",
    "reset_tuned",
    "restore_dense",
    "set_backend",
    "sparse_modules",
    "store_tuned",
    "stored_tuned",
    "tuned",
]
