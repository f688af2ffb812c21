"""The networks in the repository: quality in bfloat16 and compiled, compared with float32, and the cost of sampling.

python -m benchmarks.diffusion.shipped          writes benchmarks/results/shipped.json in about ten minutes

quality        the same samples (seed 0, classes in turn) by the network's own settings in float32, under autocast to
               bfloat16 and compiled: right labels and Fréchet distance by a LeNet of the held-out digits, and the
               root mean square difference of pixels in 0..1 from those of float32
guidance       right labels and Fréchet distance without guidance, with guidance at all timesteps, and in an interval
               (arXiv 2404.07724), of samples of several seeds, with block passes per image
reproducible   CPU time with --reproducible divided by that without, for 1, 16 and 100 images, in pairs
floor          CPU time and kernels of a timestep of the sampler, and of its blocks and iterations in a bare loop
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.diffusion.checkpoint.open_network import OpenedNetwork, open_network
from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.config.training import Backend
from apps.diffusion.data.mnist import mnist
from apps.diffusion.models import FPDM
from apps.diffusion.sampling.plan import SamplingPlan, plan
from apps.diffusion.sampling.sampler import SampleResult, sample
from benchmarks.diffusion import steps
from benchmarks.harness import RESULTS, OperatorCounter, paired, provenance, ratio, read_result, write_result
from benchmarks.image_scorer import ImageScorer

NETWORKS = ("mnist-fpdm", "mnist-dit")
INTERVAL = (200, 800)
GUIDANCE: dict[str, SamplingOptions] = {
    "none": SamplingOptions(guidance=1),
    "1.5": SamplingOptions(guidance=1.5),
    "1.5 at 200 to 800": SamplingOptions(guidance=1.5, guidance_interval=INTERVAL),
    "2 at 200 to 800": SamplingOptions(guidance=2, guidance_interval=INTERVAL),
}
"""Name -> sampling options, compared by `guidance`."""
BATCH = 16
"""Number of images with which the sampler is compared with a bare loop."""


def sampler(opened: OpenedNetwork) -> Callable[..., SampleResult]:
    """A function (count, **options) -> the first `count` samples of seed 0, with the network's own settings."""
    chosen = _plan(opened)

    def draw(count: int, **options: Any) -> SampleResult:
        options = {"reproducible": False} | options
        return sample(opened.model, range(count), _labels(count), plan=chosen, seed=0, **options)

    return draw


def quality(opened: OpenedNetwork, scorer: ImageScorer, count: int, backend: Backend) -> list[dict[str, Any]]:
    """Scores in each precision, and compiled; the compiled network comes last, because it stays compiled."""
    draw, rows, labels = sampler(opened), [], torch.tensor(_labels(count))
    exact: Tensor | None = None
    for name, options in (("float32", {}), ("bfloat16", {"precision": "bf16"}), (f"compiled, {backend}", {})):
        if name.startswith("compiled"):
            opened.model.compile_blocks(backend=backend)
        x = draw(count, chunk=100, **options).samples.clamp(-1, 1)
        exact = x if exact is None else exact
        score, difference = scorer.score(x, labels), (x - exact) / 2
        rows.append(
            {
                "sampling": name,
                "samples": count,
                "right label": score.accuracy,
                "Fréchet distance": score.frechet,
                "RMS difference": difference.square().mean().sqrt().item(),
                "largest difference": difference.abs().max().item(),
            }
        )
    return rows


def guidance(opened: OpenedNetwork, scorer: ImageScorer, count: int, seeds: range) -> list[dict[str, Any]]:
    """Scores of `count` samples of each seed and block passes per image, by the options of `GUIDANCE`."""
    rows, labels = [], torch.tensor(_labels(count))
    for name, options in GUIDANCE.items():
        chosen = plan(opened.model, opened.scheduler, options, defaults=opened.options)
        row: dict[str, Any] = {"guidance": name, "samples": count, "commit": provenance("cpu")["commit"]}
        for seed in seeds:
            found = sample(opened.model, range(count), _labels(count), plan=chosen, seed=seed, reproducible=False)
            score = scorer.score(found.samples.clamp(-1, 1), labels)
            row.setdefault("right label", []).append(score.accuracy)
            row.setdefault("Fréchet distance", []).append(score.frechet)
            row["block passes"] = found.effort.summary()["block_passes"]
        rows.append(row)
    return rows


def reproducible(opened: OpenedNetwork, counts: dict[int, int]) -> dict[str, dict[str, Any]]:
    """Number of images -> CPU seconds with --reproducible and without, and their ratio.

    Args:
        opened: the network.
        counts: number of images -> repeats.
    """
    draw, found = sampler(opened), {}
    for count, repeats in counts.items():
        ways = {
            "reproducible": lambda n=count: draw(n, reproducible=True),
            "default": lambda n=count: draw(n, chunk=64),
        }
        times = paired(ways, repeats)
        found[str(count)] = {name: statistics.median(each) for name, each in times.items()}
        found[str(count)] |= {"ratio": ratio(times, "reproducible", "default")}
    return found


def beside_the_floor(opened: OpenedNetwork, repeats: int) -> dict[str, Any]:
    """Kernels and CPU time of a timestep with `BATCH` images, of the sampler and of its block passes only."""
    chosen, draw, network = _plan(opened), sampler(opened), opened.model
    each = 2 if chosen.guidance.doubles else 1
    rows = each * BATCH
    x = torch.randn(rows, *network.latent, generator=torch.Generator().manual_seed(0))
    batch = (x, torch.full((rows,), 500), torch.arange(rows) % 10)
    evaluations = (draw(1).effort.evaluations[0] // each).tolist()
    count = len(evaluations)

    def bare() -> None:
        for k in evaluations:
            loop = steps.floor(network, batch, k) if isinstance(network, FPDM) else lambda: network(*batch)
            steps.sampling(loop, steps.CPU)()

    ways = {"sampler": lambda: draw(BATCH), "floor": bare}
    kernels = {}
    for name, run in ways.items():
        with OperatorCounter() as counter:
            run()
        kernels[name] = counter.count / count
    times = paired(ways, repeats)
    seconds = {name: statistics.median(each) / count for name, each in times.items()}
    return {
        "images": BATCH,
        "timesteps": count,
        "evaluations of a timestep": evaluations[0],
        "kernels of a timestep": kernels,
        "seconds of a timestep": seconds,
        "ratio": ratio(times, "sampler", "floor"),
    }


def _plan(opened: OpenedNetwork) -> SamplingPlan:
    return plan(opened.model, opened.scheduler, SamplingOptions(), defaults=opened.options)


def _labels(count: int) -> list[int]:
    return [i % 10 for i in range(count)]


def measure(found: dict[str, Any], name: str, part: Callable[[OpenedNetwork], Any], save: Callable[[], None]) -> None:
    """Add the result of `part` for a network as `found[...][name]`, unless it is there already."""
    for network in NETWORKS:
        entry = found.setdefault(network, {})
        if name not in entry:
            entry[name] = part(open_network(network))
            save()
            print(f"{network}, {name}: {entry[name]}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "shipped.json", help="result file; resumed if it exists")
    parser.add_argument("--samples", type=int, default=300, help="of every row of quality")
    parser.add_argument("--guided", type=int, default=500, help="samples of each seed in rows of guidance")
    parser.add_argument("--backend", choices=("inductor", "aot_eager"), default="inductor", help="of torch.compile")
    parser.add_argument(
        "--repeats", type=int, default=5, help="repeats of each timed pair; half as many for 100 images"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    source = {"command": "python -m benchmarks.diffusion.shipped", **provenance("cpu")}
    result = read_result(given.out) | source
    counts = {1: given.repeats, 16: given.repeats, 100: max(2, given.repeats // 2)}

    def save() -> None:
        write_result(given.out, result)

    measure(result, "floor", lambda opened: beside_the_floor(opened, given.repeats), save)
    measure(result, "reproducible", lambda opened: reproducible(opened, counts), save)
    scorer, real = ImageScorer.of(mnist("held-out")), mnist("train")
    chosen = slice(0, given.samples * (len(real) // given.samples), len(real) // given.samples)
    seen = scorer.score(real.x[chosen], real.y[chosen])
    scores = {"images": seen.images, "right label": seen.accuracy, "Fréchet distance": seen.frechet}
    result["real training digits"] = scores
    measure(result, "quality", lambda opened: quality(opened, scorer, given.samples, given.backend), save)
    measure(result, "guidance", lambda opened: guidance(opened, scorer, given.guided, range(3)), save)


if __name__ == "__main__":
    main()
