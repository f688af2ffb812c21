"""Shapes and types that `implicit` declares are checked at run time in the files of SHAPES_CHECKED, which call every
solver, estimator and diagnostic. CHECK_TYPES=1 checks them in all tests, CHECK_TYPES=0 in none.

All tests run on one thread, and so do the processes they start: sums are then the same to the last bit everywhere.
"""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests import shape_checks

SHAPES_CHECKED = {
    *("test_small_matrices.py", "test_solvers_of_others.py", "test_shine.py", "test_stochastic_jfb.py"),
    *("test_adjoint_solve.py", "test_gmres.py", "test_anderson.py", "test_broyden.py", "test_api.py"),
    *("test_best_iterates.py", "test_deq.py", "test_iterate.py", "test_plotting.py", "test_problem_forms.py"),
    *("test_starts.py", "test_states.py", "test_shape_checks.py"),
}
CHECK_TYPES = os.environ.get("CHECK_TYPES")

torch.set_num_threads(1)
if CHECK_TYPES != "0":
    shape_checks.install("implicit")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    shape_checks.turn_on(CHECK_TYPES == "1" or item.path.name in SHAPES_CHECKED)


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests stay in memory: garbage collections leave them out
