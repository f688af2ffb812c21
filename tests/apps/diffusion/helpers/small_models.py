"""Small networks with random weights, their batches, and the number of bytes that autograd stores."""

from typing import Any

import torch

from apps.diffusion.sampling.sampler import SamplingPlan, sample


def randomized(model, seed=0):
    """The model with all weights drawn, so that no layer is the identity."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=source) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5))
    return model


def batch(model, n=3, seed=1, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *model.latent, generator=source).to(dtype)
    t = torch.randint(1000, (n,), generator=source)
    return x, t, torch.randint(model.num_classes + 1, (n,), generator=source)


def saved_bytes(run):
    """Bytes that autograd keeps for the backward of run(), each storage once, parameters included."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    return sum(storages.values()), result


def sample_by(model: Any, indices: Any, labels: Any = None, *, seed: int, **options: Any):
    """`sample` with the fields of its plan among the options."""
    fields = {name: options.pop(name) for name in SamplingPlan.__dataclass_fields__ if name in options}
    return sample(model, indices, labels, plan=SamplingPlan(**fields), seed=seed, **options)
