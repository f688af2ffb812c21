"""Statistics of the features of a set of images, from which all metrics are computed, and their provenance.

    mean, cov                  (D,), (D, D), float64, of the pooled features
    spatial_mean, spatial_cov  the same of the spatial features, if the extractor has any
    features                   (m, D), float32, of m <= KEPT images, evenly spaced in the set: for KID, precision,
    recall

The file format is safetensors with a JSON header: name and checksum of the data and of the extractor, counts, versions,
and the checksum of the tensors. A cached file is used only if the checksums of images and network agree. The statistics
that the ADM evaluation suite publishes (.npz with mu, sigma, mu_s, sigma_s) are read too; they have no checksum.
"""

import json
import os
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from apps.diffusion.evaluation.feature_extractors import Extractor
from apps.diffusion.evaluation.image_sources import DAMAGED, Source
from apps.diffusion.evaluation.metrics import Gaussian
from apps.diffusion.files import hashing
from apps.diffusion.files.atomic import atomic_path

FORMAT = 1
KEPT = 10_000


@dataclass(frozen=True)
class Statistics:
    """The statistics at the top of this file; `logits` (n, K) of all images are not written to the file."""

    provenance: dict[str, Any]
    pooled: Gaussian
    spatial: Gaussian | None
    features: Tensor | None
    logits: Tensor | None = None


@dataclass
class Moments:
    """Running mean and covariance of rows that are added in parts. Sums are in float64 about the mean of the first
    part, so that little precision is lost.
    """

    count: int = 0
    center: Tensor = field(default_factory=lambda: torch.zeros(()))
    first: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    second: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, rows: Tensor) -> None:
        """Add rows (b, D)."""
        rows = rows.double()
        if not self.count:
            self.center = rows.mean(0)
        rows = rows - self.center
        self.count += len(rows)
        self.first = self.first + rows.sum(0)
        self.second = self.second + rows.T @ rows

    def gaussian(self) -> Gaussian:
        """Mean and covariance of all rows.

        Raises:
            ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"There are {self.count} images, and at least 2 are needed; make more.")
        off = self.first / self.count
        cov = (self.second - self.count * torch.outer(off, off)) / (self.count - 1)
        return Gaussian(self.center + off, cov)


def measure(source: Source, extractor: Extractor, kept: int = KEPT) -> Statistics:
    """The statistics of all images of a source.

    Raises:
        ValueError: there are fewer than two images, or an image cannot be read or has another size.
    """
    pooled, spatial = Moments(), Moments()
    chosen = set(np.linspace(0, source.count - 1, min(kept, source.count)).round().astype(int).tolist())
    features, logits, seen = [], [], 0
    for batch in source.batches():
        extracted = extractor(batch)
        pooled.add(extracted.pooled)
        if extracted.spatial is not None:
            spatial.add(extracted.spatial)
        features.append(extracted.pooled[[i for i in range(len(batch)) if seen + i in chosen]])
        if extracted.logits is not None:
            logits.append(extracted.logits)
        seen += len(batch)
    return Statistics(
        provenance=_provenance(source, extractor),
        pooled=pooled.gaussian(),
        spatial=spatial.gaussian() if spatial.count else None,
        features=torch.cat(features),
        logits=torch.cat(logits) if logits else None,
    )


def _provenance(source: Source, extractor: Extractor) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "data": {"name": source.name, "images": source.count, "sha256": source.digest},
        "features": {"name": extractor.name, "sha256": extractor.digest},
        "torch": torch.__version__,
    }


def cached(source: Source, extractor: Extractor, folder: Path | None = None) -> Statistics:
    """The statistics of a source: read from the cache, or measured and written to the cache.

    The default of `folder` is $XDG_CACHE_HOME/implicit/statistics, or ~/.cache/implicit/statistics. A damaged file is
    replaced. If the cache cannot be written, the function warns.
    """
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "implicit" / "statistics"
    key = hashing.of_parts([f"{FORMAT} {source.digest} {extractor.name} {extractor.digest}"])
    file = folder / f"{key[:32]}.safetensors"
    try:
        return load(file, extractor)
    except ValueError:
        pass  # the file is missing or damaged
    found = measure(source, extractor)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save(found, file)
    except OSError as error:
        warnings.warn(f"The statistics of {source.name} cannot be cached in {folder} ({error}).", stacklevel=2)
    return found


def save(statistics: Statistics, file: Path) -> None:
    """Write the statistics as safetensors; an interruption leaves no incomplete file."""
    tensors = {"mean": statistics.pooled.mean, "cov": statistics.pooled.cov}
    if statistics.spatial is not None:
        tensors |= {"spatial_mean": statistics.spatial.mean, "spatial_cov": statistics.spatial.cov}
    if statistics.features is not None:
        tensors["features"] = statistics.features
    with atomic_path(file) as partial:
        save_file(
            {name: value.contiguous() for name, value in tensors.items()},
            partial,
            metadata={"provenance": json.dumps(statistics.provenance), "sha256": hashing.of_tensors(tensors)},
        )


def load(file: Path, extractor: Extractor) -> Statistics:
    """Statistics from a file, .safetensors or ADM's .npz.

    Raises:
        ValueError: the file cannot be read, or holds statistics of other features than the extractor's.
    """
    if file.suffix == ".npz":
        return _published(file)
    try:
        with safe_open(file, framework="pt") as held:
            metadata = held.metadata() or {}
            tensors = {name: held.get_tensor(name) for name in held.keys()}
        if metadata.get("sha256") not in (None, hashing.of_tensors(tensors)):  # None: a file of an earlier version
            raise ValueError("its tensors do not fit their checksum")
        provenance = json.loads(metadata["provenance"])
        features, _ = provenance["features"], provenance["data"]["name"]
        pooled = _gaussian(tensors["mean"], tensors["cov"])
        spatial = _gaussian(tensors["spatial_mean"], tensors["spatial_cov"]) if "spatial_mean" in tensors else None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{file} holds no statistics ({error!r}); give the images, or another file.") from None
    if features != {"name": extractor.name, "sha256": extractor.digest}:
        raise ValueError(
            f"{file} holds statistics of the features {features['name']}, whose name or weights differ from those of "
            f"{extractor.name} here; give the reference images, or the same --features."
        )
    return Statistics(provenance, pooled, spatial, tensors.get("features"))


def _gaussian(mean: Tensor, cov: Tensor) -> Gaussian:
    """The Gaussian; raises ValueError unless `mean` is (D,), `cov` is (D, D), both are finite, and `cov` is symmetric
    (to rounding) without a negative variance.
    """
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(f"a mean {tuple(mean.shape)} and a covariance {tuple(cov.shape)} are not (D,) and (D, D)")
    if not (mean.isfinite().all() and cov.isfinite().all()):
        raise ValueError("its mean or its covariance is not finite")
    size = cov.abs().max()
    if (cov - cov.T).abs().max() > 1e-3 * size or cov.diagonal().min() < -1e-6 * size:
        raise ValueError("its covariance is not symmetric, or has a negative variance")
    return Gaussian(mean, cov)


def is_statistics(file: Path) -> bool:
    """Whether a file holds statistics rather than images."""
    if file.suffix == ".npz" and file.is_file():
        try:
            with zipfile.ZipFile(file) as archive:
                return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
        except DAMAGED:
            return False
    return file.suffix == ".safetensors"


def _real(values: Any) -> Tensor:
    if values.dtype.kind not in "fiu":
        raise ValueError(f"its values are {values.dtype}, not real numbers")
    return torch.from_numpy(values).double()


def _published(file: Path) -> Statistics:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            held = {name: _real(arrays[name]) for name in arrays.files if name in ("mu", "sigma", "mu_s", "sigma_s")}
        pooled = _gaussian(held["mu"], held["sigma"])
        spatial = _gaussian(held["mu_s"], held["sigma_s"]) if "mu_s" in held else None
    except (*DAMAGED, TypeError) as error:
        raise ValueError(f"{file} holds no statistics ({error}); give the images, or another file.") from None
    return Statistics({"data": {"name": str(file)}, "features": {"name": "as published"}}, pooled, spatial, None)
