"""`python -m apps.diffusion.train` again and again, each time in a fork of a process that has imported it already.

Reads {"argv": [...], "log": file, "largest": bytes or null, "processes": number, "environment": {...}} from its
input, a line a run; prints the id of the run's first process, and when all have ended the largest exit code. A run may
write no file larger than `largest`. What comes after training (samples, scores) is left out; the digest of the network
that would make them is printed.
"""

import json
import os
import resource
import socket
import sys
import traceback

import torch
from accelerate.utils import DistributedType

from apps.diffusion import train
from apps.diffusion.files.hashing import of_tensors as digest
from apps.diffusion.training import distributed
from apps.diffusion.training import run as training_run

training_run.summarize = lambda _config, _trainer, network, *_: print("averaged:", digest(network.state_dict()))
torch.set_num_threads(1)
make_accelerator = distributed.accelerator


def accelerator(*arguments):
    """accelerate offers FSDP on accelerators only; its code runs on CPUs as well, once its state says so."""
    found = make_accelerator(*arguments)
    plugin = distributed.fsdp_plugin()
    if plugin is not None and found.distributed_type == DistributedType.MULTI_CPU:
        found.state.distributed_type = DistributedType.FSDP
        found.state.fsdp_plugin = plugin
    return found


distributed.accelerator = accelerator


def run(argv, log, largest):
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    code = 70
    try:
        code = train.main(argv)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ranks(processes):
    """The environment that `accelerate launch` gives each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    if processes == 1:
        return [{}]
    common = {"WORLD_SIZE": str(processes), **address}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


for line in sys.stdin:
    order = json.loads(line)
    pids = []
    further = order.pop("environment")
    for environment in ranks(order.pop("processes")):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ.update(environment | further)
            run(**order)
    print(pids[0], flush=True)
    print(max((os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), key=abs), flush=True)
