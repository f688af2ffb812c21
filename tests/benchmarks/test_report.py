"""The report is made from the result files alone, and says what was not measured."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from scipy import integrate

from benchmarks.diffusion import run as bench_diffusion
from benchmarks.report import build as report
from benchmarks.report.sections import size_and_memory
from benchmarks.report.significance import p_value

RESULTS = Path(report.__file__).parents[1] / "results"


@pytest.fixture(autouse=True)
def unsaved(request, monkeypatch):
    """Figures are drawn in all tests and written in one."""
    if request.function is not test_a_deleted_file_leaves_its_rows_not_measured:
        monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


def built(tmp_path, *names, change=None):
    for name in names:
        found = json.loads((RESULTS / name).read_text())
        if change:
            change(found)
        (tmp_path / name).write_text(json.dumps(found))
    return report.build(tmp_path, tmp_path / "docs" / "report.md")


def section(text, title):
    return next(part for part in text.split("\n## ") if part.startswith(title))


def test_without_results_every_number_is_not_measured(tmp_path):
    text = built(tmp_path)
    assert not re.search(r"\d\.\d\d ±", text)
    for part in text.split("\n## ")[1:]:
        assert report.NOTHING in part


def test_numbers_are_those_of_the_file_and_verdicts_follow_them(tmp_path):
    text = section(built(tmp_path, "experiment_estimators.json"), "Gradient estimators")
    cells = json.loads((RESULTS / "experiment_estimators.json").read_text())["cells"]
    distances = [c["samples"]["20 x 10"]["frechet"] for name, c in cells.items() if name.startswith("JFB, seed")]
    assert f"| JFB | {sum(distances) / 3:.2f} ± " in text

    def given(ours, theirs):
        def change(found):
            for name, cell in found["cells"].items():
                estimator, seed = name.rsplit(", seed ", 1)
                distance = {"S-JFB(6, 3)": ours, "JFB": theirs}.get(estimator)
                if distance:
                    cell["samples"]["20 x 10"]["frechet"] = distance + int(seed) / 10

        return section(built(tmp_path, "experiment_estimators.json", change=change), "Gradient estimators")

    assert "*S-JFB beats JFB*: **yes**" in given(1.0, 2.0)
    assert "*S-JFB beats JFB*: **no, the reverse**" in given(2.0, 1.0)
    assert "*S-JFB beats JFB*: **within the spread of seeds**" in given(2.0, 2.1)
    assert "*S-JFB beats JFB*: **undecided**" in given(20.0, 30.0)


def test_claims_come_first_and_are_those_of_the_sections(tmp_path):
    text = built(tmp_path, "experiment_estimators.json", "experiment_depth.json")
    first, second = section(text, "Claims"), section(text, "Gradient estimators")
    assert text.index("## Claims") < min(text.index(f"## {name}") for name in ("Size and memory", "Depth"))
    assert first.count("\n| ") == 2 + len(re.findall(r"^(?:The|Beyond the) paper: \*", text, re.MULTILINE))
    depths = re.findall(r"^\| FPDM beats a DiT of (\d+) blocks [^|,]*(?:, \w+)?\)(, not)?", first, re.MULTILINE)
    assert {depth for depth, other in depths if not other} == {"28"} and len(depths) > 4
    word = re.search(r"The paper: \*S-JFB beats JFB\*: (\*\*.+?\*\*)", second)
    assert word and f"| S-JFB beats JFB | {word[1]}" in first


def test_depth_names_what_did_not_finish(tmp_path):
    def drop(found):
        for name in list(found["cells"]):
            if name.startswith("digits, short: DiT 28"):
                del found["cells"][name]

    text = section(built(tmp_path, "experiment_depth.json", change=drop), "Depth")
    assert "| DiT 28 | not measured |" in text
    rows = json.loads((RESULTS / "experiment_depth.json").read_text())["cells"]
    short = {name: cell for name, cell in rows.items() if name.startswith("digits, short: DiT 3")}
    mean = statistics.fmean(cell["samples"]["20 steps"]["frechet"] for cell in short.values())
    assert re.search(rf"\| DiT 3 \| [\d,]+ \|.*\| {mean:.2f}", text)


def test_a_missing_seed_is_reported(tmp_path):
    def drop(found):
        del found["cells"]["JFB, seed 2"]

    text = built(tmp_path, "experiment_estimators.json", change=drop)
    assert re.search(r"\| JFB \| [\d.]+ ± [\d.]+ \(2 seeds\)", text)


def test_a_deleted_file_leaves_its_rows_not_measured(tmp_path):
    """Every result file is named by a section, and each of its sections says so where the file is missing.

    peers_jax.json is merged into solvers.json; the others left out stand in guides.
    """
    elsewhere = (
        "peers_jax",
        "published",
        "public_problems",
        "warm_adjoint",
        "contractions",
        "own_images",
        "shipped_sampling",
    )
    full = {part: part.section(RESULTS, tmp_path) for part in report.SECTIONS}
    empty = {part: part.section(tmp_path, tmp_path) for part in report.SECTIONS}
    for name in (path.name for path in RESULTS.glob("*.json") if path.stem not in elsewhere):
        sections = [part for part, text in full.items() if name in text]
        assert sections, name
        for part in sections:
            assert empty[part].count(report.NOTHING) > full[part].count(report.NOTHING), name


@pytest.mark.parametrize(
    ("result", "page", "write"),
    [
        ("memory_xl.json", "imagenet.md", report.recipe),
        ("shipped.json", "sampling.md", report.sampling),
    ],
)
def test_pages_beside_the_report_quote_the_results(tmp_path, result, page, write):
    text = (report.ROOT / "docs" / page).read_text()
    (tmp_path / page).write_text(re.sub(r"(<!-- \w+ -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL))
    write(RESULTS / result, tmp_path / page)
    assert (tmp_path / page).read_text() == text


@pytest.mark.parametrize("part", report.SECTIONS, ids=lambda part: part.__name__.rsplit(".", 1)[1])
def test_a_file_cut_short_is_named(tmp_path, part):
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text('{"tables": ')
    (tmp_path / "gpu_diffusion_h.json").write_text("[]")
    for name in ("memory_xl.json", "compute_xl.json", "shipped.json", "experiment_objectives.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(SystemExit, match=r"\.json"):
        part.section(tmp_path, tmp_path)


def test_cells_without_a_number_are_dashes(tmp_path):
    text = report.costs.section(RESULTS, tmp_path)
    assert "| - |" in text and "None" not in text


def test_networks_are_counted_by_the_seeds_that_were_run(tmp_path):
    def more(found):
        cells = found["cells"]
        cells |= {name.replace("seed 0", "seed 7"): cell for name, cell in cells.items() if "seed 0" in name}
        del cells["JFB, seed 7"]

    text = built(tmp_path, "experiment_estimators.json", change=more)
    assert "23 of 24 networks, seeds 0, 1, 2, 7" in section(text, "Gradient estimators")


def test_the_steps_command_writes_what_the_report_reads(tmp_path):
    out = tmp_path / "gpu_tiny.json"
    bench_diffusion.main(["--scale", "tiny", "--repeats", "2", "--tables", "around the block", "--out", str(out)])
    rows = json.loads(out.read_text())["tables"]["around the block"]["rows"]
    text = section(report.build(tmp_path, tmp_path / "docs" / "report.md"), "On a GPU")
    for row in rows:
        assert f"| {row['solver']} | {row['evaluations']} | " in text
    with pytest.raises(SystemExit, match="2"):
        bench_diffusion.main(["--scale", "tiny"])


def test_differences_without_spread_have_a_p_value_of_0_or_1():
    assert p_value([1.0, 1.0], [1.0, 1.0], True) == 1 and p_value([1.0, 1.0], [2.0, 2.0], True) == 0
    assert p_value([1.0, 1.4, 1.3], [1.9, 1.5, 2.6], False) == pytest.approx(welch([1.0, 1.4, 1.3], [1.9, 1.5, 2.6]))


def welch(a, b):
    """Welch's test from its definition; the tail of Student's t by numerical integration."""
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    t = abs(statistics.fmean(a) - statistics.fmean(b)) / (va + vb) ** 0.5
    dof = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    density = lambda x: (1 + x * x / dof) ** (-(dof + 1) / 2)  # noqa: E731
    return integrate.quad(density, t, math.inf)[0] / integrate.quad(density, 0, math.inf)[0]


def test_budgets_say_who_is_ahead(tmp_path):
    def change(found):
        for name, cell in found["cells"].items():
            for way, sample in cell["samples"].items():
                small = int(re.findall(r"\d+", way)[0]) < 100
                sample["frechet"] = (1.0 if name.startswith("FPDM") == small else 2.0) + int(name[-1]) / 100

    text = section(built(tmp_path, "experiment_sampling.json", change=change), "FPDM and DiT")
    assert re.search(r"FPDM is ahead at (\d+ block passes, )*60 block passes, MACs of", text)
    assert re.search(r"the DiT is ahead at 120 block passes, 240 block passes, MACs of 120", text)


def test_memory_at_full_size_is_read_from_the_file_of_a_gpu(tmp_path):
    def row(network, estimator, peak, checkpointed=False):
        found = {"network": network, "estimator": estimator, "checkpointed": checkpointed, "batch": 8}
        return found | {"peak MiB": peak}

    rows = [row("DiT", "", 40_000), row("DiT", "", 9_000, True), row("FPDM", "S-JFB (6, 7), the expected draw", 10_000)]
    rows.append(row("FPDM", "S-JFB (12, 12), the worst draw", 20_000))
    (tmp_path / "gpu_diffusion_bf16_8.json").write_text(json.dumps({"tables": {"training step": {"rows": rows}}}))
    text = size_and_memory.section(tmp_path, tmp_path)
    expected = "S-JFB (6, 7), the expected draw (`gpu_diffusion_bf16_8.json`)"
    assert f"at XL/2*: on a GPU 75 % less at batch 8, {expected}" in text
    (tmp_path / "gpu_diffusion_bf16_8.json").unlink()
    assert f"at XL/2*: on a GPU {report.NOTHING};" in size_and_memory.section(tmp_path, tmp_path)
