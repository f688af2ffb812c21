"""Trained networks in the repository, by name, and the record of training in a pipeline folder.

    apps/diffusion/pretrained/NAME/
        model_index.json  model/  scheduler/        written by FixedPointPipeline.save_pretrained
        training.json                               configuration, images, steps and seconds of the run
        README.md                                   the model card

`python -m apps.diffusion.convert RUN --out DIR --to pipeline` writes such a folder, with its code and a short card. An
argument RUN of a command may be NAME; a folder NAME in the working directory takes precedence. A wheel does not contain
these folders.
"""

import json
from pathlib import Path
from typing import Any

from apps.diffusion.config.serialization import to_plain
from apps.diffusion.config.training import Config
from apps.diffusion.files.json_file import read_object, write_object

SHIPPED = Path(__file__).resolve().parents[1] / "pretrained"
RECORD = "training.json"


def names() -> list[str]:
    """The names of the networks in the repository, sorted; empty in an installation from a wheel."""
    return sorted(index.parent.name for index in SHIPPED.glob("*/model_index.json"))


def locate(source: str | Path) -> Path:
    """The folder of `source`: the path itself if it exists, else the network of this name, else the path itself."""
    path = Path(source)
    shipped = path.name == str(path) and path.name in names() and not path.exists()
    return SHIPPED / path.name if shipped else path


def write_record(folder: Path, config: Config, progress: dict[str, Any]) -> None:
    """Write training.json into a pipeline folder: the run's configuration, and `progress`, the numbers of images, steps
    and seconds of training.
    """
    write_object(folder / RECORD, {**progress, "config": to_plain(config)})


def read_record(folder: Path) -> tuple[Config, int]:
    """From training.json of a pipeline folder: the run's configuration, and the number of images seen in training.

    Raises:
        ValueError: the file is missing or cannot be read.
    """
    file = folder / RECORD
    try:
        record = read_object(file)
        return Config.from_json(json.dumps(record["config"])), int(record["images"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is not the record of a training run ({error}); convert the run again.") from None


def output_folder(source: Path, name: str) -> Path:
    """The default output folder `name` of a command: source/name for a folder, name/source for a network by name."""
    return source / name if locate(source) == source else Path(name) / source
