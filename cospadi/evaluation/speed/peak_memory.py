"""The memory of one model, in a process of its own: ``python -m cospadi.evaluation.speed.peak_memory JSON``."""

import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cospadi.errors import CospadiError
from cospadi.evaluation.speed.greedy_decoding import Run, random_prompt
from cospadi.evaluation.speed.model_variants import ModelVariant, load_variant
from cospadi.models import resident_bytes


@dataclass(frozen=True)
class PeakMemory:
    """The memory of one model.

    Attributes
    ----------
    before_bytes, loaded_bytes, peak_bytes : int
        Resident memory of the process before loading, after it, and at the worst moment of the run; on a GPU what torch
        has allocated there.
    method : str
        How the worst moment was found.
    """

    before_bytes: int
    loaded_bytes: int
    peak_bytes: int
    method: str


def peak_in_a_process(wanted: ModelVariant, prompt_tokens: int, new_tokens: int) -> PeakMemory:
    """Load a model in a new process, run it once and give the memory that it took.

    Raises
    ------
    CospadiError
        The process failed.
    """
    arguments = json.dumps([asdict(wanted), prompt_tokens, new_tokens])
    command = [sys.executable, "-m", "cospadi.evaluation.speed.peak_memory", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CospadiError(f"the memory of {wanted.label} in {wanted.dtype} cannot be measured: {said[-1]}")
    return PeakMemory(**json.loads(done.stdout.strip().splitlines()[-1]))


def peak_here(wanted: ModelVariant, prompt_tokens: int, new_tokens: int) -> PeakMemory:
    """Load and run a model in this process; see ``peak_in_a_process``."""
    device = torch.device(wanted.device)
    before = _resident(device)
    model = load_variant(wanted)
    gc.collect()
    loaded = _resident(device)
    method = _forget_peak(device)
    run = Run(model, random_prompt([model], prompt_tokens, new_tokens))
    run.prefill()
    run.decode(new_tokens)
    return PeakMemory(before, loaded, _peak(device), method)


def _resident(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resident_bytes() or _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="ascii").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):  # unlike the figure of getrusage, it can be reset
            return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _forget_peak(device: torch.device) -> str:
    """Reset the high-water mark after loading, which may hold a model twice; give the method in words."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return "torch.cuda.max_memory_allocated of the run, without loading"
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return "the process's high-water mark, loading included"
    return "the process's high-water mark of the run, without loading"


if __name__ == "__main__":
    variant, *tokens = json.loads(sys.argv[1])
    try:
        print(json.dumps(asdict(peak_here(ModelVariant(**variant), *tokens))))
    except CospadiError as error:
        sys.exit(str(error))
