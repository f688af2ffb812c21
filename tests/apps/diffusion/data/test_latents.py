"""Latents on the disk: samples are a function of (seed, epoch, index) and have the stored moments."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from apps.diffusion.data.dataset import all_images
from apps.diffusion.data.latents import LatentDataset
from apps.diffusion.files.hashing import of_file as sha256

SHAPE = (2, 3, 5)


@pytest.fixture
def folder(tmp_path):
    """Seven images in two shards, with known moments."""
    source = torch.Generator().manual_seed(0)
    mean = torch.randn(7, 2, *SHAPE, generator=source)
    std = 0.1 + torch.rand(7, 2, *SHAPE, generator=source)
    label = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    (tmp_path / "shards").mkdir()
    shards = []
    for k, rows in enumerate((slice(0, 4), slice(4, 7))):
        path = tmp_path / "shards" / f"{k:05d}.safetensors"
        save_file({"mean": mean[rows].clone(), "std": std[rows].clone(), "label": label[rows].clone()}, path)
        images = rows.stop - rows.start
        entry = {
            "file": f"shards/{path.name}",
            "images": images,
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
        shards.append(entry)
    index = {"format": 1, "images": 7, "shape": SHAPE, "classes": ["a", "b", "c"], "scaling_factor": 0.5}
    index |= {"shift_factor": 0.2, "shards": shards}
    (tmp_path / "index.json").write_text(json.dumps(index))
    return tmp_path, mean, std, label


def test_means_and_labels_by_index(folder):
    root, mean, _, label = folder
    latents = LatentDataset(root, sample=False)
    x, y = all_images(latents, [6, 0, 3, 4])
    assert torch.equal(x, 0.5 * (mean[[6, 0, 3, 4], 0] - 0.2)) and torch.equal(y, label[[6, 0, 3, 4]])
    assert (len(latents), latents.num_classes, latents.shape, latents.classes) == (
        7,
        3,
        SHAPE,
        ("a", "b", "c"),
    )
    for i in (-1, 7):
        with pytest.raises(IndexError, match=str(i)):
            latents.moments(i)


def draw(latents, numbers, epochs):
    pairs = [latents[i, e] for i, e in zip(numbers, epochs, strict=True)]
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


def test_draws_have_the_stored_moments(folder):
    root, mean, std, label = folder
    latents, n = LatentDataset(root, mirror=True, seed=1), 4000
    x, y = draw(latents, [4] * n, range(n))
    assert torch.equal(y, label[[4] * n])
    z = x / 0.5 + 0.2
    # which side a draw is of shows in its distance, in standard deviations, from either mean
    distance = (((z[:, None] - mean[4]) / std[4]) ** 2).flatten(2).mean(2) + 2 * std[4].log().flatten(1).mean(1)
    side = distance.argmin(1)
    assert side.float().mean() == pytest.approx(0.5, abs=0.04)
    for k in range(2):
        own = z[side == k]
        error = (own.mean(0) - mean[4, k]) / std[4, k]
        assert error.abs().max() < 5 / len(own) ** 0.5
        assert (own.std(0) / std[4, k] - 1).abs().max() < 5 / (2 * len(own)) ** 0.5


def test_a_draw_depends_on_seed_epoch_and_index_alone(folder):
    latents, again = (LatentDataset(folder[0], mirror=True, seed=5) for _ in range(2))
    x, _ = draw(latents, [0, 3, 6, 3], [0, 0, 0, 1])
    assert torch.equal(again[6, 0][0], x[2]) and torch.equal(again[6][0], x[2])
    assert torch.equal(draw(again, [3, 3], [1, 0])[0], x[[3, 1]])
    assert not torch.equal(x[1], x[3])
    assert not torch.equal(LatentDataset(folder[0], mirror=True, seed=6)[0][0], x[0])
    # image 0 of epoch 1 differs from image 7 of epoch 0, and from all others
    flat = draw(latents, [i for _ in range(5) for i in range(7)], [e for e in range(5) for _ in range(7)])[0]
    assert len({tuple(row.flatten().tolist()) for row in flat}) == 35


def test_a_copy_in_another_process_opens_its_own_files(folder, monkeypatch):
    latents = LatentDataset(folder[0], mirror=True)
    monkeypatch.setattr(LatentDataset, "verify", lambda self: pytest.fail("a worker reads every shard again"))
    copy = pickle.loads(pickle.dumps(latents))
    assert all(torch.equal(copy[i][0], latents[i][0]) for i in range(7))


def test_the_statistics_of_a_vae_by_channel_replace_its_shift(folder):
    root, mean, _, _ = folder
    index = json.loads((root / "index.json").read_text())
    own, scale = torch.tensor([-1.0, 2.0]), torch.tensor([5.0, 6.0])
    (root / "index.json").write_text(json.dumps(index | {"latents_mean": own.tolist(), "latents_std": scale.tolist()}))
    z = LatentDataset(root, sample=False)[5][0]
    for channel in range(2):
        assert torch.allclose(z[channel], 0.5 * (mean[5, 0, channel] - own[channel]) / scale[channel])


def test_without_noise_or_mirror(folder):
    root, mean, _, _ = folder
    plain = LatentDataset(root, mirror=False, sample=False)
    assert torch.equal(draw(plain, [2, 5], [0, 9])[0], 0.5 * (mean[[2, 5], 0] - 0.2))
    sides = draw(LatentDataset(root, mirror=True, sample=False), [2] * 20, range(20))[0]
    scaled = 0.5 * (mean[2] - 0.2)
    which = [int(torch.equal(row, scaled[1])) for row in sides]
    assert all(torch.equal(row, scaled[k]) for row, k in zip(sides, which, strict=True)) and 0 < sum(which) < 20


def test_a_damaged_shard_is_named(folder):
    root = folder[0]
    shard = root / "shards" / "00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"00001\.safetensors"):
        LatentDataset(root)
    assert len(LatentDataset(root, verify=False)) == 7
    with pytest.raises(ValueError, match=r"00001\.safetensors"):
        LatentDataset(root, verify=False).verify()
    shard.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"00001\.safetensors"):
        LatentDataset(root)
    shard.unlink()
    with pytest.raises(ValueError, match=r"00001\.safetensors"):
        LatentDataset(root)


@pytest.mark.parametrize(("text", "name"), [("{", "index.json"), ("[]", "index.json"), ('{"format": 9}', "9")])
def test_a_foreign_index_is_refused(tmp_path, text, name):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=name):
        LatentDataset(tmp_path)


def test_a_folder_without_latents_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"index\.json"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1, None, 2]},
        {"shape": 3},
        {"classes": [1]},
        {"scaling_factor": "x"},
        {"shards": {"a": 1}},
        {"shards": [1.5]},
        {"shards": [{"file": None, "images": 7, "bytes": 1, "sha256": ""}]},
        {"vae": 3},
        {"vae": {"name": None, "weights_sha256": ""}},
    ],
    ids=str,
)
def test_an_entry_of_another_type_is_refused(folder, change):
    """The index of an earlier version has no digest."""
    file = folder[0] / "index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=r"index\.json"):
        LatentDataset(folder[0])
    name = next(iter(change))
    file.write_text(json.dumps({key: value for key, value in index.items() if key != name or name == "vae"}))
    if name != "vae":
        with pytest.raises(ValueError, match=r"index\.json"):
            LatentDataset(folder[0])
