"""The configuration tree: validation, saving and loading, parsing of a command line."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import implicit
from apps.diffusion.config import training as c
from apps.diffusion.config.presets import PRESETS
from apps.diffusion.models import build
from apps.diffusion.train import parse

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip(name):
    tree = PRESETS[name]()
    assert c.Config.from_json(tree.to_json()) == tree


@pytest.mark.parametrize(
    "grad", [implicit.StochasticJFB(N=3, M=2), implicit.JFB(steps=4), implicit.IFT(), implicit.Unrolled()]
)
@pytest.mark.parametrize(
    "solver", [implicit.Picard(damping=0.5), implicit.Anderson(memory=3), implicit.Broyden(memory=7)]
)
def test_unions_survive_the_round_trip(grad, solver):
    tree = c.Config(grad=grad, solver=solver, max_time=12.5)
    assert c.Config.from_json(tree.to_json()) == tree


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"seed": 0', '"sed": 0', r"\bsed\b"),
        ('"seed": 0', '"seed": "x"', "config.seed"),
        ('"seed": 0', '"seed": true', "config.seed"),
        ('"kind": "fpdm"', '"kind": "unet"', "config.model.kind"),
        ('"type": "StochasticJFB"', '"type": "Magic"', "Magic"),
        ('"seed": 0', '"seed": -1', "--seed"),
        ("{", "", "JSON"),
    ],
)
def test_a_damaged_config_is_refused_by_name(old, new, message):
    text = c.Config().to_json()
    assert old in text
    with pytest.raises(ValueError, match=message):
        c.Config.from_json(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: c.ModelConfig(kind="fpdm", depth=3), "--model.depth"),
        (lambda: c.ModelConfig(patch=0), "--model.patch"),
        (lambda: c.ModelConfig(mlp_ratio=float("nan")), "--model.mlp-ratio"),
        (lambda: c.NoiseSchedule(prediction="epsilon"), "epsilon"),
        (lambda: c.ModelConfig(mlp_ratio=float("inf")), "--model.mlp-ratio"),
        (lambda: c.OptimizerConfig(lr=float("inf")), "--optimizer.lr"),
        (
            lambda: c.Config(sampling=c.SamplingOptions(guidance=2), optimizer=c.OptimizerConfig(label_dropout=0)),
            "--optimizer.label-dropout",
        ),
        (lambda: c.OptimizerConfig(lr=0), "--optimizer.lr"),
        (lambda: c.OptimizerConfig(label_dropout=1.0), "--optimizer.label-dropout"),
        (lambda: c.EMAConfig(decay=1.0), "--ema.decay"),
        (lambda: implicit.StochasticJFB(N=-1), "StochasticJFB.N"),
        (lambda: implicit.StochasticJFB(M=0), "StochasticJFB.M"),
        (lambda: implicit.Anderson(memory=0), "Anderson.memory"),
        (lambda: implicit.Picard(damping=1.0), "Picard.damping"),
        (lambda: implicit.Stop(rtol=-1), "Stop.rtol"),
        (lambda: c.SamplingOptions(guidance=-1), "guidance"),
        (lambda: c.Config(max_time=0), "--max-time"),
        (lambda: c.Config(keep=0), "--keep"),
    ],
)
def test_impossible_values_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_command_line_is_the_tree():
    config, resume = parse([])
    assert config == PRESETS["digits"]() and not resume
    assert parse(["digits-dit"])[0] == PRESETS["digits-dit"]()
    config, _ = parse("--seed 3 --model.patch 2 grad:ift solver:anderson --solver.memory 2".split())
    expected = dataclasses.replace(
        PRESETS["digits"](),
        model=dataclasses.replace(PRESETS["digits"]().model, patch=2),
        seed=3,
        grad=implicit.IFT(),
        solver=implicit.Anderson(memory=2),
    )
    assert config == expected


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ("digits-dit grad:jfb", "grad"),
        ("digits-dit --model.pre 3", "model.pre"),
        ("--model.kind dit solver:anderson", "solver"),
        ("imagenet-dit --stop.max-evals 3", "stop"),
    ],
)
def test_what_does_not_apply_to_a_dit_is_refused(argv, name):
    with pytest.raises(ValueError, match=name):
        parse(argv.split())


@pytest.mark.parametrize("argv", [["--schedule.kind", "rectified_flow"], ["--schedule.kind=rectified_flow"]])
def test_a_rectified_flow_replaces_the_target_of_the_preset(argv):
    config, _ = parse(["mnist", *argv, "--sampling.sampler", "flow"])
    assert config.schedule == c.NoiseSchedule(kind="rectified_flow")


def test_a_preset_of_another_kind_does_not_resume_a_run(tmp_path):
    (tmp_path / "config.json").write_text(PRESETS["digits"]().to_json())
    argv = ["--resume", "--out", str(tmp_path)]
    assert parse(["digits", *argv])[0] == parse(argv)[0]
    for other in ("digits-dit", "folder"):
        with pytest.raises(ValueError, match=other):
            parse([other, *argv])


def test_help_names_all_presets(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    words = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert set(PRESETS) <= words


def test_an_mlp_without_width_is_refused():
    with pytest.raises(ValueError, match="mlp_ratio"):
        build.network(c.ModelConfig(mlp_ratio=0.001), (1, 8, 8), 10, iterations=1, seed=0)


@pytest.mark.parametrize("argv", [["celeba"], ["--sed", "3"], ["--seed", "-1"], ["--model.kind", "unet"]])
def test_bad_arguments_end_with_code_2(argv, capsys):
    from apps.diffusion import train

    try:
        code = train.main(argv)
    except SystemExit as end:  # tyro's own way out
        code = end.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out + captured.err


def test_checksums_survive_the_round_trip_and_must_be_text():
    config = c.Config(data=c.DataConfig(source="idx", path=Path("files"), sha256=("a" * 64, "b" * 64)))
    assert c.Config.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"data\.sha256"):
        c.Config.from_json(config.to_json().replace('"' + "b" * 64 + '"', "7"))


def test_a_configuration_of_the_earlier_format_is_translated():
    file = FIXTURES / "run" / "config.json"
    old = json.loads(file.read_text())
    config = c.Config.from_json(file.read_text())
    assert config.model == c.ModelConfig(hidden=16, heads=2, patch=4, condition_on_time=True)
    assert (config.optimizer.images, config.optimizer.lr, config.ema.decay) == (640, 0.002, 0.99)
    assert config.grad == implicit.StochasticJFB(N=6, M=3) and config.solver == implicit.Picard()
    assert config.stop == implicit.Stop(rtol=1e-3, atol=0.0, max_evals=20)
    old["grad"] = {"type": "IFT", "rtol": 0.01, "on_failure": "raise"}
    ift = c.Config.from_json(json.dumps(old)).grad
    assert ift == implicit.IFT(stop=implicit.Stop(rtol=0.01, atol=0.0, max_evals=200), on_failure="raise")


def test_all_options_of_the_library_are_flags_and_survive_the_round_trip():
    argv = "grad:ift grad.stop:stop --grad.stop.rtol 0.01 solver:anderson --solver.ridge 1e-6 --stop.check-every 2"
    config, _ = parse(argv.split())
    assert config.grad == implicit.IFT(stop=implicit.Stop(rtol=0.01))
    assert config.solver == implicit.Anderson(ridge=1e-6) and config.stop.check_every == 2
    assert c.Config.from_json(config.to_json()) == config
    adjoint = c.Config(grad=implicit.IFT(solver=implicit.Broyden(memory=3)))
    assert c.Config.from_json(adjoint.to_json()) == adjoint


def test_what_json_cannot_hold_is_refused_by_field():
    with pytest.raises(TypeError, match=r"config\.grad\.report"):
        c.Config(grad=implicit.IFT(report=print)).to_json()


def test_a_misspelt_flag_is_named_and_the_solver_of_a_linear_problem_is_a_choice(capsys):
    with pytest.raises(SystemExit):
        parse(["digits", "--optimiser.lr", "1"])
    assert "--optimiser.lr" in capsys.readouterr().err
    config, _ = parse(["digits", "grad:ift", "grad.solver:abstract-solver-any", "anderson"])
    assert config.grad == implicit.IFT(solver=implicit.Anderson())
    config, _ = parse(["digits", "grad:ift", "grad.solver:gmres"])
    assert isinstance(config.grad, implicit.IFT) and config.grad.solver is not None
