"""Score generated images: `python -m apps.diffusion.evaluate SAMPLES --reference DATA_OR_STATISTICS`.

SAMPLES is an output folder of `python -m apps.diffusion.sample`, any folder of images, or an .npz file with arr_0. The
reference may have the same forms; it may also be `digits`, `mnist:held-out` or the like, a file of statistics that
--save wrote, or the .npz statistics of the ADM evaluation suite.

Fréchet distance, sFID, KID, precision and recall compare the features of the samples with those of the reference; the
features come from a network (--features). The inception score measures the certainty and variety of the classes that
the network predicts. Label accuracy is measured if the classes of the network are those of the samples. Statistics of a
reference are cached in ~/.cache/implicit, by the checksums of the images and of the network.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from apps.diffusion.cli import device_of, run_request
from apps.diffusion.config.checks import at_least
from apps.diffusion.config.training import Backend
from apps.diffusion.data.dataset import Split
from apps.diffusion.evaluation import feature_extractors
from apps.diffusion.evaluation.feature_statistics import cached, is_statistics, load, save
from apps.diffusion.evaluation.image_sources import BATCH, Source, of_named, open_source
from apps.diffusion.evaluation.nearest import nearest, neighbor_grid
from apps.diffusion.evaluation.scores import evaluate, table
from apps.diffusion.files.atomic import atomic_path
from apps.diffusion.sampling.sampler import Precision


@dataclass(frozen=True, kw_only=True)
class Request:
    """Score generated images against real ones."""

    samples: Annotated[str, tyro.conf.Positional]
    """Folder of images, or .npz file."""
    reference: str = "digits"
    """Real images: a folder, an .npz file, a file of statistics (.safetensors, .npz), or digits, digits:held-out,
    mnist, mnist:held-out.
    """
    features: Literal["digits", "mnist", "trained", "inception"] = "digits"
    """Network whose features are compared. digits: a classifier of the 8 x 8 digits; mnist: a classifier of MNIST;
    trained: a classifier of the reference images (the command trains these three in seconds); inception: Inception-v3,
    which has to be installed.
    """
    weights: Path | None = None
    """File of Inception's weights; default: the file in torch.hub's folder."""
    size: int | None = None
    """Side in pixels to which images of folders are cropped and resized, as in ADM; default: images keep their size."""
    nearest: int = 3
    """Number k of nearest neighbors in precision and recall."""
    neighbors: Path | None = None
    """File (.png) for an image of the first 20 samples, each above the nearest image of the reference."""
    save: Path | None = None
    """File (.safetensors) to which the statistics of the reference are written."""
    cache: Path | None = None
    """Folder in which statistics of references are cached; default: ~/.cache/implicit/statistics."""
    device: str = "auto"
    """Device of Inception by name; auto: the first available of cuda, mps, xpu and cpu. The other networks compute on
    the CPU.
    """
    batch: int = BATCH
    """Number of images in one call of the network."""
    precision: Precision = "no"
    """bf16: call the network under autocast to bfloat16. Features in bf16 are compared with features in bf16 only."""
    compile: Backend = "no"
    """Backend of torch.compile for Inception."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        at_least(self, 1, "nearest", "size", "batch")
        given = {"weights": self.weights is not None, "device": self.device not in ("auto", "cpu")}
        for name, is_set in {**given, "compile": self.compile != "no"}.items():
            if is_set and self.features != "inception":
                raise ValueError(
                    f"--{name} {getattr(self, name)} is for --features inception only; leave it out for "
                    f"--features {self.features}."
                )
        for name, file, suffix in (("save", self.save, ".safetensors"), ("neighbors", self.neighbors, ".png")):
            if file is not None and (file.suffix != suffix or file.exists()):
                raise ValueError(f"--{name} {file} must be a new file whose name ends in {suffix}.")
            if file is not None and not file.parent.is_dir():
                raise ValueError(f"--{name} {file}: the folder {file.parent} does not exist; make it, or give another.")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code (see cli.py)."""

    def command(request: Request) -> None:
        report = run(request)
        if request.json:
            print(json.dumps(report, indent=2))
        else:
            _print(report)

    after = "If the file of --save or --neighbors cannot be written there, give another place."
    return run_request(Request, "evaluate", command, argv, after=after)


def run(request: Request) -> dict[str, Any]:
    """The scores and their provenance.

    Returns:
        A dict of "generated": the scores of the samples; "reference": its provenance; if the reference is digits or
        mnist:held-out, "real_held_out" or "real_training": the scores of real digits that the classifier was not
        trained on; with --neighbors, "nearest": distances to the nearest reference image.

    Raises:
        ValueError: an argument names no images, or the images do not fit the features or each other.
    """
    samples = open_source(request.samples, request.size, request.batch)
    if samples.count < 2:
        raise ValueError(f"{samples.name} holds {samples.count} images; at least 2 are needed.")
    known = is_statistics(Path(request.reference))
    real = None if known else open_source(request.reference, request.size, request.batch)
    for source in (samples, real):
        for remark in source.remarks if source is not None else ():
            print(f"evaluate: {remark}", file=sys.stderr)
    extractor = _extractor(request, real)
    reference = load(Path(request.reference), extractor) if real is None else cached(real, extractor, request.cache)
    report: dict[str, Any] = {"generated": evaluate(samples, reference, extractor, request.nearest)}
    # real images that the classifier was not trained on; as many as samples, because distances fall with the number
    others: dict[str, tuple[str, Split]] = {"digits": ("digits", "held-out"), "mnist:held-out": ("mnist", "train")}
    unseen = others.get(request.reference)
    if unseen is not None and real is not None and real.name.startswith(unseen[0]):
        other = of_named(*unseen, samples.count)
        scores = evaluate(other, reference, extractor, request.nearest)
        report["real_held_out" if unseen[1] == "held-out" else "real_training"] = scores
    if request.neighbors is not None:
        report["nearest"] = _neighbors(samples, real, request)
    if request.save is not None:
        save(reference, request.save)
    return {**report, "reference": reference.provenance}


def _extractor(request: Request, real: Source | None) -> feature_extractors.Extractor:
    """The feature extractor of --features; `trained` is trained on the reference."""
    device = "cpu"
    if request.features == "inception":
        device = device_of(request.device)
        found = feature_extractors.Inception(request.weights, device, request.compile)
    elif request.features == "trained":
        if real is None:
            raise ValueError(
                f"--features trained needs the images of the reference; {request.reference} holds statistics."
            )
        found = feature_extractors.reference_features(torch.cat(list(real.batches())), real.labels)
    else:
        digits = request.features == "digits"
        found = feature_extractors.digit_features() if digits else feature_extractors.mnist_features()
    return found if request.precision == "no" else feature_extractors.HalfPrecision(found, device)


def _neighbors(samples: Source, real: Source | None, request: Request) -> dict[str, float]:
    """Draw samples above their nearest reference images; returns the median and the smallest distance between a sample
    and its nearest reference image.
    """
    if real is None:
        raise ValueError(f"--neighbors needs the images of the reference, and {request.reference} holds statistics.")
    assert request.neighbors is not None
    x, others = (torch.cat(list(source.batches())) for source in (samples, real))
    with atomic_path(request.neighbors) as partial:
        neighbor_grid(x[:20], others).save(partial, format="PNG")
    distance = nearest(x, others)[1]
    return {"median": float(distance.median()), "least": float(distance.min())}


def _print(report: dict[str, Any]) -> None:
    titles = {"generated": "generated", "real_held_out": "real, held out", "real_training": "real, training"}
    print(table({title: report[name] for name, title in titles.items() if name in report}))
    if "nearest" in report:
        near = report["nearest"]
        print(f"nearest reference image: {near['median']:.3f} RMS away (median), {near['least']:.3f} (least)")
    reference = report["reference"]
    print(
        f"\nAgainst {reference['data'].get('images', '')} images of {reference['data']['name']}, on the features "
        f"{reference['features']['name']}. Distances are larger with fewer images: compare equal numbers."
    )


if __name__ == "__main__":
    sys.exit(main())
