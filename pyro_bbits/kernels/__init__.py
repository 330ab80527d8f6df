"""Several steps of a quantized network in one sweep over memory, by Triton kernels where there is a GPU."""
