"""Image classification data held in memory: splits, the named sources and the batch loader."""

from pyro_bbits.data.loader import TensorLoader
from pyro_bbits.data.sources import load_data
from pyro_bbits.data.splits import DataSplits, Split, validation_split

__all__ = ["DataSplits", "Split", "TensorLoader", "load_data", "validation_split"]
