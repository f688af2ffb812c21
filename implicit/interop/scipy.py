"""scipy's root finders for z = f(z), a reference on the CPU.

Every sample is solved by itself, as g(z) = f(z) - z = 0, and scipy computes in float64.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import numpy as np
import torch
from scipy import optimize

from implicit.evaluation import FlatMap
from implicit.pytree import Layout, Map, State, norm, to_device, to_host
from implicit.solution import Solution
from implicit.stopping import Stop, classify, require_tolerance_alone

# scipy declares no types; without the cast, pyright infers that of the result from all solvers, for half a minute
_root = cast(Callable[..., Any], optimize.root)


def root(f: Map, z0: State, *args: Any, method: str = "hybr", stop: Stop = Stop(), **options: Any) -> Solution:
    """Solve z = f(z, *args) with ``scipy.optimize.root``; no gradient.

    Args:
        f: the map. Each sample is solved by itself, so tensors in `args` must not have one row per sample.
        z0: the starting state, as for `fixed_point`.
        method: name of scipy's method: "hybr", "krylov", "broyden1", "broyden2", "anderson", "df-sane", ...
        stop: criterion tested at scipy's answer; the search of a sample ends after `max_evals` evaluations.
        options: passed to scipy as its ``options``; scipy refuses unknown names.

    Raises:
        ValueError: `fixed_point` would refuse f or z0, or `stop` has a norm or a test that is not used here.
    """
    require_tolerance_alone(stop, "interop.scipy.root")
    layout = Layout.of(z0)
    packed = layout.pack(z0)
    options = {**_difference_step(method, layout.eps), **options}
    rows, evals = [], []
    for b in range(packed.shape[0]):
        row, calls = _one(FlatMap(f, args, layout, stop.max_evals), packed[b : b + 1], method, options)
        rows.append(row)
        evals.append(calls)
    value = torch.cat(rows)
    with torch.no_grad():
        fz = torch.cat([FlatMap(f, args, layout)(row) for row in rows])
    residual = norm(fz - value)
    result = classify(to_host(residual), stop.atol + stop.rtol * to_host(norm(fz)))
    return Solution(
        value=layout.unpack(value),
        residual=residual,
        result=to_device(result, layout.device),
        evals=torch.tensor(evals, device=layout.device),
    )


def _difference_step(method: str, eps: float) -> dict[str, Any]:
    """Option that sets the step of finite differences for a map with rounding errors `eps`; scipy assumes float64."""
    if eps < 1e-12:
        return {}
    if method in ("hybr", "lm"):
        return {"eps": eps}
    return {"jac_options": {"rdiff": eps**0.5}} if method == "krylov" else {}


class _Spent(Exception):
    """The budget of evaluations is used up."""


def _one(f: FlatMap, z0: torch.Tensor, method: str, options: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """(the z of smallest residual that scipy evaluated for one sample, number of evaluations)."""
    best, smallest = z0, np.inf

    def g(x: np.ndarray) -> np.ndarray:
        nonlocal best, smallest
        if f.remaining <= 0:
            raise _Spent
        z = torch.from_numpy(x.astype(np.float64)).to(z0.device, z0.dtype).reshape(z0.shape)
        with torch.no_grad():
            r = (f(z) - z).cpu().double().numpy().ravel()
        if np.linalg.norm(r) < smallest:
            best, smallest = z, np.linalg.norm(r)
        return r

    with suppress(_Spent):
        _root(g, z0.cpu().double().numpy().ravel(), method=method, options=options)
    return best, f.calls
