"""Quality and cost of sampling the networks in the repository."""

from pathlib import Path
from typing import Any

from benchmarks.harness import read_result
from benchmarks.report.formatting import NOTHING, mean_and_deviation, table

HEAD = "## Precision, reproducibility and overhead of sampling"
NETWORKS = ("mnist-fpdm", "mnist-dit")


def section(results: Path, images: Path) -> str:
    path = results / "shipped.json"
    found = read_result(path)
    return "\n\n".join(
        (
            HEAD,
            "The networks in the repository with their own settings (20 timesteps of DDPM, guidance 1.5), on one CPU "
            "thread. Right labels and Fréchet distance by a LeNet trained on the held-out digits; pixels in 0..1.",
            quality(found),
            "Guidance: 500 samples of each of three seeds; mean and standard deviation. Block passes are per image; a "
            "timestep without guidance costs half of one with guidance.",
            guidance(found),
            "CPU time with `--reproducible` (chunks of 16) and without it, in pairs; other processes were running on "
            "the machine.",
            reproducible(found),
            "Kernels and CPU time of a timestep of the sampler with 16 images, compared with its blocks and "
            "iterations in a bare loop, which neither combines the two halves of guidance, nor makes the reverse "
            "step, nor records the effort.",
            _floor(found),
            f"`{path.name}`: {_source(found)}.",
        )
    )


def quality(found: dict[str, Any]) -> str:
    """Scores and differences from float32 by network and precision."""
    if "real training digits" not in found:
        return NOTHING
    rows = [
        [
            name,
            row["sampling"],
            str(row["samples"]),
            f"{100 * row['right label']:.1f} %",
            f"{row['Fréchet distance']:.2f}",
            f"{row['RMS difference']:.5f}" if row["sampling"] != "float32" else "-",
            f"{row['largest difference']:.4f}" if row["sampling"] != "float32" else "-",
        ]
        for name in NETWORKS
        for row in found.get(name, {}).get("quality", [])
    ]
    real = found["real training digits"]
    scores = [f"{100 * real['right label']:.1f} %", f"{real['Fréchet distance']:.2f}"]
    rows.append(["real training digits", "-", str(real["images"]), *scores, "-", "-"])
    head = ("network", "sampling", "samples", "right label", "Fréchet distance")
    return table((*head, "RMS difference from float32", "largest"), rows)


def guidance(found: dict[str, Any]) -> str:
    """Scores and block passes by network and guidance."""
    rows = [
        [
            name,
            row["guidance"],
            mean_and_deviation(row["right label"], 1, 100),
            mean_and_deviation(row["Fréchet distance"]),
            f"{row['block passes']:.0f}",
        ]
        for name in NETWORKS
        for row in found.get(name, {}).get("guidance", [])
    ]
    head = ("network", "guidance, timesteps", "right label, %", "Fréchet distance", "block passes")
    return table(head, rows) if rows else NOTHING


def reproducible(found: dict[str, Any]) -> str:
    """Cost of equal bits by network and number of images."""
    rows = [
        [
            name,
            count,
            f"{row['default']:.3g} s",
            f"{row['reproducible']:.3g} s",
            "{median:.2f} ({lower quartile:.2f} to {upper quartile:.2f})".format_map(row["ratio"]),
        ]
        for name in NETWORKS
        for count, row in found.get(name, {}).get("reproducible", {}).items()
    ]
    return table(("network", "images", "without", "`--reproducible`", "ratio (quartiles)"), rows) if rows else NOTHING


def _floor(found: dict[str, Any]) -> str:
    rows = []
    for name in NETWORKS:
        if one := found.get(name, {}).get("floor"):
            kernels, seconds = one["kernels of a timestep"], one["seconds of a timestep"]
            times = f"{1e3 * seconds['floor']:.1f} ms", f"{1e3 * seconds['sampler']:.1f} ms"
            counts = f"{kernels['floor']:.0f}", f"{kernels['sampler']:.0f}"
            rows.append([name, *counts, *times, f"{one['ratio']['median']:.3f}"])
    head = ("network", "kernels, bare", "kernels, sampler", "time, bare", "time, sampler", "ratio of times")
    return table(head, rows) if rows else NOTHING


def _source(found: dict[str, Any]) -> str:
    if not found:
        return NOTHING
    return f"{found['command']}, {found['device']}, torch {found['versions']['torch']}, commit {found['commit']}"
