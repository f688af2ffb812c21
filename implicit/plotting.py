"""Pictures of solves. matplotlib is imported when a function is called."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from implicit.solution import Solution

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def convergence(solutions: Mapping[str, Solution], ax: "Axes | None" = None, *, relative: bool = False) -> "Axes":
    """Residual against evaluations, one line per solver: the worst sample still running.

    Args:
        solutions: label -> solution of a solve with ``trace=True``.
        ax: where to draw; default a new figure.
        relative: divide by the first residual.

    Raises:
        ValueError: a solution has no trace.
    """
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, solution in solutions.items():
        if solution.trace is None:
            raise ValueError(f"The solution {label!r} has no trace: solve with trace=True.")
        worst = solution.trace.detach().nan_to_num(nan=-torch.inf).amax(dim=1).cpu()
        worst = worst / worst[0] if relative else worst
        ax.semilogy(range(1, len(worst) + 1), worst.tolist(), label=label)
    ax.set_xlabel("evaluations of f")
    ax.set_ylabel("residual ||f(z) - z||" + (" / first" if relative else ""))
    ax.grid(True, which="major", alpha=0.3)
    ax.legend()
    return ax
