"""Pyro's mean-field ELBO for gates: nothing is read on the host, and nothing computed that the loss does not need."""

from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import is_validation_enabled, torch_item
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_bbits.distributions import AbstractRelaxedGate, DrawnPart, GateBernoulli, PriorSite
from pyro_bbits.inference.guides import AbstractGateGuide
from pyro_bbits.inference.joint import JointSites
from pyro_bbits.models.likelihoods import ScoredCategorical

__all__ = ["GateELBO"]


class GateELBO(TraceMeanField_ELBO):
    r"""The loss of :class:`~pyro.infer.TraceMeanField_ELBO`, made so that a whole step can be one CUDA graph.

    .. math::
        -\frac{1}{S} \sum_{s} \Big[ \log p(D \mid z_s) \Big] + \mathrm{KL}(q(z) \,\|\, p(z)), \qquad z_s \sim q

    Value and gradients are the same up to rounding. What differs is what is computed:

    - :meth:`differentiable_loss` returns a tensor that was never read on the host, NaN or not;
    - log-probabilities are those of observed sites, and of latent ones whose KL is not known in closed form;
    - the KL of all gates of an :class:`~pyro_bbits.inference.AbstractGateGuide` comes with their draw, if model and
      guide sample them as :func:`~pyro_bbits.models.sample_gates` and the guide do, neither scaled nor masked nor
      within further plates. Whatever else there is takes the way of any Pyro program, site by site.

    With Pyro's validation on, all its checks are made, and these read on the host.

    Arguments:
        num_particles: Gate samples per step.
    """

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The negative ELBO in nats per data set, a scalar."""
        traces = self._get_traces(model, guide, args, kwargs)
        losses = [self._differentiable_loss_particle(*pair)[1] for pair in traces]
        total: Tensor = sum(losses[1:], start=losses[0])
        return total / self.num_particles if len(losses) > 1 else total

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The same as a number."""
        return float(torch_item(super().loss(model, guide, *args, **kwargs)))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The same as a number, after a backward pass; what :class:`pyro.infer.SVI` calls."""
        return float(torch_item(super().loss_and_grads(model, guide, *args, **kwargs)))

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        num_data = getattr(model, "num_data", None)
        if isinstance(guide, AbstractGateGuide) and isinstance(num_data, int):
            with guide.pricing(num_data):
                return self._run(model, guide, args, kwargs)
        return self._run(model, guide, args, kwargs)

    def _run(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if is_validation_enabled() or isinstance(poutine.unwrap(guide), poutine.messenger.Messenger):
            traces: tuple[Any, Any] = super()._get_trace(model, guide, args, kwargs)
            return traces
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[Tensor, Tensor]:
        loss, priced = _joint_kl(model_trace, guide_trace)
        for name, site in model_trace.nodes.items():
            if site["type"] == "sample" and name not in priced:
                if site["is_observed"]:
                    loss = _without_observed(loss, model_trace, name)
                else:
                    loss = loss + _site_kl(model_trace, guide_trace, name)
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:
                if not site["infer"].get("is_auxiliary"):
                    raise ValueError(
                        f"the guide samples {name!r}, which the model does not; give the site "
                        "infer={'is_auxiliary': True} if that is meant."
                    )
                loss = loss + _entropy_term(site)
        return loss.detach(), loss


def _joint_kl(model_trace: Any, guide_trace: Any) -> tuple[Any, frozenset[str]]:
    """The KL that came with the draw of the gates, and the sites that it is of; 0 and none if it does not hold."""
    sites = next((s for s in map(_source, guide_trace.nodes.values()) if s is not None), None)
    if sites is None or sites.draw is None or sites.draw.kl is None or sites.num_data is None:
        return 0.0, frozenset()
    layout = sites.prior.layout
    names = (layout.channel_site,) * bool(layout.num_channels) + layout.residual_sites
    if not all(
        _is_unmodified(guide_trace.nodes.get(name), sites, name)
        and _is_priced(model_trace.nodes.get(name), PriorSite(sites.prior, sites.num_data, name))
        for name in names
    ):
        return 0.0, frozenset()
    return sites.draw.kl.sum(), frozenset(names)


def _source(site: Any) -> JointSites | None:
    gate = site.get("fn")
    part = gate.part if isinstance(gate, AbstractRelaxedGate) else None
    return part.source if isinstance(part, DrawnPart) and isinstance(part.source, JointSites) else None


def _is_unmodified(site: Any, sites: JointSites, name: str) -> bool:
    """Whether a site of the guide is the one that the guide made, and counts once."""
    if site is None or _source(site) is not sites or site["fn"].part.site != name:
        return False
    return site["mask"] is None and isinstance(site["scale"], int | float) and site["scale"] == 1


def _is_priced(site: Any, expected: PriorSite) -> bool:
    """Whether a latent site of the model has the gate prior that the KL was made with."""
    if site is None or site["is_observed"] or type(site["fn"]) is not GateBernoulli:
        return False
    return bool(site["fn"].made_at == expected)


def _site_kl(model_trace: Any, guide_trace: Any, name: str) -> Tensor:
    """KL of one site, or its estimate from the value drawn where none is registered, as in Pyro."""
    q = guide_trace.nodes[name]
    try:
        kl = kl_divergence(q["fn"], model_trace.nodes[name]["fn"])
    except NotImplementedError:
        return _entropy_term(q) - _log_prob_sum(model_trace, name)
    kl = scale_and_mask(kl, scale=q["scale"], mask=q["mask"])
    return kl.sum() if isinstance(kl, Tensor) else kl * q["fn"].batch_shape.numel()


def _log_prob_sum(trace: Any, name: str) -> Tensor:
    trace.compute_log_prob(site_filter=lambda other, _: other == name)
    total: Tensor = trace.nodes[name]["log_prob_sum"]
    return total


def _without_observed(loss: Any, trace: Any, name: str) -> Tensor:
    """A loss less the log-probability of an observed site; the usual classes take no kernel for each factor of it."""
    site = trace.nodes[name]
    unmasked = site["mask"] is None and isinstance(site["scale"], int | float)
    summed = site["fn"].summed_loss(site["value"]) if unmasked and type(site["fn"]) is ScoredCategorical else None
    if summed is None:
        remaining: Tensor = loss - _log_prob_sum(trace, name)
        return remaining
    return torch.add(loss, summed, alpha=site["scale"]) if isinstance(loss, Tensor) else site["scale"] * summed


def _entropy_term(site: Any) -> Tensor:
    parts = site["fn"].score_parts(site["value"], *site["args"], **site["kwargs"])
    term: Tensor = parts.scale_and_mask(site["scale"], site["mask"]).entropy_term.sum()
    return term
