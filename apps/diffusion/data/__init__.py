"""Data sets: images and labels by index."""

from apps.diffusion.data.dataset import DataSet as DataSet
from apps.diffusion.data.dataset import Images as Images
from apps.diffusion.data.dataset import order as order
from apps.diffusion.data.digits import digits as digits
