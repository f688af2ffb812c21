"""benchmarks/results/gradients.json as Markdown tables and a figure.

python -m benchmarks.report.gradients          prints the tables, writes them into docs/gradients.md, draws the figure
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from implicit.diagnostics.gradient_bias import HEAD, BiasRow, cells, markdown

RESULT = Path(__file__).parents[1] / "results" / "gradients.json"
PAGE = Path(__file__).parents[2] / "docs" / "gradients.md"
FIGURE = Path(__file__).parents[2] / "docs" / "images" / "gradients_benchmark.png"


def tables(result: dict[str, Any]) -> str:
    """A Markdown table for each layer, under a line with the layer's size, spectral radius and provenance."""
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
    """Error by time, with a panel for each layer and a marker for each contender (ours filled, torchdeq's open)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 9), layout="constrained", sharey=True)
    layers = {name: rows(found) for name, found in result["tables"].items()}
    names = list(dict.fromkeys(row.name for found in layers.values() for row in found))
    theirs = [name for name in names if name.startswith("torchdeq")]
    signs = {name: _sign(i, ours=True) for i, name in enumerate(n for n in names if n not in theirs)}
    signs |= {name: _sign(i, ours=False) for i, name in enumerate(theirs)}
    for ax, (name, found) in zip(axes.flat, layers.items(), strict=False):
        for row in found:
            if not math.isnan(row.error):
                ax.loglog(row.time, row.error, linestyle="none", markersize=8, **signs[row.name])
        ax.set_title(f"{name} (spectral radius {result['tables'][name]['spectral radius']})", fontsize=11)
        ax.grid(alpha=0.3)
        ax.set_xlabel("time of forward and backward / forward")
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error of the gradient")
    for name, sign in signs.items():
        axes[0, 0].plot([], [], linestyle="none", markersize=8, label=name, **sign)
    figure.legend(loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _sign(i: int, ours: bool) -> dict[str, Any]:
    """Color and marker of the i-th contender of `implicit` (`ours`) or of torchdeq."""
    color = f"C{i % 10}" if ours else "black"
    marker = "osD^vPXp*h<>"[i % 12]
    return {"color": color, "marker": marker, "markerfacecolor": color if ours else "none", "alpha": 0.8}


def mark(page: str, name: str, text: str) -> str:
    """The page with `text` between the two marks of this name."""
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
