"""Entry points for a tree that is not installed, then what there is: versions, GPU, solvers and backends.

    python benchmarks/gpu/environment.py CHECKOUT SITE

SITE is a folder on PYTHONPATH that receives the package's metadata.
"""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tomllib
import torch

from cospadi.backends import BACKENDS
from cospadi.solvers import SOLVERS

PACKAGES = [
    "torch",
    "cupy-cuda13x",
    "numpy",
    "numba",
    "scipy",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "pydantic",
    "array-api-compat",
    "lazy-loader",
    "click",
    "rich",
]


def write_metadata(checkout: Path, site: Path) -> None:
    """Write what an editable installation would leave behind."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = site / f"{project['name']}-{project['version']}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, entries in {"console_scripts": project.get("scripts", {}), **project.get("entry-points", {})}.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()), ""]
    (folder / "entry_points.txt").write_text("\n".join(lines))


def main() -> None:
    """Write the metadata and print the inventory."""
    write_metadata(*map(Path, sys.argv[1:3]))
    importlib.invalidate_caches()
    print("Python", sys.version.split()[0], "CUDA of torch", torch.version.cuda, "GPU", torch.cuda.is_available())
    for name in PACKAGES:
        try:
            print(f"  {name} {version(name)}")
        except PackageNotFoundError:
            print(f"  {name} is not installed")
    for registry in (SOLVERS, BACKENDS):
        for name in registry.names():
            state = registry.availability(name)
            print(f"  {registry.kind} {name}: {'available' if state else state.reason}")


if __name__ == "__main__":
    main()
