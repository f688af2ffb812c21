"""How the benchmarks measure: CPU or device time in pairs, bytes of tensors alive at once, and where it was."""

import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Peak bytes of the tensors made under it and alive at the same time, each storage once.

    What was there before (weights, their gradients, inputs) is not counted. Backward passes and what checkpointing
    makes anew in them are seen too, as the CPU's backward runs in the thread that called it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._inside: set[int] = set()
        self._outside: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self._inside:
                self._outside.add(t.untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._enter(t.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._inside and key not in self._outside:
            self._inside.add(key)
            self.now += storage.nbytes()
            finalize(storage, self._leave, key, storage.nbytes())

    def _leave(self, key: int, size: int) -> None:
        self._inside.discard(key)
        self.now -= size


def peak_bytes(step: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes that a step adds at its peak to what is there before it: by `Live`, on CUDA by the allocator's count.

    The step runs once before, so that gradients it adds to are there already.
    """
    step()
    gc.collect()
    if device == "cpu":
        with Live() as live:
            step()
        return live.peak
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
    """Seconds of each step, `repeats` times, in turn and in turned order, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for step in steps.values():
        step()  # what is made at the first call alone is not counted
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(steps[name], device))
    return times


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> dict[str, float]:
    """Time of `one` over that of `other`: the median of the pairs and its quartiles, and the ratio of the minima."""
    pairs = [a / b for a, b in zip(times[one], times[other], strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    fastest = min(times[one]) / min(times[other])
    named = {"median": middle, "lower quartile": low, "upper quartile": high, "of minima": fastest}
    return {name: round(value, 3) for name, value in named.items()}


def provenance(device: str, *packages: str) -> dict[str, Any]:
    """Device, versions and commit, as every result file carries them."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    threads = torch.get_num_threads()
    cpu = f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "device": cpu if device == "cpu" else torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", *packages)}},
        "commit": found.stdout.strip() or None,
    }
