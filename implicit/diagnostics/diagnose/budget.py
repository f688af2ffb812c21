"""Budget of a diagnosis: evaluations of f and products with its Jacobian, counted together."""

from dataclasses import dataclass
from typing import Any

from implicit.diagnostics.profiling import Counter
from implicit.pytree import Map, State


class BudgetSpent(Exception):
    """Raised in place of an evaluation or product beyond the budget; not a RuntimeError, which solvers may catch."""


@dataclass
class Budget(Counter):
    """A `Counter` with a limit on ``evals + products``."""

    limit: int = 0

    @property
    def remaining(self) -> int:
        """Evaluations and products left."""
        return self.limit - self.evals - self.products

    def count(self, evals: int = 0, products: int = 0) -> None:
        """Count evaluations of f and products.

        Raises:
            BudgetSpent: the budget has fewer left.
        """
        if evals + products > self.remaining:
            raise BudgetSpent(f"the budget of {self.limit} evaluations and products is spent")
        super().count(evals, products)

    def plain(self, f: Map) -> Map:
        """f with its evaluations counted and without a node in its graph, so that every kind of derivative works."""

        def counted(z: State, *args: Any) -> State:
            self.count(evals=1)
            return f(z, *args)

        return counted
