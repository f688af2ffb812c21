"""Data sets: images and labels by index."""

from .digits import digits as digits
from .images import DataSet as DataSet
from .images import Images as Images
from .images import order as order
