"""pytest benchmarks: one thread, no GPU rows without a GPU, and the comparison tables at the end."""

from collections import defaultdict
from typing import Any

import pytest
import torch

from benchmarks.report.formatting import table


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the GPU rows if there is no CUDA device."""
    if torch.cuda.is_available():
        return
    rows = [item for item in items if item.get_closest_marker("gpu")]
    if rows:
        config.hook.pytest_deselected(items=rows)
        items[:] = [item for item in items if item not in rows]
    config.stash[LEFT_OUT] = len(rows)


LEFT_OUT = pytest.StashKey[int]()


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints a table for each group: the fastest time of each row, its ratio to the fastest row, and `extra_info`."""
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, list[Any]] = defaultdict(list)
    for row in session.benchmarks if session else []:
        if row.stats.data:
            groups[row.group or row.name].append(row)
    for group, rows in groups.items():
        rows.sort(key=lambda row: row.stats.min)
        counted = list(dict.fromkeys(key for row in rows for key in row.extra_info))
        lines = [
            [
                row.name,
                f"{1e3 * row.stats.min:.2f}",
                f"{row.stats.min / rows[0].stats.min:.2f}",
                *(_cell(row.extra_info.get(key)) for key in counted),
            ]
            for row in rows
        ]
        terminalreporter.write_line(f"\n{group}")
        terminalreporter.write_line(table(["", "ms", "ratio", *counted], lines))
    if config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"\n{config.stash[LEFT_OUT]} rows need a CUDA device and were left out.")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
