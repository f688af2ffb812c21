"""Budget of a diagnosis: evaluations of f and products with its Jacobian, counted together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from implicit.diagnostics.profiling import Counter
from implicit.pytree import Map, State


class BudgetSpent(Exception):
    """Raised in place of an evaluation or product beyond the budget; no RuntimeError, which solvers may handle."""


@dataclass
class Budget(Counter):
    """A `Counter` with a limit on ``evals + products``."""

    limit: int = 0

    @property
    def remaining(self) -> int:
        """Evaluations and products left."""
        return self.limit - self.evals - self.products

    def evaluation(self) -> None:
        """Count an evaluation of f."""
        self._require(1)
        super().evaluation()

    def product(self) -> None:
        """Count a vector-Jacobian product."""
        self._require(1)
        super().product()

    def charge(self, products: int) -> None:
        """Count products that were made outside of this counter."""
        self._require(products)
        self.products += products

    def _require(self, count: int) -> None:
        if count > self.remaining:
            raise BudgetSpent(f"the budget of {self.limit} evaluations and products is spent")

    def plain(self, f: Map) -> Map:
        """f with its evaluations counted, and nothing put into its graph, so that every kind of derivative works."""

        def counted(z: State, *args: Any) -> State:
            self.evaluation()
            return f(z, *args)

        return counted

    def attempt(self, run: Callable[[], Any]) -> Any:
        """What `run` returns, or None if the budget ends first."""
        try:
            return run()
        except BudgetSpent:
            return None
