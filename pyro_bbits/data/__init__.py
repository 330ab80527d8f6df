"""Data: splits in memory or pictures on disk, the sources they come from, and the loaders that batch them."""

from pyro_bbits.data.image_folder import ImageFolderData
from pyro_bbits.data.loader import TensorLoader
from pyro_bbits.data.picture_cache import PictureCache
from pyro_bbits.data.picture_loader import ImageFolderLoader
from pyro_bbits.data.pictures import PictureFiles
from pyro_bbits.data.plan import BatchLoader, EpochPlan
from pyro_bbits.data.prefetch import Prefetcher
from pyro_bbits.data.resident import ResidentBatches
from pyro_bbits.data.scaling import Scaling
from pyro_bbits.data.sources import load_data, open_data
from pyro_bbits.data.splits import DataSplits, Loaders, Split, validation_split

__all__ = [
    "BatchLoader",
    "DataSplits",
    "EpochPlan",
    "ImageFolderData",
    "ImageFolderLoader",
    "Loaders",
    "PictureCache",
    "PictureFiles",
    "Prefetcher",
    "ResidentBatches",
    "Scaling",
    "Split",
    "TensorLoader",
    "load_data",
    "open_data",
    "validation_split",
]
