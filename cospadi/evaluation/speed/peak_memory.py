"""The memory of one model, in a process of its own: ``python -m cospadi.evaluation.speed.peak_memory JSON``."""

import gc
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cospadi.errors import CospadiError
from cospadi.evaluation.speed.greedy import Run, random_prompt
from cospadi.evaluation.speed.loaded import Loaded, open_loaded


def peak_in_a_process(wanted: Loaded, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Load a model in a new process, run it once and give what memory it took.

    Returns
    -------
    dict
        ``before_bytes``, ``loaded_bytes`` and ``peak_bytes``: resident memory of the process before loading, after it,
        and at the worst moment of the run; on a GPU what torch has allocated there.  ``method`` says how the worst
        moment was found.

    Raises
    ------
    CospadiError
        The process failed.
    """
    job = {"loaded": asdict(wanted), "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    command = [sys.executable, "-m", "cospadi.evaluation.speed.peak_memory", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CospadiError(f"the memory of {wanted.label} in {wanted.dtype} cannot be measured: {said[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_here(job: dict[str, Any]) -> dict[str, Any]:
    """Load and run a model in this process; see ``peak_in_a_process``."""
    wanted = Loaded(**job["loaded"])
    device = torch.device(wanted.device)
    before = _resident(device)
    model = open_loaded(wanted)
    gc.collect()
    loaded = _resident(device)
    method = _forget_peak(device)
    run = Run(model, random_prompt([model], job["prompt_tokens"], job["new_tokens"]))
    run.prefill()
    run.decode(job["new_tokens"])
    return {"before_bytes": before, "loaded_bytes": loaded, "peak_bytes": _peak(device), "method": method}


def _resident(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = _status("VmHWM")
    if found:
        return found
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _forget_peak(device: torch.device) -> str:
    """Begin to look for the worst moment anew, so that loading, which may hold a model twice, does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return "torch.cuda.max_memory_allocated of the run, without loading"
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return "the process's high-water mark, loading included"
    return "the process's high-water mark of the run, without loading"


def _status(key: str) -> int:
    """Read a figure of /proc/self/status, in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


if __name__ == "__main__":
    try:
        print(json.dumps(measure_here(json.loads(sys.argv[1]))))
    except CospadiError as error:
        sys.exit(str(error))
