"""The posterior over gates as ArviZ data."""

import warnings
from typing import Any

import numpy as np
import torch

from pyro_bbits.analysis.posterior import GatePosterior

__all__ = ["to_inference_data"]


def to_inference_data(posterior: GatePosterior, *, chains: int = 4, draws: int = 250, seed: int = 0) -> Any:
    """Draw configurations and label them for ArviZ, of the 0.x or of the 1.x series.

    The draws are independent, so chains are only a way to arrange them, and convergence diagnostics have nothing to
    tell; those of a gate that is the same in every draw are NaN, with a warning. `az.summary(data, kind="stats")`
    leaves them out, and `az.plot_forest(data, var_names=["bits"], combined=True)` draws the widths.

    Arguments:
        posterior: The posterior.
        chains: Number of chains.
        draws: Draws per chain.
        seed: Seed of the draws.

    Returns:
        An `InferenceData` (ArviZ 0.x) or an xarray `DataTree` (1.x) whose group `posterior` holds the gates by site
        (`z2` over `channel`; `z4`, `z8`, ... over `tensor`), `bits` over `tensor`, `kept` over `layer`, and
        `relative_bops` in percent.

    Raises:
        ValueError: If `chains` or `draws` is below 1.
    """
    import arviz as az

    if chains < 1 or draws < 1:
        raise ValueError(f"chains and draws must be at least 1; got {chains} and {draws}.")
    layout = posterior.structure.layout
    gates = posterior.sample(chains * draws, seed=seed)

    def shaped(values: torch.Tensor) -> np.ndarray[Any, Any]:
        return values.reshape(chains, draws, *values.shape[1:]).numpy()

    variables = {site: shaped(gates.tensors[..., i]) for i, site in enumerate(layout.residual_sites)}
    dims = {site: ["tensor"] for site in layout.residual_sites} | {"bits": ["tensor"]}
    coords: dict[str, Any] = {"tensor": list(layout.tensors)}
    variables["bits"] = shaped(_bits(posterior, gates.channels, gates.tensors))
    if layout.num_channels:
        kept = torch.stack([gates.channels[:, part].sum(1) for part in layout.slices.values()], 1)
        variables |= {layout.channel_site: shaped(gates.channels), "kept": shaped(kept)}
        dims |= {layout.channel_site: ["channel"], "kept": ["layer"]}
        coords |= {"channel": list(layout.channel_names), "layer": list(layout.slices)}
    variables["relative_bops"] = shaped(posterior.cost.relative_bops_of_each(gates))
    attributes = {"inference_library": "pyro-bbits", "bit_ladder": list(layout.ladder.bits)}
    if int(az.__version__.partition(".")[0]) >= 1:  # another package under the same name, built on xarray's trees
        options: dict[str, Any] = {"attrs": {"posterior": attributes}, "check_conventions": False}
        return az.from_dict({"posterior": variables}, coords=coords, dims=dims, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "More chains", UserWarning)  # a guess at swapped dimensions
        return az.from_dict(posterior=variables, coords=coords, dims=dims, posterior_attrs=attributes)


def _bits(posterior: GatePosterior, channels: torch.Tensor, tensors: torch.Tensor) -> torch.Tensor:
    """Width of each tensor in each draw, (D, T)."""
    layout = posterior.structure.layout
    widths = torch.tensor(layout.ladder.bits)[tensors.sum(-1).long()]
    return torch.where(layout.any_channel(channels), widths, torch.zeros_like(widths))
