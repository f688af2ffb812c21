"""Training without the summary, for `forks`: it prints a digest of the network instead of sampling and scoring."""

from accelerate.utils import DistributedType

from apps.diffusion import train
from apps.diffusion.files.hashing import of_tensors as digest
from apps.diffusion.training import distributed, trainer
from apps.diffusion.training import run as training_run

make_accelerator = distributed.accelerator


def accelerator(*arguments):
    """accelerate offers FSDP on accelerators only; its code runs on CPUs as well, once its state says so."""
    found = make_accelerator(*arguments)
    plugin = distributed.fsdp_plugin()
    if plugin is not None and found.distributed_type == DistributedType.MULTI_CPU:
        found.state.distributed_type = DistributedType.FSDP
        found.state.fsdp_plugin = plugin
    return found


def main(argv):
    training_run.summarize = lambda _config, _trainer, network, *_: print("averaged:", digest(network.state_dict()))
    distributed.accelerator = accelerator
    trainer.AGREE_EVERY = 0.0  # after every step
    return train.main(argv)
