"""Score generated images: `python -m apps.diffusion.evaluate SAMPLES --reference DATA_OR_STATISTICS`.

SAMPLES is what `python -m apps.diffusion.sample` wrote, any folder of pictures, or an .npz file with arr_0. The
reference is the same, or `digits`, `mnist:held-out`, or statistics: those that --save wrote, or the .npz of the ADM
evaluation suite.
Fréchet distance, sFID, KID, precision and recall tell how far the two lie apart on the features of a network, the
inception score how sure and how various its verdicts are; with digits and their classes, how many are right.
Statistics of a reference are kept (in ~/.cache/implicit, by checksum of the pictures and of the network).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from apps.diffusion.evaluation.feature_extractors import Extractor
    from apps.diffusion.evaluation.feature_statistics import Statistics
    from apps.diffusion.evaluation.image_sources import Source


@dataclass(frozen=True, kw_only=True)
class Request:
    """Score generated images against real ones."""

    samples: Annotated[str, tyro.conf.Positional]
    """Folder of pictures, or .npz file."""
    reference: str = "digits"
    """Folder of pictures, .npz file, statistics (.safetensors, .npz), or digits, digits:held-out, mnist,
    mnist:held-out.
    """
    features: Literal["digits", "mnist", "inception"] = "digits"
    """The network whose features are compared: a classifier of the 8 x 8 digits, one of MNIST (each trained by the
    command, in seconds), or Inception where it is installed.
    """
    weights: Path | None = None
    """Inception's weights, where they are not in torch.hub's folder."""
    size: int | None = None
    """Crop and resize the pictures of folders to this side, as ADM does."""
    nearest: int = 3
    """Neighbours that precision and recall look at."""
    neighbors: Path | None = None
    """Draw the first 20 samples, each above the nearest image of the reference, into this .png file."""
    save: Path | None = None
    """Write the statistics of the reference to this .safetensors file too."""
    cache: Path | None = None
    """Folder where statistics of references are kept."""
    device: str = "cpu"
    """Where Inception computes, such as cpu or cuda."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        if self.nearest < 1 or (self.size is not None and self.size < 1):
            raise ValueError(f"--nearest and --size must be at least 1, got {self.nearest} and {self.size}.")
        if self.neighbors is not None and self.neighbors.suffix != ".png":
            raise ValueError(f"--neighbors {self.neighbors} must name a .png file.")
        if self.save is not None and (self.save.suffix != ".safetensors" or self.save.exists()):
            raise ValueError(f"--save {self.save} must be a new file whose name ends in .safetensors.")
        if self.save is not None and not self.save.parent.is_dir():
            raise ValueError(f"--save {self.save}: there is no folder {self.save.parent}; make it, or give another.")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What can be said of a set of pictures; None where it cannot.

    Attributes:
        images: how many.
        frechet: Fréchet distance of the pooled features; with Inception this is the FID. 0 is equal.
        sfid: that of the spatial features.
        kid: kernel distance, unbiased; with `kid_std` over subsets.
        precision: share of the pictures that lie among the real ones, 0 to 1.
        recall: share of the real ones that lie among the pictures, 0 to 1.
        inception_score: how sure and how various the verdicts are, 1 to the number of classes; with its std.
        accuracy: share of the pictures that show the class in their name, 0 to 1.
    """

    images: int
    frechet: float
    sfid: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    accuracy: float | None = None


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 if the disk fails, 2 for bad input."""
    try:
        request = tyro.cli(Request, args=argv, prog="python -m apps.diffusion.evaluate")
        report = run(request)
    except ValueError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evaluate: {error}.", file=sys.stderr)
        return 1
    if request.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0


def run(request: Request) -> dict[str, Any]:
    """{"generated": scores, "real_held_out" or "real_training": those of real digits that the classifier has not seen,
    where the reference is digits or mnist:held-out, "reference": its provenance}.

    Raises:
        ValueError: what is no source of pictures, or does not fit the features or each other.
    """
    from apps.diffusion.evaluation.feature_extractors import open_extractor
    from apps.diffusion.evaluation.feature_statistics import cached, is_statistics, load, measure, save
    from apps.diffusion.evaluation.image_sources import of_named, open_source

    samples = open_source(request.samples, request.size)
    if samples.count < 2:
        raise ValueError(f"{samples.name} holds {samples.count} pictures; at least 2 are needed.")
    known = is_statistics(Path(request.reference))
    real = None if known else open_source(request.reference, request.size)
    for source in (samples, real):
        if source is not None and source.left_out:
            some = ", ".join(source.left_out[:3])
            print(
                f"evaluate: {source.count} numbered pictures of {source.name} are taken, and {len(source.left_out)} "
                f"others, such as {some}, are left out; move those that count to a folder of their own.",
                file=sys.stderr,
            )
    extractor = open_extractor(request.features, request.weights, request.device)
    if real is None:
        reference = load(Path(request.reference), extractor)
    else:
        reference = cached(real, extractor, request.cache)
    report = {"generated": asdict(compare(samples, measure(samples, extractor), reference, extractor, request.nearest))}
    # real images that the classifier has not seen, as many as there are samples: distances fall with the number
    unseen = {"digits": ("digits", "held-out"), "mnist:held-out": ("mnist", "train")}.get(request.reference)
    if unseen is not None and real is not None and real.name.startswith(unseen[0]):
        other = of_named(*unseen, samples.count)
        scores = compare(other, measure(other, extractor), reference, extractor, request.nearest)
        report["real_held_out" if unseen[1] == "held-out" else "real_training"] = asdict(scores)
    if request.neighbors is not None:
        report["nearest"] = _neighbors(samples, real, request)
    if request.save is not None:
        save(reference, request.save)
    return {**report, "reference": reference.provenance}


def _neighbors(samples: Source, real: Source | None, request: Request) -> dict[str, float]:
    """Draw samples above their nearest reference images; returns the distances from there of all samples."""
    import torch

    from apps.diffusion.evaluation.nearest import nearest, neighbor_grid

    if real is None:
        raise ValueError(f"--neighbors needs the images of the reference, and {request.reference} holds statistics.")
    assert request.neighbors is not None
    x, others = (torch.cat(list(source.batches())) for source in (samples, real))
    neighbor_grid(x[:20], others).save(request.neighbors)
    distance = nearest(x, others)[1]
    return {"median": float(distance.median()), "least": float(distance.min())}


def compare(source: Source, found: Statistics, reference: Statistics, extractor: Extractor, nearest: int = 3) -> Scores:
    """The scores of a source with the statistics `found` against the reference.

    Raises:
        ValueError: statistics of other features, or classes that the extractor does not know.
    """
    from apps.diffusion.evaluation.digit_classifier import frechet_distance
    from apps.diffusion.evaluation.metrics import inception_score, kernel_distance, precision_recall

    if found.pooled.mean.shape != reference.pooled.mean.shape:
        raise ValueError(
            f"The reference has {len(reference.pooled.mean)} features and {extractor.name} has "
            f"{len(found.pooled.mean)}; choose the --features that the reference was measured with."
        )
    scores: dict[str, Any] = {"frechet": frechet_distance(found.pooled, reference.pooled)}
    if found.spatial is not None and reference.spatial is not None:
        scores["sfid"] = frechet_distance(found.spatial, reference.spatial)
    if found.features is not None and reference.features is not None:
        scores["kid"], scores["kid_std"] = kernel_distance(found.features, reference.features)
        if min(len(found.features), len(reference.features)) > nearest:
            sides = precision_recall(found.features, reference.features, nearest)
            scores["precision"], scores["recall"] = sides
    if found.logits is not None:
        scores["inception_score"], scores["inception_score_std"] = inception_score(found.logits)
        if source.labels is not None and extractor.name in ("digits", "mnist"):
            known = found.logits.shape[1]
            if int(source.labels.max()) >= known:
                raise ValueError(
                    f"{source.name} has pictures of class {int(source.labels.max())}, and digits have the classes 0 to "
                    f"{known - 1}; choose --features inception for them."
                )
            scores["accuracy"] = float((found.logits.argmax(1) == source.labels).double().mean())
    return Scores(images=source.count, **scores)


_ROWS = {
    "images": ("images", "{:.0f}"),
    "accuracy": ("right label", "{:.1%}"),
    "frechet": ("Fréchet distance", "{:.3f}"),
    "sfid": ("spatial (sFID)", "{:.3f}"),
    "kid": ("kernel (KID)", "{:.5f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "inception_score": ("inception score", "{:.3f}"),
}


def _print(report: dict[str, Any]) -> None:
    columns = {"generated": "generated", "real_held_out": "real, held out", "real_training": "real, training"}
    shown = [name for name in columns if name in report]
    print(f"{'':20}" + "".join(f"{columns[name]:>18}" for name in shown))
    for key, (title, form) in _ROWS.items():
        values = [report[name][key] for name in shown]
        if any(value is not None for value in values):
            cells = ["-" if value is None else form.format(value) for value in values]
            print(f"{title:20}" + "".join(f"{cell:>18}" for cell in cells))
    if "nearest" in report:
        near = report["nearest"]
        print(f"nearest reference image: {near['median']:.3f} RMS away (median), {near['least']:.3f} (least)")
    told = report["reference"]
    print(
        f"\nAgainst {told['data'].get('images', '')} images of {told['data']['name']}, on the features "
        f"{told['features']['name']}. Distances are larger with fewer images: compare equal numbers."
    )


if __name__ == "__main__":
    sys.exit(main())
