"""Measurements of all benchmarks: times in pairs, peak memory, operator counts, and provenance.

Times are compared as ratios of runs that alternate in one process, so that a change of the machine's speed affects
both.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from implicit.diagnostics.profiling import Bytes as MemoryTracker

RESULTS = Path(__file__).parent / "results"
VIEWS = frozenset(
    "view unsqueeze squeeze select slice transpose t expand detach _unsafe_view alias as_strided permute unbind "
    "diagonal split split_with_sizes lift_fresh".split()
)
"""Operators that move no data."""


class OperatorCounter(TorchDispatchMode):
    """Counts the operators called in its context, without views, and the bytes of all tensors they take and return."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in VIEWS:
            self.count += 1
            tensors = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def peak_bytes(step: Callable[[], Any], device: str = "cpu") -> int:
    """Peak bytes that a step allocates in addition to those in use before the step; on CUDA by the allocator's count.

    The step runs once before the measurement, so that the tensors of gradients exist.
    """
    step()
    gc.collect()
    if device == "cpu":
        with MemoryTracker() as memory:
            step()
        return memory.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def seconds(step: Callable[[], Any], device: str = "cpu") -> float:
    """CPU time of this process for one step; on CUDA the time until the device has finished."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(steps: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each step in `repeats` rounds. In a round every step runs once; the order rotates between rounds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for step in steps.values():
        step()  # warm-up: allocations of the first call are not timed
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(steps[name], device))
    return times


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> dict[str, float]:
    """Time of `one` divided by time of `other`: median and quartiles of the pairs, and the ratio of the minima."""
    pairs = [a / b for a, b in zip(times[one], times[other], strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    fastest = min(times[one]) / min(times[other])
    named = {"median": middle, "lower quartile": low, "upper quartile": high, "of minima": fastest}
    return {name: round(value, 3) for name, value in named.items()}


def provenance(device: str, *packages: str) -> dict[str, Any]:
    """Device, versions and commit, for a result file."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    threads = torch.get_num_threads()
    cpu = f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "device": cpu if device == "cpu" else torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", *packages)}},
        "commit": found.stdout.strip() or None,
    }


def processor() -> str:
    """Name and number of this machine's processors."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {named[0] if named else platform.machine()}"


def gpu_options(description: str | None, out: Path, repeats: int, arguments: list[str] | None) -> argparse.Namespace:
    """The options `out` and `repeats` of a benchmark of a CUDA device, which ends with a sentence without one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="result file")
    parser.add_argument("--repeats", type=int, default=repeats, help="number of timed runs, the median of which counts")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device, and there is none here.")
    return options


def read_result(path: Path) -> dict[str, Any]:
    """The content of a result file; empty if the file does not exist.

    Raises:
        SystemExit: the file is damaged, or is no result file.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise SystemExit(
            f"{path} is damaged ({error}): restore it, or delete it so that the report says 'not measured'."
        ) from None
    if not isinstance(found, dict):
        raise SystemExit(f"{path} is no result file: restore it, or delete it so that the report says 'not measured'.")
    return found


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
