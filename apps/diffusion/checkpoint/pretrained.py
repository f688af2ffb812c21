"""Networks that come with the repository, by name, and the record of training in a pipeline folder.

    apps/diffusion/pretrained/NAME/
        model_index.json  model/  scheduler/        what FixedPointPipeline.save_pretrained writes
        training.json                               configuration, images, steps and seconds of the run
        README.md                                   the model card

`python -m apps.diffusion.convert RUN --out DIR --to pipeline` writes such a folder, with its code and a short card.
NAME stands for the folder wherever a run is an argument, unless a folder of that name exists in the working directory.
The repository holds these folders; a wheel does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from apps.diffusion.config.training import Config
from apps.diffusion.files.atomic import write_text

SHIPPED = Path(__file__).resolve().parents[1] / "pretrained"
RECORD = "training.json"


def names() -> list[str]:
    """The names of the networks that are here, sorted."""
    return sorted(index.parent.name for index in SHIPPED.glob("*/model_index.json"))


def locate(source: str | Path) -> Path:
    """The folder that `source` stands for: an existing path, else the network of this name, else the path itself."""
    path = Path(source)
    shipped = path.name == str(path) and path.name in names() and not path.exists()
    return SHIPPED / path.name if shipped else path


def write_record(folder: Path, config: Config, progress: dict[str, Any]) -> None:
    """Note in a pipeline folder how its network was trained; `progress` holds images, steps and seconds."""
    record = {**progress, "config": json.loads(config.to_json())}
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


def read_record(folder: Path) -> tuple[Config, int]:
    """The configuration of the run that a pipeline folder comes from, and the images that it had seen.

    Raises:
        ValueError: there is no record, or it cannot be read.
    """
    file = folder / RECORD
    try:
        record = json.loads(file.read_text())
        return Config.from_json(json.dumps(record["config"])), int(record["images"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is not the record of a training run ({error}); convert the run again.") from None


def output_folder(source: Path, name: str) -> Path:
    """The default folder of the output `name`: inside the run `source`, or name/NETWORK for a network by name."""
    return source / name if locate(source) == source else Path(name) / source
