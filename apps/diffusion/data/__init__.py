"""Map-style datasets of images and labels, and the sampler of training batches."""

from apps.diffusion.data.batch_sampler import BatchSampler as BatchSampler
from apps.diffusion.data.dataset import ImageDataset as ImageDataset
from apps.diffusion.data.dataset import TensorDataset as TensorDataset
from apps.diffusion.data.digits import digits as digits
from apps.diffusion.data.image_folder import ImageFolderDataset as ImageFolderDataset
from apps.diffusion.data.latents import LatentDataset as LatentDataset
