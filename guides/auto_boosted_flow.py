"""A boosted mixture of flows as the posterior over all continuous latents of a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import biject_to

from pyroboost.contexts import forked_rng
from pyroboost.distributions import BoostedFlow, Components
from pyroboost.guides._guarded import Guarded
from pyroboost.guides._placement import Factory, Whitening, build, factories, place
from pyroboost.guides._residual import ranked
from pyroboost.guides._start import Candidate, candidates, follow, starting_points
from pyroboost.guides._target import Target

__all__ = ["AutoBoostedFlow"]

_STARTS = ("pathfinder", "laplace", "none")
_QUANTILE_DRAWS = 20_000


class AutoBoostedFlow(AutoContinuous):
    r"""Guide the continuous latents of any Pyro model by a boosted mixture of flows.

    .. math:: q(u) = \sum_c w_c\, g_c(u), \qquad u = m + A\,(a_c + L_c f_c(z_0)), \qquad
        z_0 \sim N(0, I)

    u is the vector of all latents, each mapped to where it is free of constraints. m and A are
    fixed: the place and the shape of a normal law found before any training, so that flows act
    in coordinates in which the posterior is about standard normal, whatever the scales of the
    model. a_c and the triangular L_c place component c; f_c starts near the identity.

    1. **Start.** From `num_starts` points (that of `init_loc_fn`, draws from the prior, and
       uniform ones in the free coordinates) a path is followed uphill. "laplace" takes the law of
       the second derivatives at its end; "pathfinder" that law at the point of the path where it
       has the best evidence lower bound, improved by natural gradients, which also serves a density
       without a mode. Of all paths the best bound wins, so a far lower local mode is not taken;
       the others are kept as places for later components. Up to `full` dimensions the second
       derivatives are exact; above, they are those of limited-memory BFGS, low rank plus
       diagonal, without that improvement.
    2. **Training.** `infer.boost((model, guide), data)` trains all components and solves for
       their weights; it calls `propose` before each of them. Plain `SVI` trains the first one.
    3. **Sites.** Constraints and plates are as in Pyro's guides. Latents in a subsampled plate are
       refused: one vector cannot be the posterior of data that change. So are discrete ones:
       sum them out in the model. Hidden by `poutine.block` and enumerated they leave the guide to
       plain `SVI` with `TraceEnum_ELBO`, from a starting point with unit scale; `boost` refuses
       sites that the guide does not know.

    The first call on the model's arguments builds the flows, as does `load_state_dict`. Keep a
    trained guide by `state_dict`, or pickle it whole; Pyro's param store holds neither weights
    nor the frame.

    Args:
        model: a Pyro model.
        components: C, how many flows; 4 by default, or the length of a list of flows.
        flow: the name of a function in `pyroboost.flows`, or a function of D that returns a flow,
            or a list of C of these. In one dimension a coupling flow by name becomes a spline.
        init: "pathfinder", "laplace" or "none".
        num_starts: how many paths.
        init_loc_fn: Pyro's function for the starting value of a site.
        full: the largest D with full covariances and exact second derivatives.
        allow_slow: accept autoregressive flows, whose density costs D network passes.

    Raises:
        ValueError: if an option is of no use, or (at the first call) a flow cannot be boosted.

    Example:
        >>> from pyro.infer import Predictive
        >>> def model(x):
        ...     scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, scale), obs=x)
        >>> x = torch.randn(100)
        >>> guide = AutoBoostedFlow(model, components=2)
        >>> draws = Predictive(model, guide=guide, num_samples=10)(x)
        >>> draws["scale"].shape, guide.get_posterior()
        (torch.Size([10, 1]), BoostedFlow(spline: 1, spline: 0, event_shape=(1,)))

    Reference:
        Giaquinto and Banerjee, Gradient boosted flows (2020), Eq. 7; Zhang, Carpenter, Gelman and
        Vehtari, Pathfinder: parallel quasi-Newton variational inference (2022), Algorithms 1-4.
    """

    components: Components
    whitening: Whitening
    prototype_trace: Any

    def __init__(
        self,
        model: Callable[..., Any],
        components: int | None = None,
        flow: str | Factory | Sequence[str | Factory] = "realnvp",
        *,
        init: str = "pathfinder",
        num_starts: int = 8,
        init_loc_fn: Callable[..., Any] = init_to_median,
        full: int = 100,
        allow_slow: bool = False,
    ) -> None:
        if init not in _STARTS:
            raise ValueError(f"AutoBoostedFlow: init is {init!r}; give one of {_STARTS}.")
        if num_starts < 1:
            raise ValueError(f"AutoBoostedFlow: num_starts is {num_starts}; give one or more.")
        if full < 0:
            raise ValueError(f"AutoBoostedFlow: full is {full}; give a dimension, or 0.")
        super().__init__(model, init_loc_fn=init_loc_fn)
        # Hidden from nn.Module: the model's parameters are its own.
        self._program: tuple[Callable[..., Any]] | None = (model,)
        self.last_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._factories = factories(flow, components)
        self.init, self.num_starts, self.full = init, num_starts, full
        self.allow_slow = allow_slow
        self.places = torch.nn.ModuleList()  # the laws found at the start
        self._tries: dict[int, int] = {}

    # Setting up

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self._refuse()
        start = self._init_loc()
        if "components" not in self._modules:
            self._build(self.latent_dim)
            self.to(device=start.device, dtype=start.dtype)
            self.whitening.take(self._frame(args, kwargs, start))
        elif self.whitening.dim != self.latent_dim:
            dim = self.whitening.dim
            self.prototype_trace = None
            raise ValueError(
                f"AutoBoostedFlow: the state that was loaded has {dim} latent dimensions and this "
                f"model {self.latent_dim}; load the state of a guide for this model."
            )

    def _refuse(self) -> None:
        """Refuse latents that are not of all data, or have no density in places."""
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            if site["mask"] is not None and not bool(torch.as_tensor(site["mask"]).all()):
                self.prototype_trace = None
                raise NotImplementedError(
                    f"AutoBoostedFlow: site '{name}' is masked in part, and has no density and no "
                    "proper posterior there; mask the observed site alone (obs=..., within "
                    "poutine.mask, in place of obs_mask=), or leave those rows out."
                )
            for frame in site["cond_indep_stack"]:
                if frame.full_size is not None and frame.full_size != frame.size:
                    self.prototype_trace = None
                    raise NotImplementedError(
                        f"AutoBoostedFlow: site '{name}' is in plate '{frame.name}', which takes "
                        f"{frame.size} of {frame.full_size} rows, and one vector of latents cannot "
                        "serve rows that change; use an amortised guide for that site, and hide it "
                        f"here by poutine.block(model, hide=['{name}'])."
                    )

    def _build(self, dim: int, rank: int = 0) -> None:
        self.whitening = Whitening(dim, rank)
        settings = (self.whitening, self.full, self.allow_slow)
        makers = [partial(build, make, *settings) for make in self._factories]
        self.components = Components(makers, allow_slow=self.allow_slow)

    def _frame(self, args: tuple[Any, ...], kwargs: dict[str, Any], start: Tensor) -> Whitening:
        """Return the law in whose coordinates flows act, and remember the others found."""
        default = Whitening(self.latent_dim).to(start)
        default.loc = start
        if self.init == "none":
            return default
        with forked_rng(), torch.no_grad():
            target = self._target(args, kwargs, start, first=True)
            if target.random:
                return default
            self.places.extend(one.law for one in self._search(target))
        if not self.places:
            raise RuntimeError(
                "AutoBoostedFlow: from none of the starts was a finite log density with finite "
                f"derivatives found ({target.complaint()}); mend the data or the model, or give "
                "an init_loc_fn or init='none'."
            )
        first: Any = self.places[0]
        return first

    def _search(self, target: Target) -> list[Candidate]:
        sites = list(self.prototype_trace.iter_stochastic_nodes())
        assert self._program is not None
        starts = starting_points(target, self._program[0], sites, self.num_starts)
        laplace = self.init == "laplace"
        return candidates(target, starts, laplace=laplace, full=self.full)

    def _target(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], start: Tensor, *, first: bool = False
    ) -> Target:
        if self._program is None:
            raise RuntimeError(
                "AutoBoostedFlow: this guide was unpickled without its model, which could not be "
                "pickled; load its state_dict() into a new guide for that model."
            )
        model = self._program[0]
        if self.master is not None:
            whole = self.master()
            others = self._others(whole, args, kwargs, first=first)
            model = poutine.condition(whole.model, data=others)
        return Target(model, self._unpack_latent, start, args, kwargs)

    def _others(
        self, whole: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, first: bool
    ) -> dict[str, Tensor]:
        """Return what the other members of a list hold: where they started, later their medians."""
        values = {
            name: site["value"].detach()
            for name, site in whole.prototype_trace.iter_stochastic_nodes()
            if name not in self._unconstrained_shapes and not site["fn"].support.is_discrete
        }
        for part in () if first else whole:
            if part is not self:
                with suppress(NotImplementedError), torch.no_grad(), poutine.block():
                    found = part.median(*args, **kwargs)
                    values.update({n: v.detach() for n, v in found.items() if n in values})
        return values

    # The posterior

    def _ready(self, what: str) -> None:
        if "components" not in self._modules:
            raise RuntimeError(
                f"AutoBoostedFlow.{what}: the dimension is not known yet; call the guide once on "
                "the model's arguments, or load a state."
            )

    def get_base_dist(self) -> TorchDistribution:
        """Return q_0, a standard normal law of D coordinates."""
        self._ready("get_base_dist")
        zero = torch.zeros_like(self.whitening.loc)
        return dist.Normal(zero, torch.ones_like(zero)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        """Return the transform from q_0 to u of the component with the largest weight.

        With it `NeuTraReparam(guide)` lets NUTS run in that component's coordinates.
        """
        self._ready("get_transform")
        best: Any = self.components.flows[int(self.components.weights.argmax())]
        return best.condition(None)

    def get_posterior(self, *args: Any, **kwargs: Any) -> BoostedFlow:
        """Return the mixture over the vector u of all latents, free of constraints."""
        base, components = self.get_base_dist(), self.components
        posterior: BoostedFlow = components(base)
        return posterior

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latents, as any guide of Pyro does."""
        self.last_call = args, kwargs
        if not pyro.settings.get("module_local_params"):
            self._disown()
        drawn: dict[str, Tensor] = super().forward(*args, **kwargs)
        return drawn

    def _disown(self) -> None:
        """Drop tensors from Pyro's store that this guide's flows no longer have, or never had.

        The store would hand them to SVI, which would then train what nobody uses: a flow that was
        put in the place of another has new tensors under the old names.
        """
        if "components" not in self._modules:
            return
        store, head = pyro.get_param_store(), self._pyro_get_fullname("components")
        for name, own in self._modules["components"].named_parameters():
            held = store._params.get(f"{head}$$${name}")
            if held is not None and held is not own:
                del store[f"{head}$$${name}"]

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw u as an auxiliary site."""
        law = Guarded.of(self.get_posterior(*args, **kwargs), _refuse)
        name = f"_{self._pyro_name}_latent"
        drawn: Tensor = pyro.sample(name, law, infer={"is_auxiliary": True})
        return drawn

    def log_density(self, points: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the model's log density over u: log p(x, latents) + log |d latents / d u|.

        Args:
            points: values of u.  # (S, D)
            *args: arguments of the model.
            **kwargs: its arguments by name.

        Returns:
            Log densities in nats, up to the evidence log p(x).  # (S)
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self._target(args, kwargs, self._init_loc())(points)

    @torch.no_grad()
    def propose(self, c: int, *args: Any, attempt: int | None = None, **kwargs: Any) -> None:
        """Put a new flow in the place of component c and place it where the mixture falls short.

        As a member of a list it takes the other members at their medians.

        The places tried are the modes found at the start, moments and points of the mass that
        the mixture misses, and what is found uphill of them. The one that would raise the bound
        of the mixture most is taken, and the next best when component c is proposed again.

        Args:
            c: the component.
            *args: arguments of the model.
            attempt: how many proposals came before; counted here where left out.
            **kwargs: its arguments by name.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self.components.restart(c)
        with poutine.block():
            target = self._target(args, kwargs, self._init_loc())
            if target.random:
                return
            if not self.places:
                self.places.extend(one.law for one in self._search(target))
            laws: list[Any] = list(self.places)
            if self.master is not None:  # the other members were elsewhere when these were found
                laws += self._again(target, laws)
            found = ranked(target, self.get_posterior(), laws, self.whitening, self.full)
        if found:
            again = self._tries.get(c, 0) if attempt is None else attempt
            self._tries[c] = again + 1
            flow: Any = self.components.flows[c]
            place(flow, found[again % len(found)])

    def _again(self, target: Target, laws: list[Any]) -> list[Any]:
        """Climb from known places once more, under the density of now."""
        laplace = self.init == "laplace"
        found = (follow(target, law.loc, laplace=laplace, full=self.full) for law in laws)
        return [one.law for one in found if one is not None]

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each coordinate of u, mapped to the latents.

        It is taken over 20,000 draws with a seed of their own; torch's random state stays.
        """
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles (Q) of each coordinate of u, mapped to the latents, (Q, *shape).

        They are taken over 20,000 draws with a seed of their own; torch's random state stays.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        with forked_rng(0):
            draws = self.get_posterior(*args, **kwargs).sample((_QUANTILE_DRAWS,))
        levels = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device)
        found: dict[str, list[Tensor]] = {}
        for row in draws.quantile(levels.reshape(-1), dim=0):
            for site, free in self._unpack_latent(row):
                found.setdefault(site["name"], []).append(biject_to(site["fn"].support)(free))
        return {name: torch.stack(values) for name, values in found.items()}

    # Copies and states

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        laws: list[Whitening] = []
        while (one := state_dict.get(f"{prefix}places.{len(laws)}.basis")) is not None:
            laws.append(Whitening(*one.shape).to(one))
        self.places = torch.nn.ModuleList(laws)
        basis = state_dict.get(f"{prefix}whitening.basis")
        if basis is not None:
            dim, rank = basis.shape
            if "components" not in self._modules:
                self._build(dim, rank)
                self.to(device=basis.device, dtype=basis.dtype)
            elif self.whitening.dim == dim:
                self.whitening.take(Whitening(dim, rank))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be pickled, and keep it here; Pyro's own guides lose the model."""
        held: tuple[Any, Any] = (self.__dict__["_model"], self.__dict__["master"])
        try:
            state = dict(super().__getstate__())
        finally:
            self._model, self.master = held
        state["last_call"] = None
        try:
            pickle.dumps(self._program)
        except Exception:  # of any model: pickle's own errors, and what a __reduce__ may raise
            state["_program"] = None
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoBoostedFlow:
        """Copy the guide; Pyro's own guides lose their model when they are copied."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        left_out = ("master", "last_call")
        kept = {name: value for name, value in self.__dict__.items() if name not in left_out}
        twin.__dict__.update(copy.deepcopy(kept, memo))
        twin.__dict__.update(dict.fromkeys(left_out))
        return twin


def _refuse(count: int) -> None:
    raise NotImplementedError(
        f"AutoBoostedFlow: {count} components have weight, and an ordinary objective has no "
        "pathwise gradient through the choice among them; train them by "
        "pyroboost.infer.boost((model, guide), data)."
    )
