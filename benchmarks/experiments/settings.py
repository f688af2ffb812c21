"""Settings of FPDM's training by S-JFB: N and M, a contractive start, and iterations that grow with training.

digits, 2 minutes    8 x 8 pixels, 2 CPU minutes each
digits, 5 minutes    8 x 8 pixels, 5 CPU minutes
mnist, 4 minutes     28 x 28 pixels, 4 CPU minutes

Networks predict the image, as the presets do. FPDM has one block before and one after the fixed-point layer.
"""

from dataclasses import replace

from apps.diffusion.config.network import NoiseSchedule
from benchmarks.experiments.common import SCALES, Cell, Way, fixed, fpdm, on_mnist
from implicit import StochasticJFB

PRESET = "(2, 2), contractive"
SETTINGS = {
    "(6, 3)": (6, 3, 1.0, 0.0),
    "(6, 3), contractive": (6, 3, 0.0, 0.0),
    "(2, 2)": (2, 2, 1.0, 0.0),
    PRESET: (2, 2, 0.0, 0.0),
    "growing to (6, 3), contractive": (6, 3, 0.0, 1.0),
}
"""Title -> N, M, the factor on the initial recurrent weights, and the part of training over which N and M grow."""
LENGTHS = {"digits, 2 minutes": 1, "digits, 5 minutes": 2.5, "mnist, 4 minutes": 2}
"""Training times by task, as multiples of the time of the scale."""
ITERATIONS = (2, 5, 12)


def cells(scale: str) -> list[Cell]:
    found = []
    for task, factor in LENGTHS.items():
        for name, (free, tracked, start, growth) in SETTINGS.items():
            seconds = factor * SCALES[scale]["settings"]
            base = fpdm(seconds, StochasticJFB(N=free, M=tracked), recurrent_init=start)
            base = replace(base, schedule=NoiseSchedule(prediction="sample"), growth=growth)
            config = on_mnist(base) if task.startswith("mnist") else base
            ways = tuple(Way(f"20 x {k}", 20, fixed(k)) for k in ITERATIONS)
            found.append(Cell(f"{task}: {name}", config, ways))
    return found
