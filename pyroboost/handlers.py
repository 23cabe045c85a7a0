"""The effect handlers that composition needs and Pyro lacks: rename, capture, unobserve, given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

__all__ = ["capture", "given", "is_plate", "rename", "unobserve"]

Names = Callable[[str], str]


def is_plate(msg: Mapping[str, Any]) -> bool:
    """Tell whether a message is a plate asking for its subsample rather than a random variable."""
    return isinstance(msg["fn"], _Subsample)


class rename(Messenger):
    """Rename the sample sites, the plates and the params of a program.

    1. A sample site is renamed by ``sites``.
    2. A plate is renamed by ``plates``: its subsample site and its frame in every site within.
    3. A ``pyro.param`` is renamed by ``params`` in its name *and* in its first argument, which is
       the key under which the param store keeps the value.

    What is left out stays as it is; handlers outside see only the new names.

    Args:
        sites: new name of a sample site.
        plates: new name of a plate.
        params: new name of a param.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     with pyro.plate("data", 3):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> with pyro.poutine.trace() as t, rename(sites="0.{}".format):
        ...     _ = model()
        >>> [name for name in t.trace.nodes if not name.startswith("_")]
        ['data', '0.z']
    """

    def __init__(
        self,
        sites: Names | None = None,
        *,
        plates: Names | None = None,
        params: Names | None = None,
    ) -> None:
        super().__init__()
        self._sites, self._plates, self._params = sites, plates, params

    def _pyro_sample(self, msg: Any) -> None:
        names = self._plates if is_plate(msg) else self._sites
        if names is not None:
            msg["name"] = names(msg["name"])
        plates = self._plates
        if plates is not None:
            msg["cond_indep_stack"] = tuple(
                frame._replace(name=plates(frame.name)) for frame in msg["cond_indep_stack"]
            )

    def _pyro_param(self, msg: Any) -> None:
        if self._params is not None:
            msg["name"] = self._params(msg["name"])
            # The store reads its key from the arguments, not from the message's name.
            msg["args"] = (msg["name"], *msg["args"][1:])


class capture(Messenger):
    """Remember the message of one sample site: its value, distribution and local scale.

    The message is taken on its way out, while its local name still holds; handlers outside may
    rename it or supply its value, and :attr:`value` is what they leave.

    Args:
        name: the site's name where this handler stands.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> with capture("z") as site:
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> site.value is z
        True
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.msg: dict[str, Any] | None = None
        self.scale: Any = 1.0

    def __enter__(self) -> Any:
        self.msg = None
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name and not is_plate(msg):
            self.msg = msg
            # Plates within the program have scaled the message by now, those outside have not.
            self.scale = msg["scale"]

    @property
    def seen(self) -> bool:
        """Whether the site was reached."""
        return self.msg is not None

    @property
    def value(self) -> Tensor:
        """The site's value, after all handlers."""
        if self.msg is None:
            raise KeyError(
                f"capture: the program has no sample site '{self.name}'; check the site's name."
            )
        value: Tensor = self.msg["value"]
        return value


class unobserve(Messenger):
    """Draw one observed site instead of scoring it; other observations stay as they are.

    ``poutine.uncondition`` frees *every* observation, labels and ``factor`` sites included.

    Args:
        name: the observed site to be drawn.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> with unobserve("x"), capture("x") as site:
        ...     _ = pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(9.0))
        >>> bool(site.value == 9.0)
        False
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name and msg["is_observed"]:
            if msg["infer"].get("_deterministic"):
                raise ValueError(
                    f"unobserve: '{self.name}' is deterministic (obs_mask makes such sites), so it "
                    "cannot be drawn; observe the whole site with obs=x."
                )
            msg["is_observed"] = False
            msg["infer"]["was_observed"] = True
            msg["infer"]["obs"] = msg["value"]
            msg["value"] = None
            msg["done"] = False


def given(program: Callable[..., Any], values: Mapping[str, Tensor]) -> Callable[..., Any]:
    r"""Fix latent sites of a program and drop their densities: $m(x, h)$ becomes $m(x \mid h)$.

    True only where a fixed site has no latent parents, since it is their likelihood that is
    dropped.

    Args:
        program: a Pyro program.
        values: values by site name.

    Returns:
        The conditional program.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("x", dist.Normal(pyro.sample("h", dist.Normal(0.0, 1.0)), 1.0))
        >>> trace = pyro.poutine.trace(given(model, {"h": torch.tensor(2.0)})).get_trace()
        >>> "h" in trace.nodes, "x" in trace.nodes
        (False, True)
    """
    return poutine.block(poutine.condition(program, data=dict(values)), hide=list(values))
