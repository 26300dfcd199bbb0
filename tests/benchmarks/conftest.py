import sys
from pathlib import Path

# Benchmarks are scripts that find each other beside themselves.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
