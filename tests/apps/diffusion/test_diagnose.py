"""The command that diagnoses a trained network's fixed point over the timesteps."""

import json

import pytest
import torch

from apps.diffusion import diagnose
from apps.diffusion.checkpoint import pretrained
from apps.diffusion.checkpoint.open_network import open_network
from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling.diagnosis import diagnose_timesteps
from apps.diffusion.sampling.plan import plan
from apps.diffusion.sampling.sampler import sample
from implicit import Picard, Stop, fixed_point
from implicit.diagnostics import spectral_radius
from tests.apps.diffusion.helpers.small_models import batch, randomized


def test_the_command_writes_table_numbers_and_figure(tmp_path, capsys):
    options = ["--steps", "2", "--num", "2", "--budget", "400", "--tolerance", "1e-3", "--out", str(tmp_path)]
    assert diagnose.main(["mnist-fpdm", *options]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"diagnosis.md", "diagnosis.json", "diagnosis.png"}
    found = json.loads((tmp_path / "diagnosis.json").read_text())["timesteps"]
    assert len(found) == 2
    printed = capsys.readouterr().out
    for row in found:
        assert f"| {row['timestep']} |" in printed
        assert row["plain_evaluations"]["1e-01"] <= row["plain_evaluations"]["1e-03"] == row["evaluations"]["Picard"]
        assert row["cost"]["evaluations"] + row["cost"]["products"] <= 400
        assert len(row["radius"]) == 4  # two samples, with and without their class for the guidance


def test_radius_and_evaluations_are_those_of_the_layer_at_that_timestep():
    opened = open_network("mnist-fpdm")
    chosen = plan(opened.model, opened.scheduler, SamplingOptions(steps=1), defaults=opened.options)
    rows = diagnose_timesteps(opened.model, chosen, [3, 5], num=2, seed=0, tolerance=1e-3, budget=400)
    (row,) = rows
    calls = []
    handle = opened.model.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    sample(opened.model, [0, 1], [3, 5], plan=chosen, seed=0, chunk=2)
    handle.remove()
    with torch.no_grad():
        f, z0, args = opened.model.fixed_point_problem(*calls[0])
        solved = fixed_point(f, z0, *args, solver=Picard(), stop=Stop(rtol=1e-3, max_evals=100))
        tight = fixed_point(f, z0, *args, stop=Stop(rtol=1e-5, max_evals=100))
    assert row.solvers()["Picard"] == int(solved.evals.max())
    radius = spectral_radius(f, tight.value, *args, products=60)
    torch.testing.assert_close(torch.tensor(row.radius, dtype=radius.dtype), radius, rtol=0.02, atol=0)


def test_the_problem_of_the_layer_is_the_one_that_the_network_solves():
    model = randomized(FPDM(input_size=4, hidden_size=16, num_heads=2, num_classes=3)).eval()
    x, t, y = batch(model)
    with torch.no_grad():
        f, z0, args = model.fixed_point_problem(x, t, y)
        _, solution = model(x, t, y, iterations=4, return_solution=True)
        z = z0
        for _ in range(4):
            z = f(z, *args)
    torch.testing.assert_close(z, solution.value)


def test_a_dit_and_impossible_options_are_refused(tmp_path, capsys):
    assert diagnose.main(["mnist-dit", "--out", str(tmp_path)]) == 2
    assert "FPDM" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        diagnose.main(["mnist-fpdm", "--tolerance", "0"])
    assert "--tolerance" in capsys.readouterr().err
    assert diagnose.main([str(tmp_path / "nothing")]) == 2
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "diagnosis.md").write_text("an earlier diagnosis")
    assert diagnose.main(["mnist-fpdm", "--out", str(tmp_path / "old")]) == 2
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "old" / "diagnosis.md").read_text() == "an earlier diagnosis"
    assert diagnose.main(["mnist-fpdm", "--parallel", "picard", "--steps", "2", "--out", str(tmp_path / "new")]) == 2
    assert "parallel" in capsys.readouterr().err and not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="FPDM"):
        opened = open_network(pretrained.locate("mnist-dit"))
        chosen = plan(opened.model, opened.scheduler, SamplingOptions(steps=1), defaults=opened.options)
        diagnose_timesteps(opened.model, chosen, [1], num=1, seed=0, tolerance=1e-3, budget=10)
