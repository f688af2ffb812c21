"""Stopping criterion: tolerances, budget, and how often the host reads the residual."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When a solve is good enough: ``||f(z) - z|| <= atol + rtol ||f(z)||`` per sample.

    The norm is Euclidean over all numbers of a sample, so `atol` is in that norm's unit: multiply a tolerance per
    entry by the square root of their number. ``rtol = atol = 0`` means no tolerance: exactly `max_evals` evaluations,
    with no synchronisation between host and device.

    Args:
        rtol: relative tolerance, >= 0.
        atol: absolute tolerance, >= 0.
        max_evals: budget of evaluations of f, >= 1.
        check_every: look at the residual at every k-th evaluation only (and at the last): one device synchronisation
            per look. A sample may then run up to k - 1 evaluations past its tolerance.
        late: read each residual one evaluation after it was computed, when the device has it ready, so that the host
            never waits; a finished sample costs one evaluation more. The answers are the same.
    """

    rtol: float = 1e-4
    atol: float = 1e-6
    max_evals: int = 50
    check_every: int = 1
    late: bool = False

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Stop.{name} must be finite and at least 0, got {getattr(self, name)}.")
        for name in ("max_evals", "check_every"):
            if getattr(self, name) != int(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"Stop.{name} must be a whole number, at least 1, got {getattr(self, name)}.")

    @property
    def has_tolerance(self) -> bool:
        """False when only the budget ends the solve."""
        return self.rtol > 0 or self.atol > 0
