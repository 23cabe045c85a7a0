"""Cascade boosting: a chain of meta-models that is a meta-model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from pyroboost.compose._chain import Chain, ChainProgram
from pyroboost.compose._no_program import NotAProgram
from pyroboost.likelihood import Kind, Likelihood
from pyroboost.metamodel import MetaModel, Round
from pyroboost.weights import Draw, draw

__all__ = ["Cascade"]

Positions = tuple[int, ...] | None


def _positions(entry: Any) -> Positions:
    if entry is None:
        return None
    if not isinstance(entry, list | tuple) or not all(isinstance(p, int) and p >= 0 for p in entry):
        raise ValueError(
            f"Cascade: args has the entry {entry!r}; give a tuple of positions, or None."
        )
    return tuple(entry)


def _flatten(
    stages: Sequence[MetaModel], args: Sequence[Positions]
) -> tuple[list[MetaModel], list[Positions]]:
    """Replace cascades among the stages by their own stages, and compose their arguments."""
    flat: list[MetaModel] = []
    positions: list[Positions] = []
    for index, (stage, outer) in enumerate(zip(stages, args, strict=True)):
        if not isinstance(stage, Cascade):
            flat.append(stage)
            positions.append(outer)
            continue
        for inner_index, (inner, own) in enumerate(zip(stage, stage.args, strict=True)):
            flat.append(inner)
            if own is None:
                positions.append(outer if inner_index == 0 else None)
            elif outer is None:
                positions.append(own if index == 0 else ())
            else:
                positions.append(tuple(outer[p] for p in own))
    return flat, positions


_NO_PROGRAM = (
    "Cascade: its top stage is an energy, which has no Pyro program; sample() draws from the "
    "cascade and decompose() or log_likelihood() measure it, or take the energy's closed_form()."
)


def _check_energies(stages: Sequence[MetaModel]) -> None:
    """Refuse an energy below another stage."""
    for index, stage in enumerate(stages[:-1]):
        if not stage.is_program:
            raise TypeError(
                f"Cascade: stage {index} ({type(stage).__name__}) is an energy without a hidden "
                f"variable for stage {index + 1} to model; put it at the top, or take its "
                "closed_form()."
            )


class Cascade(MetaModel):
    r"""A chain of meta-models in which each models the hidden variable of the one below.

    $$p(x, h_1, \dots, h_k) = m_k(h_{k-1}, h_k) \prod_{i<k} m_i(h_{i-1} \mid h_i), \qquad
    q(h_1, \dots, h_k \mid x) = \prod_i q_i(h_i \mid h_{i-1}), \qquad h_0 = x$$

    A cascade is itself a pair: ``cascade.model`` and ``cascade.guide`` go wherever Pyro takes a
    pair, so that fine-tuning all stages together is plain ``SVI``. Cascades among the stages are
    replaced by their own stages: ``Cascade(a, b, c)``, ``Cascade(Cascade(a, b), c)`` and
    ``Cascade(a, Cascade(b, c))`` are one model. ``cascade[i]`` is a stage and a slice is a cascade
    of the same stages, not of copies.

    Names: the visible site keeps its name; every other site of stage i is ``"i.name"``; plates
    that a stage shares with the bottom stage are one plate, with one subsample and one scale.

    An energy such as a product may stand at the top, where its density of $h_{k-1}$ is all that
    is asked of it: the cascade then samples and has a decomposed likelihood, and its programs
    raise. Below another stage an energy is refused, since it has no hidden variable.

    Args:
        *stages: meta-models, bottom first.
        args: for each stage the positions of the further arguments that it takes; ``None`` for all
            of them in the bottom stage and none elsewhere.

    Raises:
        ValueError: stages do not fit together, or share a parameter.

    Example:
        >>> import torch
        >>> from pyroboost.models import GMM, VAE
        >>> cascade = Cascade(VAE(6, 2, units=8), GMM(3, 2))
        >>> cascade
        Cascade(0: VAE('x' | 'z'), 1: GMM('x' | 'component'))
        >>> cascade.sample(4).shape, cascade.encode(torch.zeros(4, 6)).shape
        (torch.Size([4, 6]), torch.Size([4]))

    Reference:
        Cascaded meta-models, Eq. 3 and 4.
    """

    _chain: Chain

    def __init__(self, *stages: MetaModel, args: Sequence[Positions] | None = None) -> None:
        nn.Module.__init__(self)
        if not stages:
            raise ValueError("Cascade: there is no stage; pass at least one meta-model.")
        for index, stage in enumerate(stages):
            if not isinstance(stage, MetaModel):
                raise TypeError(
                    f"Cascade: stage {index} is {type(stage).__name__}, not a meta-model; wrap the "
                    "pair in MetaModel(model, guide, visible=..., hidden=...)."
                )
        args = [None] * len(stages) if args is None else [_positions(a) for a in args]
        if len(args) != len(stages):
            raise ValueError(
                f"Cascade: args has {len(args)} entries for {len(stages)} stages; give one each."
            )
        flat, self.args = _flatten(stages, args)
        _check_energies(flat)
        self.is_program = flat[-1].is_program
        programs = len(flat) if self.is_program else len(flat) - 1
        chain = Chain(flat[:programs] or flat, self.args[: max(programs, 1)])
        self.stages = chain.stages if self.is_program else nn.ModuleList(flat)
        # The programs hold the stages too; only `stages` is registered, so that names stay short.
        for name, program in {
            "_chain": chain,
            "model": ChainProgram(chain, "model") if self.is_program else NotAProgram(_NO_PROGRAM),
            "guide": ChainProgram(chain, "guide") if self.is_program else NotAProgram(_NO_PROGRAM),
        }.items():
            object.__setattr__(self, name, program)
        self.visible, self.hidden = chain.visible, chain.name(len(chain) - 1, chain[-1].hidden)
        self.hidden_shape = flat[-1].hidden_shape

    @property
    def visible_shape(self) -> tuple[int, ...] | None:
        """Shape of one datum, as the bottom stage knows it."""
        return self[0].visible_shape

    @visible_shape.setter
    def visible_shape(self, shape: tuple[int, ...] | None) -> None:
        self[0].visible_shape = shape

    @property
    def marginal(self) -> Callable[..., Any] | None:
        """The model with the top stage's hidden site summed out; ``None`` where it cannot be."""
        return ChainProgram(self._chain, "marginal") if self[-1].marginal else None

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[MetaModel]:
        return (cast(MetaModel, stage) for stage in self.stages)

    @overload
    def __getitem__(self, index: int) -> MetaModel: ...
    @overload
    def __getitem__(self, index: slice) -> Cascade: ...
    def __getitem__(self, index: int | slice) -> MetaModel:
        if isinstance(index, slice):
            # A stage that took no further arguments takes none as the bottom of a slice either.
            args = [own if i == 0 or own is not None else () for i, own in enumerate(self.args)]
            return Cascade(*list(self)[index], args=args[index])
        return list(self)[index]

    def __add__(self, stage: MetaModel) -> Cascade:
        """Return the cascade with one more stage on top; the stages are the same objects."""
        return Cascade(self, stage)

    def __repr__(self) -> str:
        sites = (f"{type(stage).__name__}('{stage.visible}' | '{stage.hidden}')" for stage in self)
        return f"Cascade({', '.join(f'{i}: {site}' for i, site in enumerate(sites))})"

    def log_marginal(self, x: Tensor, *args: Any) -> Likelihood | None:
        """Return what a cascade of one stage knows of log m(x); ``None`` for more stages."""
        return self[0].log_marginal(x, *args) if len(self) == 1 else None

    def log_prior(self, h: Tensor, *args: Any, template: Tensor | None = None) -> Likelihood:
        """Return log m_k(h_k) per datum, as the top stage says it."""
        self._check_program("log_prior")
        own = self.stage_args(args)[-1]
        if template is not None:
            template = self._chain.facts(template, args)[0][-1].blank
        return self[-1].log_prior(h, *own, template=template)

    def objective(self) -> Callable[..., Tensor] | None:
        """Return the own loss of a cascade of one stage."""
        return self[0].objective() if len(self) == 1 else None

    def refresh(self) -> None:
        """Refresh the cached normalisers of all stages."""
        for stage in self:
            stage.refresh()

    def normalisation(self) -> tuple[Kind, float]:
        """Return the top stage's: below it only m(x | h) counts, where log Z cancels."""
        return self[-1].normalisation()

    def stage_args(self, args: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return the further arguments of each stage."""
        found = [self._chain.args_of(i, args) for i in range(len(self._chain))]
        return [*found, *[()] * (len(self) - len(found))]

    def _check_program(self, where: str) -> None:
        if not self.is_program:
            raise TypeError(f"{where}: {_NO_PROGRAM}")

    def encode(self, x: Tensor, *args: Any) -> Tensor:
        r"""Draw $h_k \sim q(h_k \mid x)$ through the stages, as :meth:`climb` does."""
        self._check_program("encode")
        return self.climb(x, *args)[-1]

    @property
    def num_particles(self) -> int:  # type: ignore[override]
        """Samples through which a cascade of one stage sees its data; stages have their own."""
        return self[0].num_particles if len(self) == 1 else 1

    def sample(self, template: Tensor | int, *args: Any) -> Tensor:
        r"""Draw $x \sim m(x)$ without gradients, in eval mode; see :meth:`MetaModel.sample`."""
        if self.is_program:
            return super().sample(template, *args)
        if len(self) == 1:
            return self[0].sample(template, *args)
        count = template if isinstance(template, int) else len(template)
        blank = None if isinstance(template, int) else template
        return self[:-1].decode(self[-1].sample(count), *args, template=blank)

    def own_draw(self, x: Tensor, *args: Any) -> Draw | None:
        """Return a draw through all stages where the top one is an energy; else ``None``."""
        if self.is_program:
            return None
        total = x.new_zeros(len(x), dtype=torch.get_default_dtype())
        below: Tensor | float = 0.0
        for stage, own in zip(self, self.stage_args(args), strict=True):
            found = draw(stage, x, *own)
            total = total + found.log_weight - below
            x, below = found.hidden, found.log_prior
        return Draw(x, total, torch.zeros_like(total))

    def climb(self, x: Tensor, *args: Any, stages: int | None = None) -> list[Tensor]:
        r"""Draw $h_1, \dots, h_k$ from the guide without gradients, in eval mode.

        Args:
            x: data.  # (N, ...)
            *args: further arguments.
            stages: how many stages to climb; all of them when left out.

        Returns:
            The hidden values, bottom first.
        """
        values = []
        for stage, own in list(zip(self, self.stage_args(args), strict=True))[:stages]:
            x = stage.encode(x, *own)
            values.append(x)
        return values

    def rounds(self, data: Any, validation: Any = None) -> Iterator[Round]:
        """Yield one round per stage, bottom first: it is trained on h drawn afresh from below."""
        for index, stage in enumerate(self):
            # The bottom stage may take fewer further arguments than the cascade, such as labels.
            below = _Below(self, index) if index or self.args[0] is not None else None
            yield Round(stage, data, validation, f"{index}.{type(stage).__name__}", below)


class _Below:
    """Turn a batch of data into a batch for one stage: fresh draws from the stages below."""

    def __init__(self, cascade: Cascade, index: int) -> None:
        self.cascade, self.index = cascade, index

    def __call__(self, x: Tensor, *args: Any) -> tuple[Any, ...]:
        h = self.cascade.climb(x, *args, stages=self.index)[-1] if self.index else x
        return h, *self.cascade.stage_args(args)[self.index]
