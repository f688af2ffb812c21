"""Training objectives of FPDM and of a DiT of six blocks, on digits, at equal CPU time.

The base is the velocity of a diffusion with zero terminal SNR, uniform over its timesteps; every other cell changes one
thing. FPDM: one block before and one behind the fixed-point layer, S-JFB (2, 2), contractive start.
"""

from dataclasses import replace

from apps.diffusion.config.loss import LossConfig
from apps.diffusion.config.network import NoiseSchedule
from apps.diffusion.config.training import Config
from apps.diffusion.sampling.sampler import Solve
from apps.diffusion.sampling.warm_start import Reuse
from benchmarks.experiments.common import SCALES, Cell, Way, dit, fixed, fpdm
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
"""Changes of the base by objective, for both networks."""
FIXED_POINT = {
    "any-time": {"loss": LossConfig(early=0.3)},
    "terminal": {"loss": LossConfig(residual=0.1)},
    "growing to (6, 3)": {"grad": StochasticJFB(N=6, M=3), "growth": 1.0},
    "consistent": {"loss": LossConfig(reuse=0.3)},
    "Jacobian": {"loss": LossConfig(jacobian=0.01)},
    "noisy start": {"loss": LossConfig(start_noise=0.3)},
}
"""Changes of the base that are for an FPDM alone."""
ITERATIONS = (2, 5, 12)


def cells(scale: str) -> list[Cell]:
    seconds = SCALES[scale]["objectives"]
    networks = {"FPDM": fpdm(seconds, StochasticJFB(N=2, M=2), recurrent_init=0.0), "DiT 6": dit(seconds)}
    return [
        Cell(f"{network}: {name}", replace(base, **changes), _ways(base))
        for name, changes in (SHARED | FIXED_POINT).items()
        for network, base in networks.items()
        if network == "FPDM" or name in SHARED
    ]


def _ways(base: Config) -> tuple[Way, ...]:
    """20 timesteps by 2, 5 and 12 iterations, and by 2 from the previous timestep's solution."""
    if base.model.kind == "dit":
        return (Way("20 steps", 20),)
    reused = Way("20 x 2, reused", 20, lambda model: Solve(iterations=2, reuse=Reuse()))
    return (*(Way(f"20 x {k}", 20, fixed(k)) for k in ITERATIONS), reused)
