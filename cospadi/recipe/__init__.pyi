from .options import CalibrationConfig, CompressionConfig, read_limit, read_recipe
from .resources import Execution, parse_size

__all__ = ["CalibrationConfig", "CompressionConfig", "Execution", "parse_size", "read_limit", "read_recipe"]
