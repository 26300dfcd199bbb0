from .base import FORMATS, Format, PackedCoefficients, PackedDictionary
from .bitmask import count_bits, pack_bits, unpack_bits
from .checkpoint import INDEX, MAX_SHARD_BYTES, QUANT_METHOD, SINGLE, CheckpointConfig, ShardWriter, expected_tensors
from .checksums import CHECKSUMS, check_checksums, write_checksums
from .dictionary import (
    dictionary_bits,
    dictionary_dtype_of,
    dictionary_layout,
    dictionary_tensors,
    held_dictionary,
    pack_dictionary,
    unpack_dictionary,
)
from .factorization import GroupSpec, MemberSpec, SparseFactorization
from .headers import StoredTensor, read_header, read_headers
from .packing import group_bits, pack_group, unpack_group
from .quantization import GRIDS, Grid, dequantize, grid_of, quantize, representable_scales
from .values import read_values, round_values
from .verify import check_headers, read_config, verify_checkpoint

__all__ = [
    "CHECKSUMS",
    "FORMATS",
    "GRIDS",
    "INDEX",
    "MAX_SHARD_BYTES",
    "QUANT_METHOD",
    "SINGLE",
    "CheckpointConfig",
    "Format",
    "Grid",
    "GroupSpec",
    "MemberSpec",
    "PackedCoefficients",
    "PackedDictionary",
    "ShardWriter",
    "SparseFactorization",
    "StoredTensor",
    "check_checksums",
    "check_headers",
    "count_bits",
    "dequantize",
    "dictionary_bits",
    "dictionary_dtype_of",
    "dictionary_layout",
    "dictionary_tensors",
    "expected_tensors",
    "grid_of",
    "group_bits",
    "held_dictionary",
    "pack_bits",
    "pack_dictionary",
    "pack_group",
    "quantize",
    "read_config",
    "read_header",
    "read_headers",
    "read_values",
    "representable_scales",
    "round_values",
    "unpack_bits",
    "unpack_dictionary",
    "unpack_group",
    "verify_checkpoint",
    "write_checksums",
]
