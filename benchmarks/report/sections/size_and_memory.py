"""Parameters and training memory, the two headline numbers that need no training."""

from pathlib import Path

from benchmarks.harness import read_result
from benchmarks.report.formatting import NOTHING


def section(results: Path, images: Path) -> str:
    """Parameters and training memory, the two headline numbers that need no training."""
    path, parts = results / "diffusion.json", ["## Size and memory"]
    known = read_result(path).get("tables", {})
    sizes = {row["network"]: row["parameters"] for row in known.get("parameters", {}).get("rows", [])}
    fewer = f"{100 * (1 - sizes['FPDM XL/2'] / sizes['DiT XL/2']):.1f} % fewer, counted" if sizes else NOTHING
    parts.append(f"The paper: *87 % fewer parameters at XL/2*: {fewer}.")
    steps = {row["step"]: row.get("peak MiB", {}) for row in known.get("against the plain step", {}).get("rows", [])}
    ours = steps.get("training, (n, m) = (6, 6)", {}).get("ours")
    dit = next((peak["DiT"] for peak in steps.values() if "DiT" in peak), None)
    less = f"{100 * (1 - ours / dit):.0f} % less" if ours and dit else NOTHING
    parts.append(
        f"The paper: *60 % less training memory at XL/2*: on a GPU {_full_size(results)}; predicted under *Training "
        f"memory at XL/2*. At hidden size 256 the tensors alive in a step of "
        f"(6, 6), weights and their gradients apart, beside those of a DiT of 28 blocks: {less}."
    )
    parts.append("`diffusion.json`; the tables are under *What FPDM costs*.")
    return "\n\n".join(parts)


def _full_size(results: Path) -> str:
    """Peak memory of a step of FPDM-XL/2 at the expected draw and of DiT-XL/2, from every result file of a GPU."""
    parts = []
    for path in sorted(results.glob("gpu_diffusion_*.json")):
        rows = read_result(path).get("tables", {}).get("training step", {}).get("rows", [])
        peaks = {(r["network"], r["estimator"][:5]): r for r in reversed(rows) if not r["checkpointed"]}
        ours, dit = peaks.get(("FPDM", "S-JFB")), peaks.get(("DiT", ""))
        if ours and dit and "peak MiB" in ours and "peak MiB" in dit:
            less = f"{100 * (1 - ours['peak MiB'] / dit['peak MiB']):.0f} % less"
            parts.append(f"{less} at batch {ours['batch']}, {ours['estimator']} (`{path.name}`)")
    return "; ".join(parts) or NOTHING
