"""The two headline numbers that are no matter of training."""

import json
from pathlib import Path

from .wording import NOTHING


def chapter(results: Path, images: Path) -> str:
    """The two headline numbers that are no matter of training."""
    path, parts = results / "diffusion.json", ["## Size and memory"]
    known = json.loads(path.read_text())["tables"] if path.exists() else {}
    sizes = {row["network"]: row["parameters"] for row in known.get("parameters", {}).get("rows", [])}
    fewer = f"{100 * (1 - sizes['FPDM XL/2'] / sizes['DiT XL/2']):.1f} %" if sizes else NOTHING
    parts.append(f"The paper: *87 % fewer parameters at XL/2*: counted, {fewer} fewer.")
    steps = {row["step"]: row.get("peak MiB", {}) for row in known.get("against the plain step", {}).get("rows", [])}
    ours = steps.get("training, (n, m) = (6, 6)", {}).get("ours")
    dit = next((peak["DiT"] for peak in steps.values() if "DiT" in peak), None)
    less = f"{100 * (1 - ours / dit):.0f} % less" if ours and dit else NOTHING
    parts.append(
        f"The paper: *60 % less training memory at XL/2*: {NOTHING} at that size. At hidden size 256 the tensors alive "
        f"in a step of (6, 6), weights and their gradients apart, take {less} than those of a DiT of 28 blocks."
    )
    parts.append("`diffusion.json`; the tables are under *What FPDM costs*.")
    return "\n\n".join(parts)
