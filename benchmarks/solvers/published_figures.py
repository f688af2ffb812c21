"""Counts that other projects publish for the problems of `benchmarks.problems`; None if a method fails.

Each table has its source, its stopping test, and the definition of its counts. We have measured none of these counts.
"""

from dataclasses import dataclass

Counts = dict[str, dict[str, int | None]]


@dataclass(frozen=True)
class Figures:
    """A published table.

    Attributes:
        title: heading of the table.
        source: the publication.
        counting: the stopping test and the definition of a count.
        rows: problem -> method -> count.
        rival: the methods with which our default, an Anderson-type solver, is compared.
    """

    title: str
    source: str
    counting: str
    rows: Counts
    rival: tuple[str, ...]


def _table(methods: str, rows: dict[str, str]) -> Counts:
    """Parses rows of counts in the order of `methods`; `*` is a failed method, `-` a missing count."""
    names = methods.split(", ")
    table: Counts = {}
    for problem, text in rows.items():
        cells = zip(names, text.split(), strict=True)
        table[problem] = {name: None if cell == "*" else int(cell) for name, cell in cells if cell != "-"}
    return table


# residuals of iterations 0 to 4: electronic-structure/SIRIUS pull request 584, test_anderson, history 4, beta 0.15
SIRIUS = (10.5834653557077, 12.3118067791144, 2.37025102260193, 0.321327286201523, 0.0401066072844496)

KINSOL = Figures(
    "SUNDIALS KINSOL",
    "LLNL/sundials, examples/kinsol/serial, kinAnalytic_fp*.out and kinRoberts_fp.out (2025)",
    "Iterations until the largest entry of the residual is at most the tolerance (1.49e-6; Roberts 1e-10).",
    {
        "KINSOL analytic": {"fixed point": 5, "Anderson(2)": 5, "Anderson(2), damping 0.5": 8, "Anderson(3)": 5},
        "KINSOL Roberts": {"Anderson(2)": 8},
    },
    ("Anderson(2)", "Anderson(3)"),
)

R_PACKAGE = Figures(
    "R package FixedPoint",
    "S. Baumann and M. Klymak, CRAN package FixedPoint, vignette section 5 and tests/testthat",
    "Evaluations of the map until the largest entry of the residual is below 1e-10 (gas diffusion 1e-4, perceptrons "
    "and prices 1e-13).",
    _table(
        "Simple, Anderson, Aitken, Newton, VEA, SEA, MPE, RRE, SQUAREM",
        {
            "Babylonian (1)": "6 7 7 7 6 6 6 6 6",
            "Babylonian (100)": "9 30 9 9 11 9 9 9 9",
            "cos": "58 7 11 9 13 13 19 25 55",
            "x^(1/3)": "22 12 9 9 13 13 9 10 12",
            "95 (18 - x)": "* 5 3 3 25 * 19 7 *",
            "Simple vector": "105 14 67 239 20 25 31 31 44",
            "Gas diffusion": "221 26 323 * 150 221 44 50 159",
            "Perceptron": "1121 * * * * * * * *",
            "Modified perceptron": "1156 * * 20 75 158 54 129 638",
            "Equilibrium prices": "11 9 14 24 11 11 11 12 11",
            "Perpetual put": "103 37 203 * 108 103 43 52 103",
            "Consumption smoothing": "459 17 * * 204 * 61 97 93",
        },
    ),
    ("Anderson",),
)

SPEED_MAPPING = Figures(
    "SpeedMapping.jl on FixedPointTestProblems.jl",
    "N. Lepage-Saucier, SpeedMapping.jl, docs/benchmarking_code (commit 0489fe0), FixedPointTestProblems.jl (bc5a9db)",
    "Evaluations of the map until the Euclidean norm of the residual is below 1e-7 (Wang and Lange 1e-5, lid-driven "
    "cavity 1e-4). Their Anderson keeps 30 lags. FPA is FixedPointAcceleration.jl.",
    _table(
        "AA, AA adaptive, AA monotone, FPA Anderson, FPA MPE, ACX, FixedPoint.jl",
        {
            "Hasselblad EM": "21 21 17 23 38 52 21627",
            "Exchange economy": "7 7 7 7 7 7 286",
            "Wang, proportional hazards": "213 302 127 234 122 346 159056",
            "Three normals EM": "29 33 28 32 67 55 4220",
            "Higham correlation": "21 25 21 24 43 60 3755",
            "Power iteration": "14 13 14 14 14 18 303",
            "Linear": "77 72 77 77 175 108 8008",
            "Consumption smoothing": "18 20 18 20 223 82 -",
            "CP by ALS": "654 315 654 3032 61 64 9712",
            "Lange ancestry": "- - 929 - 989 934 -",
            "Bratu": "865 256 865 1425 - 2223 -",
            "Electric field, Gauss-Seidel": "286 281 286 286 - 432 115278",
            "Electric field, SOR": "376 373 376 376 380 420 -",
            "Electric field, Jacobi": "768 353 768 1052 - 893 196154",
            "Lid-driven cavity": "5789 4904 5789 - - 4212 297706",
        },
    ),
    ("AA", "AA adaptive", "AA monotone", "FPA Anderson"),
)

SYSTEMS = Figures(
    "Twenty-three classical systems",
    "N. Lepage-Saucier, SpeedMapping.jl, docs/benchmarking_code/Nonlinear_solving_benchmarks.jl (commit 4bacab5)",
    "Evaluations of F until its Euclidean norm is below 1e-7. A Jacobian by ForwardDiff counts there as one "
    "evaluation, of as many as ten directional derivatives at once. Watson's F differs (see `problems/systems.py`).",
    _table(
        "SpeedMapping AA, NonlinearSolve default, NonlinearSolve Levenberg-Marquardt, NLsolve Newton, NLsolve Anderson",
        {
            "Rosenbrock": "346 26 204 * *",
            "Powell singular": "35 32 61 234 *",
            "Powell badly scaled": "31 28 61 70 22",
            "Wood": "351 32 76 135 *",
            "Helical valley": "81 24 37 77 *",
            "Watson": "30 22 39 55 *",
            "Chebyquad": "13 14 25 35 *",
            "Brown almost linear": "18 184 45 1932 *",
            "Discrete boundary value": "19 8 37 105 15",
            "Discrete integral equation": "14 10 22 105 *",
            "Trigonometric": "49 18 * 189 *",
            "Variably dimensioned": "32 32 105 336 *",
            "Broyden tridiagonal": "25 12 28 126 *",
            "Broyden banded": "35 14 28 147 *",
            "Hammarling 2 x 2": "38 24 130 117 *",
            "Hammarling 3 x 3": "31 24 130 247 *",
            "Dennis-Schnabel": "16 14 33 35 *",
            "Sample 18": "16 14 29 45 18",
            "Sample 19": "31 38 79 225 *",
            "x (x - 5)^2": "28 16 30 21 11",
            "Freudenstein-Roth": "35 88 * 365 *",
            "Boggs": "50 10 28 25 15",
            "Chandrasekhar": "14 12 25 126 *",
        },
    ),
    ("SpeedMapping AA",),
)

TABLES = (KINSOL, R_PACKAGE, SPEED_MAPPING, SYSTEMS)
