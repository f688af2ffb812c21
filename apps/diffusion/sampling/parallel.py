"""Parallel-in-time sampling: the trajectory as one fixed point, all timesteps evaluated at once.

Sampling is x_{k+1} = s_k(x_k) for k = 0 ... K - 1, from the noise x_0 to the image x_K, with the noise of every step
drawn in advance. For any scalars a_k the trajectory X = (x_1 ... x_K) is the only solution of X = F(X),

    F_{k+1} = a_k F_k + (s_k(x_k) - a_k x_k),     F_0 = x_0

F_k depends on x_1 ... x_{k-1} only, so j rounds of the Picard iteration X <- F(X) make x_1 ... x_j exact, and K rounds
make X exact. To meet a tolerance, far fewer rounds are enough. a_k = 1 is ParaDiGMS (Shih et al. 2023, arXiv
2305.16317); here a_k is the derivative of s_k in x at a fixed prediction, as in ParaTAA (Tang et al. 2024, arXiv
2402.09970, the system of order K).

Triangular Anderson acceleration (ParaTAA, section 3.2) mixes the last rounds with weights for each timestep:

    F_k - dF_k gamma_k,     gamma_k = argmin sum_{i <= k} || r_i - dR_i gamma ||^2,     r = F(X) - X

with dF and dR the differences of successive rounds. The new x_k then depends on x_1 ... x_k only, as in the Picard
iteration. In round j the timesteps up to j are not mixed: their F_k is exact, as after j Picard rounds, and a mixture
with earlier rounds is not.

Shapes: X (B, K, C, H, W), a system for each sample; solvers see (B, K N) with N = C H W.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apps.diffusion.schedulers.reverse_step import Reverse
from implicit import AbstractSolver, Picard, Stop, iterate

Predict = Callable[[range, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Options of parallel-in-time sampling.

    Args:
        solver: "picard", or "anderson" for triangular Anderson acceleration.
        rtol: ||F(X) - X|| / ||F(X)|| at which a sample's trajectory has converged.
        window: number of timesteps solved for at once; windows are solved one after another. None: all timesteps.
        memory: number of differences that Anderson acceleration mixes.

    Raises:
        ValueError: a value out of range.
    """

    solver: Literal["picard", "anderson"] = "picard"
    rtol: float = 1e-3
    window: int | None = None
    memory: int = 3

    def __post_init__(self) -> None:
        if self.solver not in ("picard", "anderson"):
            raise ValueError(f"Parallel.solver={self.solver!r} is unknown; choose picard or anderson.")
        if not 0 < self.rtol < 1:
            raise ValueError(
                f"Parallel.rtol={self.rtol} must lie between 0 and 1; 1e-3 gives the images of sequential sampling."
            )
        for name in ("window", "memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Parallel.{name}={value} must be at least 1.")

    def solve(
        self, predict: Predict, reverse: Reverse, x0: Float[Tensor, "B C H W"], noise: Float[Tensor, "B K C H W"]
    ) -> Float[Tensor, "B C H W"]:
        """The image x_K.

        Args:
            predict: function (range of n timestep numbers, x (B, n, C, H, W) at these timesteps) -> predictions (B, n,
                C_out, H, W); each call is one round.
            reverse: the steps of a scheduler whose step is a function of x and the prediction.
            x0: the noisiest x.
            noise: standard normal noise of every step.

        Raises:
            ValueError: the scheduler carries a state from step to step.
        """
        if not reverse.closed_form:
            raise ValueError(
                f"{type(reverse.scheduler).__name__} carries a state from step to step, so its timesteps cannot be "
                "solved for in parallel; use ddim, ddpm or flow."
            )
        steps = len(reverse.timesteps)
        window = min(self.window or steps, steps)
        for first in range(0, steps, window):
            x0 = self._window(predict, reverse, range(first, min(first + window, steps)), x0, noise)
        return x0

    def _window(self, predict: Predict, reverse: Reverse, ks: range, x0: Tensor, noise: Tensor) -> Tensor:
        """x after the last timestep of `ks`, given x0 at the first timestep."""

        def trajectory(x: Tensor) -> Tensor:
            before = torch.cat([x0.unsqueeze(1), x[:, :-1]], dim=1)
            predictions = predict(ks, before)
            out, end = [], x0
            for i, k in enumerate(ks):
                step = reverse.step_with(k, predictions[:, i], before[:, i], noise[:, k])
                end = step + reverse.gain(k) * (end - before[:, i])
                out.append(end)
            return torch.stack(out, dim=1)

        solver = Picard() if self.solver == "picard" else TriangularAnderson(len(ks), self.memory)
        start = x0.unsqueeze(1).expand(-1, len(ks), *x0.shape[1:]).contiguous()
        # after len(ks) Picard rounds the trajectory is exact; one more round measures its residual
        stop = Stop(rtol=self.rtol, atol=0.0, max_evals=len(ks) + 1)
        return iterate(trajectory, start, solver, stop).value[:, -1]


@dataclass(frozen=True)
class _TriangularState:
    """F and r of the last round, and a ring buffer with the differences of the last M rounds."""

    f: Float[Tensor, "B K N"]
    r: Float[Tensor, "B K N"]
    df: Float[Tensor, "B M K N"]
    dr: Float[Tensor, "B M K N"]
    rounds: int = 0


@dataclass(frozen=True)
class TriangularAnderson(AbstractSolver[_TriangularState]):
    """Anderson acceleration whose weights at each timestep depend on this timestep and earlier timesteps only.

    Args:
        timesteps: K; the state of a sample is K vectors in one row.
        memory: number of differences that are mixed.
        ridge: ridge of the least squares problem, relative to the diagonal of the normal equations.
    """

    timesteps: int
    memory: int = 3
    ridge: float = 1e-6

    def init(self, point: Any) -> _TriangularState:
        f, r = self._rows(point.fz), self._rows(point.r)
        empty = f.new_zeros(len(f), self.memory, *f.shape[1:])
        return _TriangularState(f, r, empty, empty.clone())

    def step(self, point: Any, state: _TriangularState) -> tuple[Tensor, None, _TriangularState]:
        f, r = self._rows(point.fz), self._rows(point.r)
        if not state.rounds:
            return point.fz, None, replace(state, f=f, r=r, rounds=1)
        # the newest differences replace the oldest
        slot = (state.rounds - 1) % self.memory
        df, dr = state.df.clone(), state.dr.clone()
        df[:, slot], dr[:, slot] = f - state.f, r - state.r
        # normal equations of timestep k: sums over the timesteps i <= k
        gram = torch.einsum("bikn,bjkn->bkij", dr, dr).cumsum(1)
        rhs = torch.einsum("bikn,bkn->bki", dr, r).cumsum(1)
        diagonal = gram.diagonal(dim1=2, dim2=3)
        unused = diagonal <= torch.finfo(f.dtype).tiny
        gram = gram + torch.diag_embed((self.ridge * diagonal).masked_fill(unused, 1))
        gamma = torch.linalg.solve(gram, rhs.unsqueeze(3)).squeeze(3)
        z = f - torch.einsum("bki,bikn->bkn", gamma, df)
        exact = state.rounds + 1  # F_1 ... F_j of round j depend on exact timesteps only
        z[:, :exact] = f[:, :exact]
        return z.flatten(1), None, replace(state, f=f, r=r, df=df, dr=dr, rounds=state.rounds + 1)

    def _rows(self, flat: Tensor) -> Tensor:
        return flat.unflatten(1, (self.timesteps, -1))
