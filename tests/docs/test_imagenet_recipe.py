"""Every command of the ImageNet recipe runs at a thousandth of its scale, two processes where the page has eight."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from apps.diffusion.config.presets import PRESETS
from tests.apps.diffusion.helpers import image_files
from tests.apps.diffusion.helpers.forks import Forks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "imagenet.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```\n(.*?)^```", PAGE, re.S | re.M)
    for line in block.splitlines()
    if "apps.diffusion" in line
]
IMAGES, SAMPLES, BATCH, STEPS = 1281, 50, 8, 16
"""A thousandth of the images and samples of the page, and a few steps of 8 images."""
SMALL = {
    "encode": "--size 8 --shard-size 100 --batch 100 --device cpu",
    "train": f"--model.hidden 16 --model.heads 2 --optimizer.images {STEPS * BATCH} --optimizer.batch {BATCH} "
    f"--checkpoint-every {STEPS * BATCH // 4} --sample-every {STEPS * BATCH // 2} --num-samples 4 "
    "--sampling.steps 2 --threads 1",
    "sample": f"--num {SAMPLES}",
    "evaluate": "--device cpu",
}
"""Flags that take the place of the page's."""
REPLACED = {
    "stabilityai/sd-vae-ft-mse": "vae",
    "--block-passes 560": "--block-passes 120",  # of two explicit blocks and at least one iteration, twenty times
    "--device cuda": "--device cpu",
    "--optimizer.precision bf16": "--optimizer.precision no",
    "--features inception": "--features digits",  # of 8 x 8 pixels; Inception's weights are not at hand
    "--nproc_per_node 8": "--nproc_per_node 2",
}


def small(command: str) -> tuple[str, list[str], int]:
    """Module, arguments and number of processes of a command at small scale."""
    for full, less in REPLACED.items():
        command = command.replace(full, less)
    processes = int(match[1]) if (match := re.search(r"--nproc_per_node (\d+)", command)) else 1
    module, given = re.search(r"-m (apps\.diffusion\.\w+) (.*)", command).groups()
    argv, changed = [word for word in given.split() if word != "--"], SMALL[module.rpartition(".")[2]].split()
    if "--resume" in argv:
        return module, [*argv, "--optimizer.images", str(2 * STEPS * BATCH)], processes
    for flag in (each for each in changed if each.startswith("--")):
        if flag in argv:
            at = argv.index(flag)
            del argv[at : at + 2]
    if "imagenet-dit" in argv:
        changed += ["--model.depth", "2"]
    return module, [*argv, *changed], processes


def test_the_page_has_the_commands_of_the_whole_path():
    names = [re.search(r"apps\.diffusion\.(\w+)", command)[1] for command in COMMANDS]
    assert names == ["encode", "train", "train", "train", "sample", "evaluate"]
    assert all("torchrun --nproc_per_node 8 -m" in command for command in COMMANDS[:-1])


def test_the_numbers_of_the_page_are_those_of_the_presets():
    for name in ("imagenet", "imagenet-dit"):
        config = PRESETS[name]()
        assert (config.optimizer.images, config.optimizer.batch) == (400_000 * 512, 512)
        assert config.checkpoint_every == 10_000 * 512 and config.keep == 3
    latents = 1_281_167 * 2 * 2 * 4 * 32 * 32 * 2
    assert round(latents / 1e9) == 42 and -(-1_281_167 // 4096) == 313


@pytest.mark.parametrize(
    ("network", "parameters", "digits"), [("FPDM-XL/2", 86_500_256, 2), ("DiT-XL/2", 674_834_720, 3)]
)
def test_sizes_on_the_page_follow_from_the_parameters(network, parameters, digits):
    """The average of the weights; a checkpoint of weights, average and two moments; all are float32."""
    text = " ".join(PAGE.split()).replace(" each", "")
    assert f"{4 * parameters / 2**30:.2g} GiB for {network}" in text
    assert f"{16 * parameters / 1e9:.{digits}g} GB for {network}" in text


@pytest.mark.slow
def test_every_command_runs_at_a_thousandth_of_the_scale(tmp_path):
    classes = 10
    for i in range(IMAGES):
        image_files.save(
            tmp_path / "imagenet" / "train" / f"n{i % classes:08d}" / f"{i}.png", image_files.random_image(i, 17, 16)
        )
    image_files.tiny_vae().save_pretrained(tmp_path / "vae")
    pixels = np.random.default_rng(0).integers(0, 256, (SAMPLES, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", arr_0=pixels)
    forks = Forks(tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    for command in COMMANDS:
        module, arguments, processes = small(command)
        assert forks.run(f"{module}:main", arguments, processes=processes) == 0, command
    forks.close()
    index = json.loads((tmp_path / "latents" / "imagenet" / "index.json").read_text())
    assert index["images"] == IMAGES and len(index["class_counts"]) == classes
    for run, length in (("imagenet", 2), ("imagenet-dit", 1)):
        metrics = json.loads((tmp_path / "runs" / run / "metrics.json").read_text())
        assert metrics["training"]["images"] == length * STEPS * BATCH
    archive = np.load(tmp_path / "samples" / "imagenet" / "samples.npz")
    assert archive["arr_0"].shape == (SAMPLES, 8, 8, 3) and archive["arr_0"].dtype == np.uint8
    assert (np.bincount(archive["arr_1"]) == SAMPLES // classes).all()
