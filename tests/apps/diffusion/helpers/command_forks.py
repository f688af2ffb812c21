"""The commands of apps.diffusion, each in forks of a process that has imported them already, as torchrun starts them.

Reads {"module": "apps.diffusion.train", "argv": [...], "processes": number} from its input, a line a command, and
prints the largest exit code of its processes.
"""

import json
import os
import socket
import sys
import traceback

import torch

from apps.diffusion import encode, evaluate, sample, train

COMMANDS = {module.__name__: module for module in (encode, evaluate, sample, train)}
torch.set_num_threads(1)


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run(module, argv):
    os.dup2(2, 1)  # the launcher's output holds exit codes alone
    code = 70
    try:
        code = COMMANDS[module].main(argv)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


for line in sys.stdin:
    order = json.loads(line)
    world = order.pop("processes")
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()} if world > 1 else {}
    pids = []
    for rank in range(world):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ.update(common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}))
            run(**order)
    print(max((os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), key=abs), flush=True)
