"""Code that all experiments share: cells, models, training for a CPU time, sampling and scoring."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import nn

from apps.diffusion.config.presets import mnist
from apps.diffusion.config.training import Config, DataConfig, EMAConfig, Grad, ModelConfig, OptimizerConfig
from apps.diffusion.data import TensorDataset
from apps.diffusion.data import build as data
from apps.diffusion.sampling.sampler import SamplingPlan, Solve, sample
from apps.diffusion.schedulers import noise_schedule as schedule
from apps.diffusion.schedulers.timesteps import timesteps
from apps.diffusion.training.trainer import Trainer
from benchmarks.harness import peak_bytes, processor, provenance
from benchmarks.image_scorer import ImageScorer
from implicit import StochasticJFB

Sizes = dict[str, dict[str, float]]
SCALES: Sizes = {  # CPU seconds of training by study, and samples per score
    "full": {
        "sampling": 120,
        "estimators": 100,
        "iteration-split": 60,
        "outer-blocks": 60,
        "depth": 120,
        "settings": 120,
        "objectives": 120,
        "samples": 500,
    },
    "tiny": {
        "sampling": 1,
        "estimators": 1,
        "iteration-split": 1,
        "outer-blocks": 0.3,
        "depth": 0.2,
        "settings": 0.2,
        "objectives": 0.2,
        "samples": 20,
    },
}


@dataclass(frozen=True)
class Way:
    """A sampling setting: `steps` timesteps and, for an FPDM, the solves of the fixed point."""

    name: str
    steps: int
    solve: Callable[[Any], Solve | None] = lambda model: None


@dataclass(frozen=True)
class Cell:
    """One network to train, and its sampling settings."""

    name: str
    config: Config
    ways: tuple[Way, ...]


def fixed(iterations: int) -> Callable[[Any], Solve]:
    """The same number of plain iterations at every timestep."""
    return lambda model: Solve(iterations=iterations)


def fpdm(seconds: float, grad: Grad = StochasticJFB(N=6, M=3), **model: Any) -> Config:
    """A small FPDM: hidden size 64, four tokens, by default one block before and one after the fixed-point layer."""
    return _config(ModelConfig(kind="fpdm", hidden=64, patch=4, condition_on_time=True, **model), seconds, grad)


def dit(seconds: float) -> Config:
    """The explicit baseline: six blocks of the same width."""
    return _config(ModelConfig(kind="dit", hidden=64, patch=4), seconds, StochasticJFB())


def on_mnist(base: Config) -> Config:
    """The configuration with the width, patch size, data and optimizer of the preset `mnist`."""
    preset = mnist()
    return replace(
        base,
        model=replace(base.model, hidden=128, patch=7),
        data=preset.data,
        optimizer=replace(preset.optimizer, images=base.optimizer.images),
        ema=preset.ema,
    )


def _config(model: ModelConfig, seconds: float, grad: Grad) -> Config:
    return Config(
        model=model,
        optimizer=OptimizerConfig(images=10**9, batch=64, lr=2e-3, warmup=6_400),
        ema=EMAConfig(decay=0.99),
        grad=grad,
        max_time=seconds,
        checkpoint_every=10**9,
        track="none",
    )


@cache
def scorer(source: Literal["digits", "mnist"] = "digits") -> tuple[TensorDataset, TensorDataset, ImageScorer]:
    """Training images, held-out images, and the classifier that scores samples.

    The classifier of the 8 x 8 digits is trained on the training images, that of MNIST on the held-out images.
    """
    images, held_out = data.datasets(DataConfig(source=source))
    assert isinstance(images, TensorDataset) and held_out is not None
    return images, held_out, ImageScorer.of(images if source == "digits" else held_out)


def _scorer_of(config: Config) -> tuple[TensorDataset, TensorDataset, ImageScorer]:
    return scorer("mnist" if config.data.source == "mnist" else "digits")


def floor(images: TensorDataset, scorer: ImageScorer, count: int, draws: int = 20) -> dict[str, Any]:
    """Distances of sets of real images with the number and labels of the samples, a lower bound for a network."""
    distances = []
    for draw in range(draws):
        source = torch.Generator().manual_seed(draw)
        shuffled = torch.randperm(len(images), generator=source)
        chosen = torch.cat([shuffled[images.y[shuffled] == label][: count // 10] for label in range(10)])
        distances.append(scorer.score(images.x[chosen], images.y[chosen]).frechet)
    return {"images": count, "draws": draws, "frechet": fmean(distances), "frechet spread": stdev(distances)}


def train(config: Config) -> tuple[nn.Module, dict[str, Any]]:
    """Train for `config.max_time` seconds of this process's CPU time; returns the network with averaged weights and the
    numbers of the training run.
    """
    trainer = Trainer(config, _scorer_of(config)[0])
    began = time.process_time()
    losses: list[float] = []
    while not trainer.finished:
        losses.append(float(trainer.step()[0]))
        trainer.progress.seconds = time.process_time() - began
    trainer.synchronize()
    facts = {
        "steps": trainer.progress.steps,
        "skipped": trainer.progress.skipped,
        "cpu_seconds": trainer.progress.seconds,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "step_peak_bytes": step_peak_bytes(config),
        "loss": sum(losses[-100:]) / len(losses[-100:]),
        "commit": provenance("cpu")["commit"],
        "machine": f"{processor()}, torch {torch.__version__}",
    }
    return trainer.ema.module.eval(), facts


def step_peak_bytes(config: Config, steps: int = 5) -> int:
    """Peak bytes of activations, gradients and temporaries of a training step, the largest over `steps` steps."""
    trainer = Trainer(config, _scorer_of(config)[0])
    return max(peak_bytes(trainer.step) for _ in range(steps))


def kept(path: Path, config: Config) -> tuple[nn.Module, dict[str, Any]] | None:
    """The network saved by an earlier run of the same configuration, or None."""
    found = torch.load(path) if path.exists() else {}
    if found.get("config") != repr(config):
        return None
    network = Trainer(config, _scorer_of(config)[0]).ema.module.eval()
    network.load_state_dict(found["weights"])
    return network, found["facts"]


def score(model: Any, config: Config, way: Way, count: int) -> dict[str, float]:
    """Scores of `count` samples with label i mod 10, by DDIM, or by Euler's steps for a rectified flow."""
    _, _, scorer = _scorer_of(config)
    labels = [i % 10 for i in range(count)]
    began = time.process_time()
    result = sample(
        model,
        range(count),
        labels,
        plan=SamplingPlan(
            scheduler=schedule.same_noise(schedule.scheduler_of(config), config.sampling_options().value("sampler")),
            timesteps=timesteps(way.steps),
            solve=way.solve(model),
        ),
        seed=config.seed,
        chunk=100,
    )
    found = scorer.score(result.samples.clamp(-1, 1), torch.tensor(labels))
    effort = result.effort.summary()
    effort.pop("seconds")
    return {"frechet": found.frechet, "accuracy": found.accuracy, **effort, "cpu_seconds": time.process_time() - began}


@dataclass
class Records:
    """The results of one experiment: a JSON file, rewritten after every cell."""

    path: Path
    about: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def cells(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())["cells"] if self.path.exists() else {}

    def enter(self, key: str, cell: dict[str, Any]) -> None:
        self.cells[key] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({**self.about, "cells": self.cells}, indent=1) + "\n")
        part.replace(self.path)


def run(cell: Cell, seed: int, count: int, path: Path, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train and sample one cell. If `path` holds its network, only the sampling settings that `known` lacks are run."""
    config = replace(cell.config, seed=seed)
    scores = dict(known["samples"]) if known else {}
    if known and all(way.name in scores for way in cell.ways):
        return known
    network = kept(path, config)
    if network is None:
        network, scores = train(config), {}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"config": repr(config), "facts": network[1], "weights": network[0].state_dict()}, path)
    model, facts = network
    for way in cell.ways:
        scores[way.name] = scores.get(way.name) or score(model, config, way, count)
    return {"training": facts, "samples": {way.name: scores[way.name] for way in cell.ways}}
