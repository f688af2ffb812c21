"""Residuals for the user: callback, progress bar and trace."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch

from implicit.options import Fold, SolveOptions
from implicit.pytree import Layout, to_device
from implicit.stopping import Stop

Report: TypeAlias = Callable[[int, np.ndarray], None]
"""(number of evaluations, (B,) residuals, NaN where a sample has finished)."""


@contextmanager
def progress_callback(options: SolveOptions, stop: Stop) -> Iterator[Report | None]:
    """The function that is called with residuals when they are read; None without trace, callback and progress bar."""
    if not options.observed:
        yield None
        return
    with ExitStack() as stack:
        bar = None
        if options.progress:
            from tqdm.auto import tqdm

            bar = stack.enter_context(tqdm(total=stop.max_evals, unit="eval", leave=False))

        def callback(calls: int, residual: np.ndarray) -> None:
            if bar is not None:
                running = residual[~np.isnan(residual)]
                bar.update(calls - bar.n)
                bar.set_postfix(running=len(running), residual=f"{running.max(initial=0.0):.1e}", refresh=False)
            if options.callback is not None:
                options.callback(calls, torch.from_numpy(residual.copy()))

        yield callback


def recorded(fold: Fold | None, residuals: list[np.ndarray], layout: Layout, options: SolveOptions) -> Any:
    """`Solution.trace`: the residuals of all evaluations, the last carry of a fold, or None."""
    if fold is not None:
        return fold.carry
    return to_device(np.stack(residuals), layout.device, layout.dtype) if options.trace else None
