"""FPDM against DiT at equal training time and equal sampling budgets."""

from pathlib import Path

from benchmarks import figures
from benchmarks.studies.sampling import BUDGETS

from .records import Study
from .wording import NOTHING, table, told, verdict


def chapter(results: Path, images: Path) -> str:
    study = Study(results, "sampling")
    rows, lines, curves = [], [], {}
    for kind in ("block passes", "MACs"):
        prefix = {b: f"{b} block passes," if kind == "block passes" else f"MACs of {b} blocks," for b in BUDGETS}
        for budget in BUDGETS:
            plain = study.values("DiT", f"{budget} block passes, {budget // 6} steps", "frechet")
            ways = [way for way in study.ways("FPDM") if way.startswith(prefix[budget])]
            best = min(ways, key=lambda way: study.mean("FPDM", way, "frechet") or 1e9, default=None)
            ours = study.values("FPDM", best, "frechet") if best else []
            split = best.rsplit(", ", 1)[1] if best else NOTHING
            rows.append((f"{prefix[budget][:-1]}", told(ours), split, told(plain), f"{budget // 6} steps"))
            lines.append("- " + verdict(f"FPDM beats DiT at {prefix[budget][:-1]}", ours, plain))
            for way in ways:
                steps = int(way.rsplit(", ", 1)[1].split()[0])
                curves.setdefault((kind, steps), []).append((budget, study.values("FPDM", way, "frechet")))
            curves.setdefault((kind, "DiT"), []).append((budget, plain))
    figures.budgets(curves, images / "report_budgets.png")
    size = [f"{study.mean(name, '', 'parameters') or 0:,.0f}" for name in ("FPDM", "DiT")]
    return "\n\n".join(
        (
            "## FPDM and DiT at equal training time and equal sampling budgets",
            "![Fréchet distance against the sampling budget](images/report_budgets.png)",
            f"FPDM has {size[0]} parameters, the DiT of six blocks {size[1]}. An FPDM step of k iterations costs 2 + k "
            "block passes; an iteration costs more MACs than a block, so the lower half of the table gives both the "
            "MACs of the DiT. The split of steps is the best of 5, 10, 20 and 40, chosen on these scores.",
            table(("budget", "FPDM, best split", "of", "DiT", "of"), rows),
            "\n".join(lines),
            study.source(),
        )
    )
