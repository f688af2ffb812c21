"""Inception features, with a small network instead of torch-fidelity's."""

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from apps.diffusion.evaluation import feature_extractors as features


class Network(nn.Module):
    """Stands for torch-fidelity's Inception: the names that we use, and small tensors behind them."""

    def __init__(self, name, wanted, weights):
        super().__init__()
        assert wanted == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.ModuleDict({"branch1x1": nn.Conv2d(3, 9, 3)})
        self.fc = nn.Linear(9, 4, bias=False)
        self.load_state_dict(torch.load(weights))

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        pooled = self.Mixed_6d["branch1x1"](x.float()).mean((2, 3))
        return pooled, self.fc(pooled)


def test_inception_by_torch_fidelity(tmp_path, monkeypatch):
    package, module = (
        types.ModuleType("torch_fidelity"),
        types.ModuleType("torch_fidelity.feature_extractor_inceptionv3"),
    )
    monkeypatch.setattr(module, "FeatureExtractorInceptionV3", Network, raising=False)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="--weights"):
        features.Inception()
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / features.INCEPTION
    for content in ({"Mixed_6d": print}, {"weight": torch.zeros(1)}):
        torch.save(content, file)
        with pytest.raises(ValueError, match="Inception"):
            features.Inception()
    conv, fc = nn.Conv2d(3, 9, 3), nn.Linear(9, 4, bias=False)
    held: dict[str, Any] = {f"Mixed_6d.branch1x1.{k}": v for k, v in conv.state_dict().items()}
    torch.save({**held, "fc.weight": fc.weight}, file)
    inception = features.Inception()
    gray = torch.randint(256, (5, 1, 6, 6), dtype=torch.uint8)
    looked = inception(gray)
    maps = conv(gray.expand(-1, 3, -1, -1).float())
    assert looked.spatial is not None and looked.logits is not None
    torch.testing.assert_close(looked.pooled, maps.mean((2, 3)))
    torch.testing.assert_close(looked.spatial, maps[:, :7].flatten(1))
    torch.testing.assert_close(looked.logits, maps.mean((2, 3)) @ fc.weight.T)
    assert not looked.pooled.requires_grad and len(inception.digest) == 64
    compiled = features.Inception(backend="aot_eager")
    for _ in range(2):
        for one, other in zip(compiled(gray), looked, strict=True):
            torch.testing.assert_close(one, other)
