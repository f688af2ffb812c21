"""The two networks: DiT, explicit, and FPDM, with a fixed point in its middle."""

from apps.diffusion.models.dit import DiT as DiT
from apps.diffusion.models.fpdm import FPDM as FPDM
