"""The two networks: DiT, explicit, and FPDM, with a fixed point in its middle."""

from .dit import DiT as DiT
from .fpdm import FPDM as FPDM
