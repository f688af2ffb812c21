"""Several processes: parallelism by accelerate, and the state of a run as whole tensors.

Weights are copied to every process (DDP), or each process holds a shard of every tensor: FSDP2 through accelerate,
`accelerate launch --use_fsdp --fsdp_version 2`. Shards are gathered for the time of their use:

    DiT    block by block
    FPDM   all at once, from the beginning of a step to its end: an FPDM has few weights, and every iteration of the
           fixed point uses all weights of the layer

Averaged weights and the optimizer's moments are sharded like the weights. Checkpoints, and networks to sample from,
hold whole tensors; `torch.distributed.checkpoint.state_dict` converts between shards and whole tensors.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from apps.diffusion.config import training as c

_KNOWN = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
    DistributedType.FSDP,
}
_WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)


def accelerator(config: c.Config, track: str | None, folder: Path) -> Accelerator:
    """The accelerator of a run.

    Raises:
        ValueError: FSDP settings that are not supported, a batch size that is not divisible by the number of processes
            and parts, or a device that accelerate does not find.
    """
    # on a machine without a GPU, accelerate finds several processes only if it is set to compute on the CPU
    cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    found = Accelerator(
        cpu=cpu or config.device == "cpu",
        mixed_precision=config.optimizer.precision,
        log_with=track,
        project_dir=folder,
        fsdp_plugin=fsdp_plugin(),
    )
    if config.device not in ("auto", found.device.type, str(found.device)):
        raise ValueError(
            f"--device {config.device} is not available; accelerate found {found.device}. Give auto or cpu."
        )
    check_processes(config.optimizer, found)
    return found


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """The FSDP plugin with the settings of `accelerate launch`; None if `accelerate launch` has no `--use_fsdp`.

    Weights, gathered weights and gradients are float32; with `precision` bf16, autocast computes in bfloat16, as
    without FSDP. The modules that are sharded as units are those of the network's `_no_split_modules`.

    Raises:
        ValueError: FSDP settings that are not supported.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP of version 1 is not supported; launch with --use_fsdp --fsdp_version 2.")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,  # every process initializes the same weights from the seed
        mixed_precision_policy=MixedPrecisionPolicy(),
    )
    plugin.transformer_cls_names_to_wrap = None  # None: accelerate reads the network's `_no_split_modules`
    # FSDP warns against writing into the output in place; the training step does not write into the output
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    if plugin.activation_checkpointing:
        raise ValueError(
            "--fsdp_activation_checkpointing does not cover the iterations of a fixed point; leave it out, and give "
            "--optimizer.checkpointing."
        )
    for refused, flag in (
        (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "--fsdp_offload_params"),
        (plugin.ignored_modules is not None, "--fsdp_ignored_modules"),
    ):
        if refused:
            raise ValueError(f"{flag} is not supported; leave it out.")
    return plugin


def check_processes(config: c.OptimizerConfig, accelerator: Accelerator) -> None:
    """Raises ValueError if the batch size is not divisible by processes times parts, or if accelerate is configured for
    a kind of parallelism that is not supported.
    """
    processes, parts = accelerator.num_processes, config.accumulate
    if config.batch % (processes * parts):
        raise ValueError(
            f"--optimizer.batch {config.batch} cannot be shared by {processes} processes in {parts} parts each; "
            f"make it a multiple of {processes * parts}."
        )
    if accelerator.distributed_type not in _KNOWN:
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which is not supported; launch with "
            "--multi_gpu, or with --use_fsdp --fsdp_version 2 to shard the weights."
        )


def shard_like(model: nn.Module, sharded: nn.Module) -> None:
    """Shards the tensors of `model` like those of its copy `sharded`; does nothing if `sharded` has whole tensors."""
    if isinstance(sharded, FSDPModule):
        mesh = next(p.device_mesh for p in sharded.parameters() if isinstance(p, DTensor))
        fully_shard(model, mesh=mesh)


def full_tensor(value: Tensor) -> Tensor:
    """The whole tensor; all processes must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights as whole tensors on the CPU, in the first process; empty in the other ones. All must call this."""
    whole: dict[str, Any] = dcp.get_model_state_dict(model, options=_WHOLE)
    return dict(whole)


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> dict[int, dict[str, Tensor]]:
    """The optimizer's moments as whole tensors on the CPU, by parameter number, in the first process; empty in the
    other ones. All processes must call this.

    Args:
        model: the network whose parameters the optimizer updates.
        optimizer: the optimizer; before its first step the state is empty.
        names: names of the parameters, in the optimizer's order.
    """
    if not optimizer.state:
        return {}
    whole: dict[str, Any] = dcp.get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    found: Mapping[str, Any] = whole.get("state", {})
    return {i: dict(found[name]) for i, name in enumerate(names) if name in found}


def load_optimizer_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    state: Mapping[int, Mapping[str, Tensor]],
) -> None:
    """Loads into the optimizer the state that `optimizer_state` returned; tensors are sharded like the parameters. All
    processes must call this.
    """
    groups = optimizer.state_dict()["param_groups"]
    if not isinstance(model, FSDPModule):
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    elif state:
        named = {
            "state": {names[i]: dict(entry) for i, entry in state.items()},
            "param_groups": [{**group, "params": [names[i] for i in group["params"]]} for group in groups],
        }
        options = dcp.StateDictOptions(full_state_dict=True)
        dcp.set_optimizer_state_dict(model, optimizer, named, options=options)
