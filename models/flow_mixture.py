"""Boosted normalising flows as a density of data: exact, and grown by boosting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyroboost import flows
from pyroboost.contexts import forked_rng
from pyroboost.distributions import BoostedFlow
from pyroboost.likelihood import Likelihood
from pyroboost.models._finite_mixture import FiniteMixture
from pyroboost.models._flow_fit import Growth
from pyroboost.models._flow_match import Matched, match
from pyroboost.models._flow_options import Options, weighed
from pyroboost.models._flow_parts import Builder, FlowParts, standard_normal
from pyroboost.models._flow_report import FlowFit, FlowStep

__all__ = ["FlowFit", "FlowMixture", "FlowStep", "Matched"]

_ROWS = 8192


class FlowMixture(FiniteMixture[FlowParts]):
    r"""A boosted mixture of flows over data, whose component is the hidden site.

    $$m(x, c) = w_c\, g_c(x), \qquad
    g_c(x) = q_0\big(f_c^{-1}(y)\big) \Big|\det \frac{\partial f_c^{-1}}{\partial y}\Big|
    \prod_d \frac{1}{s_d}, \qquad y_d = \frac{x_d - l_d}{s_d}$$

    The density is exact and so is the guide, m(c | x). At first one component near the identity
    has all the weight, so that the mixture is q_0 but for the flow's first spread; :meth:`fit`
    sets location l and scale s to those of the data, and grows the others by boosting. As the
    top stage of a cascade, fitted by ``greedy``, it is a learnt prior. Weights are solved for,
    not trained by gradients, and a component of weight 0 costs nothing.

    Args:
        dim: size D of a datum.
        components: C; not needed with a list of flows.
        flow: builds a flow of D coordinates, such as ``pyroboost.flows.realnvp`` or
            ``functools.partial(pyroboost.flows.spline, steps=2)``; or a list of C such functions,
            for components that differ. Needs two dimensions or more by default.
        base: gives q_0 for a tensor of zeros (D,), whose type and device it should have;
            ``lambda zero: StudentT(5.0, zero, 1.0).to_event(1)`` has heavier tails.
        visible: name of the data's site.
        hidden: name of the component's site.
        allow_slow: accept autoregressive flows, whose density costs D network passes.

    Raises:
        TypeError: a function builds no flow.
        ValueError: a flow has no inverse, another dimension, or needs a context.

    Example:
        >>> mixture = FlowMixture(2, 2)
        >>> report = mixture.fit(torch.randn(200, 2), steps=20, passes=0)
        >>> [step.verdict for step in report.steps][0]
        'base'
        >>> mixture.log_marginal(torch.zeros(3, 2)).kind, mixture.sample(5).shape
        ('exact', torch.Size([5, 2]))

    Reference:
        Giaquinto and Banerjee, Gradient boosted flows (2020), Eq. 7 and section 5.1.1.
    """

    def __init__(
        self,
        dim: int,
        components: int | None = None,
        flow: Builder | Sequence[Builder] = flows.realnvp,
        *,
        base: Callable[[Tensor], TorchDistribution] = standard_normal,
        visible: str = "x",
        hidden: str = "component",
        allow_slow: bool = False,
    ) -> None:
        count = 4 if components is None and callable(flow) else components
        if dim < 1 or (count is not None and count < 1):
            raise ValueError(
                f"FlowMixture: got {count} components of dimension {dim}; both must be at least 1."
            )
        super().__init__(FlowParts(dim, flow, count, base, visible, hidden, allow_slow), dim)

    @property
    def weights(self) -> Tensor:
        """The weights, detached, summing to 1; assigning them sets the buffer, (C,)."""
        return self.components.flows.weights.detach().clone()

    @weights.setter
    def weights(self, value: Tensor) -> None:
        held = self.components.flows.weights
        value = torch.as_tensor(value).detach().double()
        sound = bool(((value >= 0) & value.isfinite()).all()) and float(value.sum()) > 0
        if value.shape != held.shape or not sound:
            raise ValueError(
                f"FlowMixture: weights {value.tolist()} are no convex combination of {len(held)} "
                "components; give that many numbers of at least 0 that do not all vanish."
            )
        held.copy_(value / value.sum())

    def distribution(self) -> BoostedFlow:
        """Return the mixture of the standardised data, (x - loc) / scale, as a distribution."""
        return self.components.mixture()

    def component(self, c: int) -> FlowMixture:
        """Return g_c alone, as a mixture of one component that shares its flow with this one."""
        parts = self.components
        shared = [parts.flows.flows[c]]
        found = FlowMixture(
            len(parts.loc),
            1,
            lambda dim: shared.pop() if shared else parts.builders[c](dim),  # type: ignore[arg-type, return-value]
            base=parts.base,
            visible=self.visible,
            hidden=self.hidden,
            allow_slow=parts.flows.allow_slow,
        ).to(parts.loc)
        found.components.loc, found.components.scale = parts.loc, parts.scale
        return found

    def standardise_by(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Set location and scale to the mean and the standard deviation of data.

        Args:
            x: data.  # (N, D)
            weights: of the data.  # (N,)

        Raises:
            ValueError: a column is constant, so that data have no density.
        """
        self.components.place(*weighed(self.components, "data", x, weights))

    def log_marginal(self, x: Tensor, *args: Any) -> Likelihood:
        r"""Return the exact $\log m(x) = \log \sum_c w_c g_c(x)$ in nats.

        Args:
            x: data.  # (N, D)
            *args: not read.

        Returns:
            Exact log densities, with gradients where they are enabled.  # (N,)
        """
        return self._summed_out(x, _ROWS)

    @property
    def own_fit(self) -> Callable[..., FlowFit]:
        """Fit by boosting, as greedy boosting does where nothing else is asked for."""
        return self.fit

    def fit(
        self,
        data: Tensor,
        *,
        validation: Tensor | None = None,
        weights: Tensor | None = None,
        validation_weights: Tensor | None = None,
        start: Literal["fresh", "current"] = "fresh",
        steps: int = 1000,
        objective: Literal["mixture", "residual"] = "mixture",
        ess: float = 0.1,
        resample: bool = True,
        attempts: int = 2,
        passes: int = 1,
        pass_steps: int | None = None,
        joint_steps: int = 0,
        batch_size: int = 256,
        seed: int | None = None,
        **settings: Any,
    ) -> FlowFit:
        r"""Fit to data by boosting: one component after another, then all of them again.

        1. **Rounds.** The first component is fitted by maximum likelihood. A later one is for the
           data that the mixture q so far misses: those have weights in proportion to
           $1 / q(x_n)^\beta$, with the largest $\beta \le 1$ that leaves the effective sample
           size asked for. For half of its steps it is fitted to the data around one of them,
           drawn by these weights; for the other half by the exact likelihood of the mixture,
           the others fixed. Its weight is searched on the line, and then all weights are solved
           for on the log densities of training data, a concave problem. It is kept if the slope
           of the likelihood in its weight, at 0, or the gain is above 0 by two standard errors;
           else it starts afresh.
        2. **Passes.** Each component is trained by the likelihood of the mixture, against all
           others, which are fixed.
        3. **Joint training** of all components by the likelihood of the mixture. Here as in passes
           the weights are solved for after each epoch.

        Held-out data decide where there are any, else training data: what does not raise their
        likelihood is put back, so that no step lowers it, and a fit that ends below its start is
        put back as a whole. Since they choose epochs and steps, their likelihood ends a little
        too high (by 0.06 nats with 200 of them and eight flows, 0.01 with 2,000): report that of
        data that decided nothing. Ctrl-C, or a loss that is not finite, loses no more than the
        fit under way.

        Args:
            data: training data, float32 or float64.  # (N, D)
            validation: held-out data.  # (M, D)
            weights: a weight of 0 or more for each datum; only ratios count, so that a weight of
                2 is one datum that says more, not two: errors, which decide, are wider.  # (N,)
            validation_weights: the same for held-out data.  # (M,)
            start: ``"fresh"``: location, scale and all components anew; ``"current"``: components
                of positive weight stay, the others are added and all are settled.
            steps: gradient steps of a round, rounded to whole epochs, of which there is one at
                least; so are the other lengths.
            objective: ``"mixture"`` as above; ``"residual"``: all steps of a round are maximum
                likelihood on the data drawn by $1 / q^\beta$. Maximum likelihood covers what
                it is given, so such a component is often as broad as the mixture is.
            ess: least effective fraction of the data; 0 never tempers.
            resample: draw data anew in proportion to their weights, which spends no step on data
                that hardly count; otherwise weigh them in the loss.
            attempts: fresh starts in a row that may gain nothing before growth ends.
            passes: passes over all components.
            pass_steps: gradient steps of each fit in a pass; half of ``steps`` where left out.
            joint_steps: gradient steps of joint training.
            batch_size: data in a gradient step.
            seed: seed of the fit's own random stream; ``None`` draws from the global generators.
            **settings: settings of :func:`pyroboost.infer.fit`: ``lr`` (5e-3 where left out),
                ``optimizer``, ``scheduler`` (a cosine over each fit where left out),
                ``clip_norm``, ``patience``, ``progress``, ...

        Returns:
            The steps and what was decided.

        Raises:
            TypeError: the data are not one tensor of floats.
            ValueError: an option is out of its range, or the data are too few, constant, or not
                finite.
            NonFiniteLoss: the first component cannot be trained; later ones are put back.

        Reference:
            Giaquinto and Banerjee, Gradient boosted flows (2020), sections 3.2 and 5.1.1; Rosset
            and Segal, Boosting density estimation (2002), section 2.
        """
        if "optimizer" not in settings:
            settings = {"lr": 5e-3, **settings}
        options = Options(
            start=start,
            steps=steps,
            objective=objective,
            ess=ess,
            resample=resample,
            attempts=attempts,
            passes=passes,
            pass_steps=max(1, steps // 2) if pass_steps is None else pass_steps,
            joint_steps=joint_steps,
            batch_size=batch_size,
            settings=settings,
        )
        train = weighed(self.components, "data", data, weights)
        held_out = None
        if validation is not None:
            held_out = weighed(self.components, "validation", validation, validation_weights)
        elif validation_weights is not None:
            raise ValueError("FlowMixture.fit: validation_weights came without validation data.")
        with nullcontext() if seed is None else forked_rng(seed):
            return Growth(self, train, held_out, options).run()

    def match(
        self,
        log_density: Callable[[Tensor], Tensor],
        *,
        steps: int = 2000,
        batch_size: int = 128,
        num_samples: int = 10_000,
        annealing: int = 0,
        seed: int | None = None,
        **settings: Any,
    ) -> Matched:
        r"""Fit to a density known up to its log Z, by boosting on draws of the mixture itself.

        $$\min KL(m \,\|\, \tilde p / Z), \qquad
        \log \hat Z = \log \frac1S \sum_s \frac{\tilde p(x_s)}{m(x_s)}, \quad x_s \sim m$$

        Location and scale of the mixture stay as they are: the components start near the base.

        Args:
            log_density: log of the density, without its log Z, for any number of points at once,
                (..., D) to (...); minus an energy.
            steps: gradient steps of a round.
            batch_size: draws in a gradient step.
            num_samples: draws for the estimate of log Z.
            annealing: steps in which the power of the density rises from 0.01 to 1 while the
                first component is trained, so that it spreads before it settles.
            seed: seed of all random streams; ``None`` draws one from the global generator.
            **settings: settings of :func:`pyroboost.infer.boost`: ``finetune``, ``objective``,
                ``floor``, ``joint``, ``lr`` (5e-3 where left out), ``clip_norm`` (10), ...

        Returns:
            The rounds, and log Z with its standard error.

        Raises:
            ValueError: an option is out of its range, or the density has another shape.

        Example:
            >>> def log_density(z):
            ...     return -z.square().sum(-1) / 2
            >>> found = FlowMixture(2, 1).match(log_density, steps=20, num_samples=500, seed=0)
            >>> abs(found.log_partition - 1.8379) < 0.1
            True

        Reference:
            Giaquinto and Banerjee, Gradient boosted flows (2020), Eq. 11 and section 5.1.2;
            Rezende and Mohamed, Variational inference with normalizing flows (2015), Eq. 20:
            annealing.
        """
        settings = {"num_particles": batch_size, "clip_norm": 10.0, **settings}
        if "optimizer" not in settings:
            settings.setdefault("lr", 5e-3)
        with nullcontext() if seed is None else forked_rng(seed):
            return match(
                self.components,
                log_density,
                num_samples,
                annealing,
                {"steps": steps, "seed": seed, **settings},
            )
