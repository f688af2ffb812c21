"""Training objectives of FPDM and of DiTs of three and six blocks, at equal CPU time.

digits              8 x 8 pixels, 2 CPU minutes each
mnist               28 x 28 pixels, 10 CPU minutes, the objectives of `ON_MNIST`
mnist, 4 minutes    28 x 28 pixels, 4 CPU minutes, the objectives of `SHORT_ON_MNIST` and, for FPDM, of `SHORT_ON_IMAGE`

The base objective is the velocity of a diffusion with zero terminal SNR and uniform timesteps. Every other cell differs
from the base in one option, or in the target and one option. FPDM has one block before and one after the fixed-point
layer, S-JFB (2, 2) and a contractive start.
"""

from dataclasses import replace

from apps.diffusion.config.loss import LossConfig
from apps.diffusion.config.network import NoiseSchedule
from apps.diffusion.config.training import Config
from apps.diffusion.sampling.sampler import Solve
from apps.diffusion.sampling.warm_start import Reuse
from benchmarks.experiments.common import SCALES, Cell, Way, dit, fixed, fpdm, on_mnist
from implicit import StochasticJFB

BASE = "v"
SHARED = {
    BASE: {},
    "rectified flow": {"schedule": NoiseSchedule(kind="rectified_flow")},
    "min-SNR": {"loss": LossConfig(weighting="min_snr")},
    "x0": {"schedule": NoiseSchedule(prediction="sample")},
    "epsilon": {"schedule": NoiseSchedule(prediction="epsilon", zero_snr=False)},
    "rectified flow, logit-normal": {
        "schedule": NoiseSchedule(kind="rectified_flow"),
        "loss": LossConfig(timesteps="logit_normal"),
    },
}
"""Objective -> options that differ from the base, for FPDM and DiT."""
FIXED_POINT = {
    "any-time": {"loss": LossConfig(early=0.3)},
    "terminal": {"loss": LossConfig(residual=0.1)},
    "growing to (6, 3)": {"grad": StochasticJFB(N=6, M=3), "growth": 1.0},
    "consistent": {"loss": LossConfig(reuse=0.3)},
    "Jacobian": {"loss": LossConfig(jacobian=0.01)},
    "noisy start": {"loss": LossConfig(start_noise=0.3)},
}
"""Objective -> options that differ from the base, for FPDM only."""
ON_IMAGE = {f"x0, {name}": SHARED["x0"] | changes for name, changes in FIXED_POINT.items()}
"""Objective -> options that differ from the base, for FPDM with the image as target."""
SHORT_ON_IMAGE = {name: changes for name, changes in ON_IMAGE.items() if "growing" not in name}
"""Those after 4 minutes on mnist; growing iterations are a cell of the study of settings there."""
ITERATIONS = (2, 5, 12)
ON_MNIST = (BASE, "x0", "rectified flow, logit-normal")
SHORT_ON_MNIST = {
    "x0": SHARED["x0"],
    "rectified flow, logit-normal": SHARED["rectified flow, logit-normal"],
    "x0, min-SNR": SHARED["x0"] | SHARED["min-SNR"],
}
"""Objective -> options that differ from the base, for FPDM and the DiT of three blocks after 4 minutes on mnist."""


def cells(scale: str) -> list[Cell]:
    seconds = SCALES[scale]["objectives"]
    options = SHARED | FIXED_POINT | ON_IMAGE
    found = [
        Cell(f"{network}: {name}", replace(base, **changes), _ways(base))
        for name, changes in options.items()
        for network, base in _networks(seconds).items()
        if network == "FPDM" or name in SHARED
    ]
    found += [
        Cell(f"mnist, {network}: {name}", replace(on_mnist(base), **options[name]), _ways(base))
        for name in ON_MNIST
        for network, base in _networks(5 * seconds).items()
    ]
    short = _networks(2 * seconds)
    studied = {"FPDM": SHORT_ON_MNIST | SHORT_ON_IMAGE, "DiT 3": SHORT_ON_MNIST}
    return found + [
        Cell(f"mnist, 4 minutes, {network}: {name}", replace(on_mnist(base), **changes), _ways(base))
        for network, objectives in studied.items()
        for base in (short[network],)
        for name, changes in objectives.items()
    ]


def _networks(seconds: float) -> dict[str, Config]:
    found = {"FPDM": fpdm(seconds, StochasticJFB(N=2, M=2), recurrent_init=0.0)}
    explicit = dit(seconds)
    return found | {f"DiT {n}": replace(explicit, model=replace(explicit.model, depth=n)) for n in (6, 3)}


def _ways(base: Config) -> tuple[Way, ...]:
    """20 timesteps with 2, 5 and 12 iterations, and with 2 iterations from the previous timestep's solution."""
    if base.model.kind == "dit":
        return (Way("20 steps", 20),)
    reused = Way("20 x 2, reused", 20, lambda model: Solve(iterations=2, reuse=Reuse()))
    return (*(Way(f"20 x {k}", 20, fixed(k)) for k in ITERATIONS), reused)
