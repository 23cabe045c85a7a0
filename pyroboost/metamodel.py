"""The contract: a Pyro model/guide pair with one named visible and one named hidden site."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor, nn

from pyroboost.contexts import forked_rng, service
from pyroboost.handlers import capture, given, unobserve
from pyroboost.likelihood import Kind, Likelihood
from pyroboost.program import Program, first_tensor
from pyroboost.traces import datum_log_prob, latent_parents

if TYPE_CHECKING:
    from pyroboost.weights import Draw

__all__ = ["MetaModel", "Round", "datum_log_prob"]


class Round(NamedTuple):
    """One ordinary problem of fitting one pair to some data.

    Args:
        pair: the meta-model to be trained; nothing else moves.
        data: a tensor, tensors, or a re-iterable of batches.
        validation: held-out data of the same form, or ``None``.
        name: what the round is called in tables and checkpoints.
        transform: what makes of a batch of data a batch for this pair, drawn afresh each epoch.
        weights: a weight for each training datum; ``None``: all alike.  # (N,)
        validation_weights: the same for held-out data.  # (M,)
    """

    pair: MetaModel
    data: Any
    validation: Any
    name: str
    transform: Callable[..., tuple[Any, ...]] | None = None
    weights: Tensor | None = None
    validation_weights: Tensor | None = None


class MetaModel(nn.Module):
    r"""A Pyro model/guide pair with a named visible site x and a named hidden site h.

    ``model(x, *args)`` is a joint $m(x, h)$ that scores the visible site with ``obs=x``;
    ``guide(x, *args)`` samples the hidden site from $q(h \mid x)$: how Pyro users write VAEs, so
    that any existing pair is a meta-model without a change. Data are batched along the first
    dimension of x. Other latent sites are private to the pair.

    The attributes ``model`` and ``guide`` are modules that work wherever Pyro takes a program:
    ``SVI(pair.model, pair.guide, ...)``, ``Trace_ELBO()(pair.model, pair.guide)``, ``Predictive``.

    Args:
        model: the model, a function, method or module.
        guide: the guide, likewise.
        visible: the model's observed site.
        hidden: the latent site of model and guide that a stage above would model.
        visible_shape: shape of one datum; learnt from the first data where it is left out.
        hidden_shape: shape of one hidden value, where the pair knows it.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> pair = MetaModel(model, guide, visible="x", hidden="z")
        >>> pair.encode(torch.zeros(5)).shape
        torch.Size([5])

    Reference:
        Cascaded meta-models, section 2.2: meta-models $m_i(x_i, h_i)$.
    """

    is_program: bool = True
    """Whether model and guide are Pyro programs; an energy without its log Z has none."""

    num_particles: int = 1
    """Importance samples K through which the pair sees its own data; see ``bound_draw``."""

    _checked: frozenset[str] = frozenset()

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *,
        visible: str,
        hidden: str,
        visible_shape: tuple[int, ...] | None = None,
        hidden_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if visible == hidden:
            raise ValueError(
                f"MetaModel: visible and hidden are both '{visible}'; name two different sites."
            )
        self.model = Program(model, "model")
        self.guide = Program(guide, "guide")
        self.visible, self.hidden = visible, hidden
        self.visible_shape = visible_shape
        self.hidden_shape = hidden_shape

    @property
    def recognition(self) -> Program:
        """The guide below another stage, where it is no longer exact: by default the guide.

        A guide that is the exact posterior of its own pair may detach its parameters, since their
        score has mean zero there; what runs below another stage must not.
        """
        return self.guide

    @property
    def marginal(self) -> Callable[..., Any] | None:
        """A program with the visible site alone, the hidden one summed out; ``None``: unknown."""
        return None

    # What a meta-model can do with data

    def encode(self, x: Tensor, *args: Any) -> Tensor:
        r"""Draw $h \sim q(h \mid x)$ without gradients, in eval mode.

        Args:
            x: data.  # (N, ...)
            *args: further arguments of the pair.

        Returns:
            Hidden values.  # (N, ...)
        """
        self.visible_shape = tuple(x.shape[1:])
        with service(self), capture(self.hidden) as site:
            self.guide(x, *args)
        return site.value.detach()

    def decode(self, h: Tensor, *args: Any, template: Tensor | None = None) -> Tensor:
        r"""Draw $x \sim m(x \mid h)$ without gradients, in eval mode.

        Args:
            h: hidden values.  # (N, ...)
            *args: further arguments of the pair.
            template: a tensor with the shape, dtype and device of x; its values are not read.

        Returns:
            Data.  # (N, ...)
        """
        template = self.template(len(h), h) if template is None else template
        self._check_parents(template, args, around=self.visible)
        with service(self), capture(self.visible) as site, unobserve(self.visible):
            given(self.model, {self.hidden: h})(template, *args)
        return site.value.detach()

    def sample(self, template: Tensor | int, *args: Any) -> Tensor:
        r"""Draw $x \sim m(x)$ without gradients, in eval mode.

        Args:
            template: a tensor with the shape, dtype and device of x, or the number of draws.
            *args: further arguments of the pair.

        Returns:
            Data.  # (N, ...)
        """
        template = self.template(template) if isinstance(template, int) else template
        with service(self), capture(self.visible) as site, unobserve(self.visible):
            self.model(template, *args)
        return site.value.detach()

    def sample_hidden(self, template: Tensor | int, *args: Any) -> Tensor:
        r"""Draw $h \sim m(h)$ without gradients, in eval mode.

        Args:
            template: a tensor with the shape, dtype and device of x, or the number of draws.
            *args: further arguments of the pair.

        Returns:
            Hidden values.  # (N, ...)
        """
        template = self.template(template) if isinstance(template, int) else template
        with service(self), capture(self.hidden) as site, unobserve(self.visible):
            self.model(template, *args)
        return site.value.detach()

    def template(self, num_data: int, like: Tensor | None = None) -> Tensor:
        """Return zeros of the shape of ``num_data`` data, for programs that draw them.

        Raises:
            ValueError: the shape of a datum is not yet known.
        """
        if self.visible_shape is None:
            raise ValueError(
                f"{type(self).__name__}: the shape of '{self.visible}' is unknown before any data; "
                "pass a template tensor instead of a number."
            )
        like = first_tensor(self) if like is None else like
        dtype = like.dtype if like is not None and like.is_floating_point() else None
        device = None if like is None else like.device
        return torch.zeros(num_data, *self.visible_shape, dtype=dtype, device=device)

    # What a meta-model knows of its densities

    def log_marginal(self, x: Tensor, *args: Any) -> Likelihood | None:
        r"""Return what the pair itself knows of $\log m(x)$ in nats; ``None``: derive it.

        Args:
            x: data.  # (N, ...)
            *args: further arguments of the pair.
        """
        return None

    def log_prior(self, h: Tensor, *args: Any, template: Tensor | None = None) -> Likelihood:
        r"""Return $\log m(h)$ per datum in nats, from the model's trace.

        Args:
            h: hidden values.  # (N, ...)
            *args: further arguments of the pair.
            template: a tensor shaped like x.

        Returns:
            Exact log densities.  # (N,)
        """
        template = self.template(len(h), h) if template is None else template
        self._check_parents(template, args)
        program = poutine.condition(self.model, data={self.hidden: h})
        with service(self), forked_rng(), unobserve(self.visible):
            trace = poutine.trace(program).get_trace(template, *args)
        trace.compute_log_prob(lambda name, _: name == self.hidden)
        return Likelihood(datum_log_prob(trace.nodes[self.hidden], len(h)), "exact")

    def multiplied(
        self, parts: Sequence[MetaModel], powers: Sequence[float]
    ) -> tuple[MetaModel, float] | None:
        """Return a product of densities as one meta-model and its log Z; ``None``: no closed form.

        Args:
            parts: the parts of the product, this one first.
            powers: their powers.
        """
        return None

    def own_draw(self, x: Tensor, *args: Any) -> Draw | None:
        """Return a weighed draw of what has no programs to trace; ``None``: trace them."""
        return None

    def _check_parents(self, template: Tensor, args: Any, around: str | None = None) -> None:
        """Refuse a hidden site whose own density the trace does not tell."""
        if (around or self.hidden) in self._checked:
            return
        with service(self), forked_rng():
            parents = latent_parents(self.model, self.hidden, template, *args, around=around)
        if parents:
            raise ValueError(
                f"{type(self).__name__}: the hidden site '{self.hidden}' depends on the latent "
                f"{', '.join(map(repr, parents))}, so that its own density is not in the trace; "
                "take the topmost latent as the hidden site or override log_prior and decode."
            )
        self._checked = self._checked | {around or self.hidden}

    def objective(self) -> Callable[..., Tensor] | None:
        """Return the pair's own training loss; ``None``: Pyro's ``Trace_ELBO``."""
        return None

    def refresh(self) -> None:
        """Bring cached normalisers, such as an RBM's log Z, up to date; here there are none."""

    def normalisation(self) -> tuple[Kind, float]:
        """Return how sure the pair's densities are of their constant: its kind and its error.

        A pair of normalised distributions is exact; one that estimates a log Z says so, with the
        standard error in nats that all of its densities share.
        """
        return "exact", 0.0

    # Training and keeping

    @property
    def own_fit(self) -> Callable[..., Any] | None:
        """The pair's own way of being fitted to a tensor, such as EM; ``None``: gradients.

        It is called as ``own_fit(x, validation=held_out, **settings)``.
        """
        return None

    def rounds(self, data: Any, validation: Any = None) -> Iterator[Round]:
        """Yield the ordinary fitting problems that train this meta-model: for a pair, one."""
        yield Round(self, data, validation, type(self).__name__)

    def named_trainable(self, *batch: Any) -> dict[str, Tensor]:
        """Return every unconstrained tensor that training moves, in a fixed order.

        Args:
            *batch: a batch of data, run once so that ``pyro.param`` statements are reached.

        Returns:
            Module parameters by their names, then free params by theirs.
        """
        if self.visible_shape is None:
            self.visible_shape = tuple(batch[0].shape[1:])
        found: dict[str, Tensor] = {n: p for n, p in self.named_parameters() if p.requires_grad}
        known = {id(p) for p in found.values()}
        with forked_rng(), service(self), poutine.trace(param_only=True) as params:
            seen = poutine.trace(self.guide).get_trace(*batch)
            poutine.replay(self.model, trace=seen)(*batch)
        for name, node in params.trace.nodes.items():
            tensor = node["value"].unconstrained()
            if id(tensor) not in known and tensor.requires_grad:
                known.add(id(tensor))
                found[name] = tensor
        return found

    def save(self, path: str | Path) -> None:
        """Write the complete state to a file that ``torch.load(weights_only=True)`` reads.

        Args:
            path: the file; it is replaced in one step, never left half written.
        """
        path = Path(path)
        part = path.with_name(path.name + ".part")
        torch.save({"format": 1, "state": self.state_dict()}, part)
        part.replace(path)

    def load(self, path: str | Path) -> MetaModel:
        """Read a state that :meth:`save` wrote for a meta-model built in the same way.

        Raises:
            ValueError: the file does not hold the state of such a meta-model; nothing is changed.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"load: there is no file {path}; pass what save() wrote.")
        keep, pending = copy.deepcopy(self.state_dict()), self._pending()
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
            self.load_state_dict(saved["state"])
        except Exception as error:
            self.load_state_dict(keep)
            for program, values in pending:
                program.pending = values
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(
                f"load: {path} does not hold the state of this {type(self).__name__} ({reason}); "
                "build the meta-model as it was when it was saved."
            ) from error
        return self

    def _pending(self) -> list[tuple[Program, dict[str, Tensor]]]:
        programs = (module for module in self.modules() if isinstance(module, Program))
        return [(program, dict(program.pending)) for program in programs]

    def extra_repr(self) -> str:
        """Name the sites."""
        return f"visible='{self.visible}', hidden='{self.hidden}'"
