"""Networks by name: a run is written as a pipeline folder, which commands and pipeline open by its name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from apps.diffusion import convert, sample
from apps.diffusion.checkpoint import pretrained, trained_run, training_state
from apps.diffusion.checkpoint.open_network import open_run
from apps.diffusion.config.training import Config, DataConfig, ModelConfig, OptimizerConfig
from apps.diffusion.data import ImageFolderDataset
from apps.diffusion.files.images import read
from apps.diffusion.pipeline import FixedPointPipeline
from apps.diffusion.training.trainer import Trainer
from tests.apps.diffusion.helpers import image_files

RUN = Path(__file__).parents[1] / "fixtures" / "run"


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of shipped networks with one, called small, and a working directory beside it."""
    assert convert.main([str(RUN), "--out", str(tmp_path / "shipped" / "small"), "--to", "pipeline"]) == 0
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "shipped" / "small"


def test_a_name_stands_for_its_folder_unless_there_is_one_here(shipped):
    assert pretrained.names() == ["small"]
    assert pretrained.locate("small") == shipped
    assert pretrained.locate("large") == Path("large")
    assert pretrained.locate("runs/small") == Path("runs/small")
    Path("small").mkdir()
    assert pretrained.locate("small") == Path("small")


def test_the_record_is_that_of_the_run(shipped):
    config, images = pretrained.read_record(shipped)
    assert config == trained_run.read_config(RUN) and images == 640
    record = json.loads((shipped / "training.json").read_text())
    assert record["steps"] == 10 and record["seconds"] > 0
    named, own = open_run(Path("small")), open_run(RUN)
    assert (named.config, named.images, named.digest) == (own.config, own.images, own.digest)
    with pytest.raises(ValueError, match="weights"):
        open_run(Path("small"), "model")


def test_samples_by_name_are_those_of_the_run(shipped):
    arguments = ["--num", "3", "--steps", "2", "--iterations", "2", "--chunk", "3"]
    assert sample.main(["small", *arguments]) == 0
    assert sample.main([str(RUN), *arguments, "--out", "again"]) == 0
    files = sorted(p.name for p in Path("again").glob("*.png"))
    assert len(files) == 4  # the grid is the fourth
    for name in files:
        assert np.array_equal(np.asarray(read(Path("samples/small") / name)), np.asarray(read(Path("again") / name)))
    assert sorted(p.name for p in shipped.iterdir()) == [
        "README.md",
        "fixed_point_pipeline.py",
        "model",
        "model_index.json",
        "scheduler",
        "training.json",
    ]


def test_the_pipeline_is_found_by_name(shipped):
    pipe = FixedPointPipeline.from_pretrained("small")
    pipe.set_progress_bar_config(disable=True)
    own = FixedPointPipeline.from_pretrained(RUN)
    own.set_progress_bar_config(disable=True)
    images = [p(class_labels=[1, 2], generator=0, output_type="np").images for p in (pipe, own)]
    assert np.array_equal(images[0], images[1])


def test_what_cannot_be_found_or_read_is_refused(shipped, capsys):
    assert sample.main(["large"]) == 2
    assert "small" in capsys.readouterr().err
    (shipped / "training.json").write_text("{")
    with pytest.raises(ValueError, match=r"training\.json"):
        open_run(Path("small"))
    with pytest.raises(ValueError, match="checkpoints"):
        convert.write_pipeline(convert.Request(checkpoint=shipped, out=Path("out"), to="pipeline"))
    assert convert.main([str(RUN), "--out", "out", "--to", "pipeline", "--heads", "2"]) == 2


def test_a_damaged_network_is_refused(shipped):
    weights = shipped / "model" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="model"):
        open_run(Path("small"))
    shutil.rmtree(shipped)
    assert pretrained.names() == []


def test_the_names_of_classes_are_kept(tmp_path, capsys):
    """A run on a folder of images, written as a pipeline, takes the names that the run takes."""
    image_files.tree(tmp_path / "images", classes=("10", "2", "owl"), each=2)
    images = ImageFolderDataset(tmp_path / "images", 8)
    config = Config(
        model=ModelConfig(hidden=16, heads=2),
        data=DataConfig(source="folder", path=tmp_path / "images", size=8),
        optimizer=OptimizerConfig(images=16, batch=8),
        out=tmp_path / "run",
    )
    Trainer(config, images).run(lambda state: training_state.save(tmp_path / "run", state))
    (tmp_path / "run" / "config.json").write_text(config.to_json())
    assert convert.main([str(tmp_path / "run"), "--to", "pipeline", "--out", str(tmp_path / "pipe")]) == 0
    for folder in ("run", "pipe"):
        assert open_run(tmp_path / folder).class_cycle(["owl", "2", "10"]) == [2, 1, 0]
    assert FixedPointPipeline.from_pretrained(tmp_path / "pipe").config["classes"] == ["10", "2", "owl"]
