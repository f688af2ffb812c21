"""The two networks: DiT, which has explicit blocks only, and FPDM, whose middle is a fixed-point layer."""

from apps.diffusion.models.dit import DiT as DiT
from apps.diffusion.models.fpdm import FPDM as FPDM
