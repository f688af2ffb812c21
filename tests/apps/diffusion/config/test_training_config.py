"""The configuration tree: valid or refused, saved and read back, parsed from a command line."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apps.diffusion.config import training as c
from apps.diffusion.config.presets import PRESETS
from apps.diffusion.models import build
from apps.diffusion.train import parse


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip(name):
    tree = PRESETS[name]()
    assert c.Config.from_json(tree.to_json()) == tree


@pytest.mark.parametrize("grad", [c.StochasticJFB(N=3, M=2), c.JFB(steps=4), c.IFT(), c.Unrolled()])
@pytest.mark.parametrize("solver", [c.Picard(damping=0.5), c.Anderson(memory=3), c.Broyden(memory=7)])
def test_unions_survive_the_round_trip(grad, solver):
    tree = c.Config(grad=grad, solver=solver, max_time=12.5)
    assert c.Config.from_json(tree.to_json()) == tree


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"seed": 0', '"sed": 0', "no field sed"),
        ('"seed": 0', '"seed": "x"', "config.seed should be one of"),
        ('"seed": 0', '"seed": true', "config.seed should be one of"),
        ('"kind": "fpdm"', '"kind": "unet"', "config.model.kind"),
        ('"type": "StochasticJFB"', '"type": "Magic"', "StochasticJFB, JFB, IFT, Phantom"),
        ('"seed": 0', '"seed": -1', "Config.seed must be at least 0"),
        ("{", "", "not JSON"),
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
        (lambda: c.Model(kind="fpdm", depth=3), "depth is for DiT"),
        (lambda: c.Model(patch=0), "Model.patch"),
        (lambda: c.Model(mlp_ratio=float("nan")), "mlp_ratio"),
        (lambda: c.Schedule(prediction="epsilon"), "v_prediction"),
        (lambda: c.Model(mlp_ratio=float("inf")), "mlp_ratio"),
        (lambda: c.Optimisation(lr=float("inf")), "must be finite"),
        (
            lambda: c.Config(sampling=c.Sampling(guidance=2), optimisation=c.Optimisation(label_dropout=0)),
            "label_dropout = 0 hides none",
        ),
        (lambda: c.Optimisation(lr=0), "Optimisation.lr"),
        (lambda: c.Optimisation(label_dropout=1.0), "label_dropout"),
        (lambda: c.EMA(decay=1.0), "EMA.decay"),
        (lambda: c.StochasticJFB(N=-1), "StochasticJFB.N"),
        (lambda: c.StochasticJFB(M=0), "StochasticJFB.M"),
        (lambda: c.Anderson(memory=0), "Anderson.memory"),
        (lambda: c.Picard(damping=1.0), "Picard.damping"),
        (lambda: c.Stop(rtol=-1), "Stop.rtol"),
        (lambda: c.Sampling(guidance=-1), "Sampling.guidance"),
        (lambda: c.Config(max_time=0), "max_time"),
        (lambda: c.Config(keep=0), "Config.keep"),
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
        grad=c.IFT(),
        solver=c.Anderson(memory=2),
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
def test_what_a_dit_pays_no_heed_to_is_refused(argv, name):
    with pytest.raises(ValueError, match=f"pays no heed to {name};"):
        parse(argv.split())


def test_a_preset_of_another_kind_does_not_resume_a_run(tmp_path):
    (tmp_path / "config.json").write_text(PRESETS["digits"]().to_json())
    argv = ["--resume", "--out", str(tmp_path)]
    assert parse(["digits", *argv])[0] == parse(argv)[0]
    for other in ("digits-dit", "folder"):
        with pytest.raises(ValueError, match=f"the preset {other} is"):
            parse([other, *argv])


def test_help_names_all_presets_and_says_where_the_clock_rules(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    told = "".join(re.findall(r"[\w,:-]+", capsys.readouterr().out))
    assert ",".join(PRESETS) in told
    assert "theclocksetsafallingrate" in told and "repeatedbitforbit" in told


def test_an_mlp_without_width_is_refused():
    with pytest.raises(ValueError, match="no width"):
        build.network(c.Model(mlp_ratio=0.001), (1, 8, 8), 10, iterations=1, seed=0)


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


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_help_does_not_load_torch(command):
    argv = [sys.executable, "-X", "importtime", "-m", f"apps.diffusion.{command}", "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "tyro" in loaded
    assert not {"torch", "diffusers", "sklearn", "numpy"} & loaded


def test_checksums_survive_the_round_trip_and_must_be_text():
    config = c.Config(data=c.Data(source="idx", path=Path("files"), sha256=("a" * 64, "b" * 64)))
    assert c.Config.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"data\.sha256"):
        c.Config.from_json(config.to_json().replace('"' + "b" * 64 + '"', "7"))
