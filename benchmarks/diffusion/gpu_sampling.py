"""Seconds of sampling the networks in the repository on a CUDA device, one timestep after another and in parallel.

python -m benchmarks.diffusion.gpu_sampling     writes benchmarks/results/gpu_sampling.json

20 timesteps of DDIM with the networks' own guidance and iterations. The root mean square difference is that of pixels
in 0..1 from the sequential sampler.
"""

import statistics
from typing import Any

from apps.diffusion.checkpoint.open_network import open_network
from benchmarks.diffusion.shipped_sampling import STEPS, draw, rms
from benchmarks.harness import RESULTS, gpu_options, paired, provenance, write_result

WAYS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "parallel, picard": {"parallel": "picard", "parallel_rtol": 1e-3},
    "parallel, anderson": {"parallel": "anderson", "parallel_rtol": 1e-3},
}
BATCHES = (1, 16, 128)


def rows(name: str, repeats: int) -> list[dict[str, Any]]:
    """One row for each batch size and way of sampling."""
    opened, found = open_network(name), []
    opened.to("cuda")
    for count in BATCHES:
        drawn = {way: draw(opened, count, **options) for way, options in WAYS.items()}
        times = paired({w: lambda o=o, n=count: draw(opened, n, **o) for w, o in WAYS.items()}, repeats, "cuda")
        for way, result in drawn.items():
            rounds = result.effort.rounds
            pairs = zip(times["sequential"], times[way], strict=True)
            found.append(
                {
                    "network": name,
                    "samples": count,
                    "sampling": way,
                    "rounds": STEPS if rounds is None else int(rounds.max()),
                    "seconds": round(statistics.median(times[way]), 4),
                    "times faster": round(statistics.median(one / other for one, other in pairs), 2),
                    "RMS": round(rms(result.samples.cpu(), drawn["sequential"].samples.cpu()), 5),
                }
            )
    return found


def main(arguments: list[str] | None = None) -> None:
    options = gpu_options(__doc__, RESULTS / "gpu_sampling.json", 7, arguments)
    table = [row for name in ("mnist-dit", "mnist-fpdm") for row in rows(name, options.repeats)]
    about = provenance("cuda", "diffusers") | {"repeats": options.repeats, "rows": table}
    tables = {"sampling the networks in the repository": about}
    write_result(options.out, {"command": "python -m benchmarks.diffusion.gpu_sampling", "tables": tables})


if __name__ == "__main__":
    main()
