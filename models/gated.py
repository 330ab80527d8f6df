"""The Bayesian Bits model, and the plain network in the same form."""

from typing import Any, Literal

from pyro.ops.provenance import get_provenance, track_provenance
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyro_bbits.gates import GateValues
from pyro_bbits.insertion import QuantizedNetwork
from pyro_bbits.models.likelihoods import Likelihood, resolve_likelihood
from pyro_bbits.models.program import call_network, observe, sample_gates
from pyro_bbits.prior import GatePrior

__all__ = ["AbstractModel", "GatedModel", "PlainModel"]

LikelihoodName = Literal["categorical", "normal"]


class AbstractModel(nn.Module):
    """What the training loop needs of a model: `net`, `num_data`, a likelihood, and `predict`."""

    def __init__(self, net: nn.Module, num_data: int, likelihood: LikelihoodName | Likelihood) -> None:
        super().__init__()
        if num_data < 1:
            raise ValueError(f"num_data must be at least 1, the number of training samples; got {num_data}.")
        self.net, self.num_data = net, int(num_data)
        self.likelihood = resolve_likelihood(likelihood)

    def predict(self, x: Any, gates: GateValues | None = None) -> Any:
        """Distribution of the targets given inputs and fixed gates; no gate is sampled."""
        raise NotImplementedError


class GatedModel(AbstractModel):
    r"""A network with gated quantizers as a Pyro model.

    .. math::
        z \sim p(z), \qquad y_n \sim p(y \mid f(x_n; Q(\theta, z)))

    Weights and ranges are ordinary parameters (point estimates); only the gates are random, drawn by
    :func:`~pyro_bbits.models.program.sample_gates` at the sites `z2`, `z4`, ...; the targets are observed at `obs` in
    the plate `data`, scaled from the batch to the whole data set. The model is a plain :class:`torch.nn.Module`.

    Arguments:
        net: The quantized network.
        prior: The gate prior over it.
        num_data: Number of training samples `N`.
        likelihood: `categorical`, `normal`, or a callable from the network's output to a distribution with batch shape
            `(batch,)`; a module's parameters are trained with the weights.

    Raises:
        ValueError: If `num_data` is below 1, the likelihood is unknown or the prior belongs to another layout.
    """

    def __init__(
        self,
        net: QuantizedNetwork,
        prior: GatePrior,
        num_data: int,
        likelihood: LikelihoodName | Likelihood = "categorical",
    ) -> None:
        super().__init__(net, num_data, likelihood)
        self.net: QuantizedNetwork
        if prior.layout != net.layout:
            raise ValueError("the prior was made for another network; build it from this one: GatePrior(net, mu=...).")
        self.prior = prior

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        """Run the program on a batch.

        Arguments:
            x: What the network takes: a tensor, a tuple of arguments or a dict of keyword arguments.
            y: Targets `(N, ...)`, or None to sample them.

        Returns:
            Observed or sampled targets.
        """
        gates = sample_gates(self.prior, self.num_data)
        output = call_network(self.net, x, gates=gates)
        # the quantizer works on plain memory, where what render_model follows would be lost
        drawn = get_provenance(gates)
        output = tree_map(lambda leaf: track_provenance(leaf, drawn) if isinstance(leaf, Tensor) else leaf, output)
        return observe(self.likelihood_of(x), output, y, self.num_data)

    def likelihood_of(self, x: Any) -> Likelihood:
        """What the targets of a batch are observed under, given the network's output; the likelihood of all, here."""
        return self.likelihood

    def predict(self, x: Any, gates: GateValues | None = None) -> Any:
        """Distribution of the targets given inputs and fixed gates (all open if None)."""
        gates = self.net.open_gates() if gates is None else gates
        return self.likelihood(call_network(self.net, x, gates=gates))


class PlainModel(AbstractModel):
    """A float network as a Pyro model with nothing random but the data: the full-precision reference.

    Arguments:
        net: Any network.
        num_data: Number of training samples.
        likelihood: As for :class:`GatedModel`.
    """

    def __init__(self, net: nn.Module, num_data: int, likelihood: LikelihoodName | Likelihood = "categorical") -> None:
        super().__init__(net, num_data, likelihood)

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        """Run the program on a batch; see :meth:`GatedModel.forward`."""
        return observe(self.likelihood, call_network(self.net, x), y, self.num_data)

    def predict(self, x: Any, gates: GateValues | None = None) -> Any:
        """Distribution of the targets given inputs."""
        return self.likelihood(call_network(self.net, x))
