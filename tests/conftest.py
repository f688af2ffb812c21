"""The tests check every shape and type that `implicit` declares, at run time; benchmarks and users do not.

The checks take three times as long as the tests themselves, so that `make test` leaves them out (CHECK_TYPES=0) but in
the files that its Makefile lists, which call every solver, estimator and diagnostic.

All tests run on one thread, and so do the processes they start: sums are then the same to the last bit everywhere.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping
import torch

torch.set_num_threads(1)
if os.environ.get("CHECK_TYPES", "1") != "0":
    jaxtyping.install_import_hook("implicit", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
