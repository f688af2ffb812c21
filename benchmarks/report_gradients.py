"""benchmarks/results/gradients.json as Markdown tables and a figure.

python -m benchmarks.report_gradients          prints the tables, writes them into docs/gradients.md, draws the figure
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from implicit.diagnostics.bias_table import HEAD, BiasRow, GradientBias, cells, markdown

RESULT = Path(__file__).parent / "results" / "gradients.json"
PAGE = Path(__file__).parents[1] / "docs" / "gradients.md"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "gradients_benchmark.png"


def tables(result: dict[str, Any]) -> str:
    """One Markdown table per layer, with a line above it that says what it is."""
    parts = []
    for name, found in result["tables"].items():
        fastest, size = min(found["forward milliseconds"].values()), " x ".join(map(str, found["state"]))
        versions = ", ".join(f"{package} {found['versions'][package]}" for package in ("torch", "torchdeq"))
        parts.append(
            f"**{name}**: state {size}, {found['parameters']:,} parameters, "
            f"spectral radius {found['spectral radius']}, fastest forward {fastest:.3g} ms. "
            f"{found['device']}, {versions}, commit {found['commit']}. Truth: {found['truth']}."
        )
        parts.append(markdown(HEAD, [cells(row) for row in rows(found)]))
    return "\n\n".join(parts)


def rows(found: dict[str, Any]) -> list[BiasRow]:
    """The rows of one layer's table."""

    def row(one: dict[str, Any]) -> BiasRow:
        known: dict[str, Any] = {}
        for key in BiasRow.__dataclass_fields__:
            known[key] = math.nan if one[key] is None else one[key]
        return BiasRow(**known)

    return [row(one) for one in found["rows"]]


def draw(result: dict[str, Any], path: Path) -> None:
    """Error against time, one panel per layer."""
    import matplotlib.pyplot as plt

    from implicit import plotting

    figure, axes = plt.subplots(2, 2, figsize=(15, 11), layout="constrained")
    for ax, (name, found) in zip(axes.flat, result["tables"].items(), strict=False):
        good = [row for row in rows(found) if not math.isnan(row.error)]
        sides = {
            "implicit": [row for row in good if not row.name.startswith("torchdeq")],
            "torchdeq": [row for row in good if row.name.startswith("torchdeq")],
        }
        plotting.gradient_bias({who: GradientBias(tuple(side), found["truth"]) for who, side in sides.items()}, ax)
        ax.set_title(f"{name} (spectral radius {found['spectral radius']})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def mark(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks of that name."""
    found = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return found.sub(lambda marks: f"{marks[1]}{text}\n{marks[2]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--out", type=Path, default=FIGURE)
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    print(tables(result))
    PAGE.write_text(mark(PAGE.read_text(), "benchmark", tables(result)))
    draw(result, options.out)


if __name__ == "__main__":
    main()
