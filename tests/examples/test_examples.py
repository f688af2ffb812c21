"""Every program in examples/ runs at a small setting and gives its numbers."""

import importlib
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def program(monkeypatch):
    """Imports a program by its name, as it is when run from its folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("MPLBACKEND", "agg")
    return importlib.import_module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_a_program_fits_150_lines(path):
    assert len(path.read_text().splitlines()) <= 150


def test_hartree_fock_energies_and_forces(program, tmp_path):
    found = program("self_consistent_field").main(["--count", "4", "--figure", str(tmp_path / "scf.png")])
    # Szabo and Ostlund, "Modern Quantum Chemistry": -1.1167 (section 3.5.2) and -2.86066 (appendix B)
    assert found["energy"][:2].tolist() == pytest.approx([-1.1167, -2.86066], abs=5e-5)
    assert found["force"] < 1e-6 and found["second"] < 1e-6
    assert len(set(found["evals"].tolist())) > 1  # each molecule stops by itself
    assert (tmp_path / "scf.png").stat().st_size


def test_deep_equilibrium_classifier(program):
    found = program("deq_digits").main(["--steps", "40"])
    assert found["right"] > 0.8 and found["converged"] == 1 and found["radius"] < 1


def test_graph_network_reads_the_whole_chain(program):
    found = program("implicit_graph_network").main(["--length", "12", "--chains", "20", "--steps", "25"])
    assert found["fixed point"] > 0.9
    # five iterations see five nodes of twelve and guess the others, half of them right
    assert found["5 iterations"] <= 0.5 + 5 / 24 + 0.01


def test_deblurring_at_an_equilibrium_is_flat_in_the_iterations(program):
    curves = program("equilibrium_deblurring").main(["--steps", "40"])
    equilibrium = dict(zip(program("equilibrium_deblurring").DEPTHS, curves["equilibrium"], strict=True))
    assert equilibrium[100] > 14 and equilibrium[100] == pytest.approx(equilibrium[50], abs=0.02)
    assert equilibrium[30] > equilibrium[1] + 1


def test_ensemble_under_vmap_has_the_gradients_of_its_members(program):
    found = program("functional_ensemble").main(["--steps", "15", "--members", "3"])
    assert found["error"] < 1e-5
    assert found["ensemble"] > found["members"] > 0.2


def test_all_minimal_puzzles_of_4_x_4(program):
    puzzles = program("sudoku_puzzles")
    parts = puzzles.splits(4, 0, np.random.default_rng(0))
    every = np.concatenate([part.clues for part in parts.values()])
    assert len(np.unique(every, axis=0)) == len(every)
    assert len(every) * 24 == 85_632  # 25,728 + 58,368 + 1,536 of 4, 5 and 6 clues
    assert np.bincount((every > 0).sum(1))[4:].tolist() == [1072, 2432, 64]
    train = {row.tobytes() for row in parts["train"].solutions}
    assert not train & {row.tobytes() for row in parts["new"].solutions}


@pytest.mark.parametrize("size", [4, 6])
def test_a_puzzle_has_one_solution_and_needs_every_clue(program, size):
    puzzles = program("sudoku_puzzles")
    rng = np.random.default_rng(1)
    for part in puzzles.splits(size, 6, rng).values():
        clues, solutions = puzzles.relabeled(part, 4, rng)
        for given, answer in zip(clues, solutions, strict=True):
            (only,) = puzzles.solutions(given, limit=2)
            assert (only == answer).all()
            assert (puzzles.units(size) @ answer == size * (size + 1) // 2).all()
            for cell in np.flatnonzero(given):
                fewer = np.where(np.arange(size**2) == cell, 0, given)
                assert len(puzzles.solutions(fewer, limit=2)) == 2


def test_a_looped_reasoner_gains_from_iterations_and_from_starts(program, monkeypatch, capsys):
    sudoku = program("sudoku")
    rng = np.random.default_rng(0)
    data = sudoku.splits(4, 0, rng)
    model = sudoku.Reasoner(4, False, 0, width=64, hidden=128)
    ticks = itertools.count()
    monkeypatch.setattr(sudoku.time, "process_time", lambda: float(next(ticks)))  # a step takes a second
    monkeypatch.setattr(sudoku, "BREADTH", (16,))
    assert sudoku.train(model, data["train"], 200, 0.1, rng) == 199
    clues, solutions = map(torch.from_numpy, sudoku.relabeled(data["unseen"], 50, rng))
    shares = dict(zip(sudoku.DEPTHS, sudoku.report(model, model.embed(clues), solutions), strict=True))
    assert shares[64] >= 0.6 and shares[64] > shares[16] > shares[4]
    ((one, best),) = re.findall(r"one start ([\d.]+)%, best of 8 ([\d.]+)%", capsys.readouterr().out)
    assert float(best) > float(one)


@pytest.mark.parametrize(("twin", "stay"), [(False, 1.0), (False, 0.0), (True, 1.0)])
def test_a_step_continues_from_the_state_of_a_puzzle_that_stays(program, monkeypatch, twin, stay):
    sudoku = program("sudoku")
    rng = np.random.default_rng(0)
    data = sudoku.splits(4, 0, rng)
    model = sudoku.Reasoner(4, twin, 0, width=8, hidden=8)
    begun, ended = [], []

    def record(_, given, solution):
        begun.append(given[0].detach())
        ended.append(solution.value.detach())

    model.deq.register_forward_hook(record)
    ticks = itertools.count()
    monkeypatch.setattr(sudoku.time, "process_time", lambda: float(next(ticks)))
    monkeypatch.setattr(sudoku, "STAY", stay)
    sudoku.train(model, data["train"], 3, 0.0, rng)
    assert len(begun) == 2
    assert torch.equal(begun[1], ended[0]) == (stay == 1 and not twin)
    assert begun[0].std().item() == pytest.approx(0 if twin else 1, abs=0.05)


@pytest.mark.parametrize("twin", [False, True])
def test_the_networks_take_6_x_6(program, monkeypatch, twin):
    sudoku = program("sudoku")
    rng = np.random.default_rng(0)
    data = sudoku.splits(6, 6, rng)
    ticks = itertools.count()
    monkeypatch.setattr(sudoku.time, "process_time", lambda: float(next(ticks)))
    model = sudoku.Reasoner(6, twin, 0, width=16, hidden=16)
    assert sudoku.train(model, data["train"], 4, 0.1, rng) == 3
    clues, solutions = map(torch.from_numpy, sudoku.relabeled(data["new"], 3, rng))
    assert sudoku.report(model, model.embed(clues), solutions)[0] == 0
    assert sum(p.numel() for p in sudoku.Reasoner(6, twin, 0).parameters()) == pytest.approx(5e5, rel=0.02)
