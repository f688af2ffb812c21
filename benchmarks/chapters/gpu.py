"""What was measured on a GPU."""

from pathlib import Path

from .wording import NOTHING


def chapter(results: Path, images: Path) -> str:
    found = [path for path in sorted(results.glob("*.json")) if "cuda" in path.stem or "gpu" in path.stem]
    told_ = "\n".join(f"- `{path.name}`" for path in found) or f"Training memory and block passes at XL/2: {NOTHING}."
    return f"## On a GPU\n\n{told_}"
