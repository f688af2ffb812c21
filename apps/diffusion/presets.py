"""Whole configurations by name: a preset is a function that returns one, every choice in sight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .config import EMA, Config, Model, Optimisation, Sampling, StochasticJFB


def digits() -> Config:
    """FPDM on scikit-learn's digits: minutes on two CPU cores. The default."""
    return Config(
        model=Model(kind="fpdm"),
        optimisation=Optimisation(images=1_700 * 64, batch=64, lr=2e-3, warmup=6_400),
        ema=EMA(decay=0.99),
        grad=StochasticJFB(N=6, M=3),
        sampling=Sampling(sampler="ddpm", steps=20, iterations=10),
        max_time=220.0,
        out=Path("runs/digits"),
    )


def digits_dit() -> Config:
    """The DiT baseline on the same data for the same time."""
    return Config(
        model=Model(kind="dit"),
        optimisation=Optimisation(images=1_700 * 64, batch=64, lr=2e-3, warmup=6_400),
        ema=EMA(decay=0.99),
        sampling=Sampling(sampler="ddpm", steps=20),
        max_time=220.0,
        out=Path("runs/digits-dit"),
    )


PRESETS: dict[str, Callable[[], Config]] = {"digits": digits, "digits-dit": digits_dit}
