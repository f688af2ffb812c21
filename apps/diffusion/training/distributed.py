"""Several processes: who computes what, and where the weights are.

Weights are copied to every process (DDP), or each process holds a share of every tensor: FSDP2 through accelerate,
`accelerate launch --use_fsdp --fsdp_version 2`. A share is put together for the time of its use:

    DiT    block by block
    FPDM   all at once, from the beginning of a step to its end: the iterations of the fixed point evaluate the same
           weights again and again, and they are few

The averaged weights and the optimizer's moments are shared out like the weights. What leaves the trainer, checkpoints
and networks to sample from, is whole.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from apps.diffusion.config.training import OptimizerConfig

_KNOWN = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
    DistributedType.FSDP,
}


def accelerator(config: OptimizerConfig, track: str | None, folder: Path) -> Accelerator:
    """What accelerate knows of this process and the others.

    accelerate offers FSDP on accelerators alone; its code runs on CPUs as well, once its state says so. It also has to
    be told that processes are there where no accelerator is.

    Raises:
        ValueError: settings of FSDP that are not supported, or a batch that cannot be shared out.
    """
    plugin = _fsdp()
    cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    found = Accelerator(
        cpu=cpu, mixed_precision=config.precision, log_with=track, project_dir=folder, fsdp_plugin=plugin
    )
    if plugin is not None and found.distributed_type == DistributedType.MULTI_CPU:
        found.state.distributed_type = DistributedType.FSDP
        found.state.fsdp_plugin = plugin
    check_processes(config, found)
    return found


def _fsdp() -> FullyShardedDataParallelPlugin | None:
    """FSDP as `accelerate launch` was asked for it; None where it was not.

    Computing in bfloat16 is autocast's business, as without FSDP: weights are gathered and gradients added up in
    float32. The parts are those of `_no_split_modules`.

    Raises:
        ValueError: settings that are not supported.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP of version 1 is not supported; launch with --use_fsdp --fsdp_version 2.")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,  # every process makes the same weights from the seed
        mixed_precision_policy=MixedPrecisionPolicy(),
    )
    plugin.transformer_cls_names_to_wrap = None  # the network knows its parts
    # that what it returns must not be written into, which nobody does
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    if plugin.activation_checkpointing:
        raise ValueError(
            "accelerate's activation checkpointing does not see the iterations of a fixed point; leave out "
            "--fsdp_activation_checkpointing and give --optimizer.checkpointing."
        )
    for refused, flag in (
        (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "--fsdp_offload_params"),
        (plugin.ignored_modules is not None, "--fsdp_ignored_modules"),
    ):
        if refused:
            raise ValueError(f"{flag} is not supported; leave it out.")
    return plugin


def check_processes(config: OptimizerConfig, accelerator: Accelerator) -> None:
    """Raises ValueError where the batch cannot be shared out, or processes work together in a way unknown here."""
    processes, parts = accelerator.num_processes, config.accumulate
    if config.batch % (processes * parts):
        raise ValueError(
            f"--optimizer.batch = {config.batch} cannot be shared by {processes} processes in {parts} parts each; "
            f"make it a multiple of {processes * parts}."
        )
    if accelerator.distributed_type not in _KNOWN:
        raise ValueError(
            f"accelerate was asked for {accelerator.distributed_type.value}, which is not supported; launch with "
            "--multi_gpu, or with --use_fsdp --fsdp_version 2 to share out the weights."
        )


def like(model: nn.Module, sharded: nn.Module) -> None:
    """Share out the tensors of a network as those of its sharded copy are; nothing where those are whole."""
    if isinstance(sharded, FSDPModule):
        mesh = next(p.device_mesh for p in sharded.parameters() if isinstance(p, DTensor))
        fully_shard(model, mesh=mesh)


def number(value: Tensor) -> float:
    """A scalar, put together if need be."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors put together from their shares, on the CPU where `keep` is set and nowhere else; whole ones as they are.

    All processes must call this. One tensor at a time is put together.
    """
    found = {}
    for name, value in tensors.items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
            if not keep:
                continue
            value = value.cpu()
        found[name] = value
    return found


def shares(state: Mapping[int, Mapping[str, Tensor]], parameters: Iterable[Tensor]) -> dict[int, dict[str, Tensor]]:
    """An optimizer's state by parameter number, each moment shared out as its parameter is."""
    held = list(parameters)

    def share(value: Tensor, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor) or not value.ndim:
            return value
        here = value.to(parameter.device)
        # every process has read the same checkpoint, so none has to send its own
        return distribute_tensor(here, parameter.device_mesh, parameter.placements, src_data_rank=None)

    return {i: {name: share(value, held[i]) for name, value in entry.items()} for i, entry in state.items()}
