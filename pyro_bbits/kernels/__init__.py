"""GPU kernels; the modules that import Triton are loaded only where they run."""
