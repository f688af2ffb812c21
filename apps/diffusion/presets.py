"""Whole configurations by name: a preset is a function that returns one, every choice in sight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .config import EMA, Config, Data, Model, Optimisation, Sampling, StochasticJFB


def digits() -> Config:
    """FPDM on scikit-learn's digits: minutes on one CPU core. The default.

    Patches of 4 pixels, that is four tokens: 2.6 times as many steps as sixteen tokens in the same time. The explicit
    layers see the time as well as the class: 98.7 against 95.7 % of the labels right (one seed, otherwise equal).
    """
    return Config(
        model=Model(kind="fpdm", patch=4, condition_on_time=True),
        optimisation=Optimisation(images=3_000 * 64, batch=64, lr=2e-3, warmup=6_400),
        ema=EMA(decay=0.99),
        grad=StochasticJFB(N=6, M=3),
        sampling=Sampling(sampler="ddpm", steps=20, iterations=10),
        max_time=240.0,
        threads=1,
        out=Path("runs/digits"),
    )


def digits_dit() -> Config:
    """The DiT baseline on the same data for the same time."""
    return Config(
        model=Model(kind="dit", patch=4),
        optimisation=Optimisation(images=3_000 * 64, batch=64, lr=2e-3, warmup=6_400),
        ema=EMA(decay=0.99),
        sampling=Sampling(sampler="ddpm", steps=20),
        max_time=240.0,
        threads=1,
        out=Path("runs/digits-dit"),
    )


def pictures() -> Config:
    """FPDM on a folder of pictures: `folder --data.path PICTURES --data.size 32 --out RUN`."""
    return Config(
        model=Model(kind="fpdm", size="S", patch=4, condition_on_time=True),
        data=Data(source="folder", path=Path("pictures"), size=32),
        optimisation=Optimisation(images=20_000_000, batch=128, lr=3e-4, warmup=128_000),
        ema=EMA(decay=0.9999),
        grad=StochasticJFB(N=12, M=12),
        sampling=Sampling(steps=50, iterations=12, images=64),
        checkpoint_every=512_000,
        keep=2,
        out=Path("runs/folder"),
    )


def latents() -> Config:
    """FPDM on VAE latents: `latents --data.path LATENTS --out RUN`."""
    return replace(
        pictures(),
        model=Model(kind="fpdm", size="S", patch=2, condition_on_time=True),
        data=Data(source="latents", path=Path("latents")),
        out=Path("runs/latents"),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "digits": digits,
    "digits-dit": digits_dit,
    "folder": pictures,
    "latents": latents,
}
