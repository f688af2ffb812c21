"""Scores of images against a reference, for the evaluation command and for the summary after training.

A metric is a function of `metrics.py` and an entry of `METRICS`; command and summary compute and print every entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from apps.diffusion.evaluation.feature_extractors import Extractor
from apps.diffusion.evaluation.feature_statistics import Statistics, measure
from apps.diffusion.evaluation.image_sources import Source
from apps.diffusion.evaluation.metrics import (
    Spread,
    frechet_distance,
    inception_score,
    kernel_distance,
    label_accuracy,
    precision_recall,
)

Scores = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The arguments of a metric.

    Attributes:
        found: statistics of the images to score.
        reference: statistics of the reference images.
        labels: (n,) class that each image should show; None if unknown, or if the classifier has other classes.
        neighbors: number k of nearest neighbors in precision and recall.
    """

    found: Statistics
    reference: Statistics
    labels: Tensor | None
    neighbors: int

    def features(self) -> tuple[Tensor, Tensor] | None:
        """Features of single images of both sets; None if one of the sets has none (published statistics)."""
        sides = self.found.features, self.reference.features
        return None if sides[0] is None or sides[1] is None else (sides[0], sides[1])


@dataclass(frozen=True)
class Metric:
    """A metric, which is a row of the table.

    Attributes:
        title: title of the row.
        form: format of the number.
        compute: the function; it returns None if the metric does not apply.
    """

    title: str
    form: str
    compute: Callable[[Comparison], float | Spread | None]


def _accuracy(c: Comparison) -> float | None:
    return None if c.labels is None or c.found.logits is None else label_accuracy(c.found.logits, c.labels)


def _spatial(c: Comparison) -> float | None:
    a, b = c.found.spatial, c.reference.spatial
    return None if a is None or b is None else frechet_distance(a, b)


def _kernel(c: Comparison) -> Spread | None:
    sides = c.features()
    return None if sides is None else kernel_distance(*sides)


def _side(index: int) -> Callable[[Comparison], float | None]:
    def compute(c: Comparison) -> float | None:
        sides = c.features()
        if sides is None or min(map(len, sides)) <= c.neighbors:
            return None
        return precision_recall(*sides, c.neighbors)[index]

    return compute


def _inception(c: Comparison) -> Spread | None:
    return None if c.found.logits is None else inception_score(c.found.logits)


METRICS: dict[str, Metric] = {
    "accuracy": Metric("right label", "{:.1%}", _accuracy),
    "frechet": Metric("Fréchet distance", "{:.3f}", lambda c: frechet_distance(c.found.pooled, c.reference.pooled)),
    "sfid": Metric("spatial (sFID)", "{:.3f}", _spatial),
    "kid": Metric("kernel (KID)", "{:.5f}", _kernel),
    "precision": Metric("precision", "{:.3f}", _side(0)),
    "recall": Metric("recall", "{:.3f}", _side(1)),
    "inception_score": Metric("inception score", "{:.3f}", _inception),
}


def evaluate(source: Source, reference: Statistics, extractor: Extractor, neighbors: int = 3) -> Scores:
    """The scores of the images of a source against a reference, by metric; None for a metric that does not apply.

    Raises:
        ValueError: there are fewer than two images, or the reference has statistics of other features.
    """
    return compare(source, measure(source, extractor), reference, extractor, neighbors)


def compare(
    source: Source, found: Statistics, reference: Statistics, extractor: Extractor, neighbors: int = 3
) -> Scores:
    """The scores of a source whose statistics are `found`; see `evaluate`."""
    if found.pooled.mean.shape != reference.pooled.mean.shape:
        raise ValueError(
            f"The reference has {len(reference.pooled.mean)} features and {extractor.name} has "
            f"{len(found.pooled.mean)}; choose the --features that the reference was measured with."
        )
    labels = source.labels if getattr(extractor, "classifies", False) else None
    if labels is not None and found.logits is not None and int(labels.max()) >= found.logits.shape[1]:
        raise ValueError(
            f"{source.name} has images of class {int(labels.max())}, and the classifier of {extractor.name} has the "
            f"classes 0 to {found.logits.shape[1] - 1}; choose other --features."
        )
    comparison = Comparison(found=found, reference=reference, labels=labels, neighbors=neighbors)
    scores: Scores = {"images": source.count}
    for name, metric in METRICS.items():
        value = metric.compute(comparison)
        if isinstance(value, Spread):
            scores[name], scores[f"{name}_std"] = value
        else:
            scores[name] = value
    return scores


def table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores as text, with a row for each metric that applies and a column for each set of images.

    Args:
        columns: title of the column -> scores.
    """
    rows = [f"{'':20}" + "".join(f"{title:>20}" for title in columns)]
    for name, title, form in [("images", "images", "{:.0f}"), *((n, m.title, m.form) for n, m in METRICS.items())]:
        cells = []
        for scores in columns.values():
            value, std = scores.get(name), scores.get(f"{name}_std")
            cells.append("-" if value is None else form.format(value) + (f" ± {form.format(std)}" if std else ""))
        if any(cell != "-" for cell in cells):
            rows.append(f"{title:20}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(rows)
