"""Normalising flows that run both ways in closed form, as boosting needs them.

A `Flow` is a list of steps; each function below builds one kind. Every step gives its
log-determinant in both directions, takes a context if it is amortised, starts near the identity
(`spread`), and keeps nothing of what passes through it. Pyro's own transforms are accepted as
steps too; why these are not used by default (Pyro 1.9.2):

- all that can learn cache tensors of the last call, after which a module cannot be deep-copied;
- `AffineCoupling` clips its log scale and passes the gradient of one that is not clipped;
- `SplineCoupling` has no conditional form, and with large weights its two log-determinants
  differ in double precision and are not numbers in single precision;
- `Permute` is no module, so its order stays behind when a flow moves to another device;
- `Planar`, `Radial`, `Sylvester`, `BlockAutoregressive`, `Polynomial` and `NeuralAutoregressive`
  have no inverse, and say so only for points that are not in the cache (`check_invertible`).

`planar`, `radial` and `sylvester` run forwards only and `iaf` is slow to score: these are flows
for one guide (`guides.FlowGuide`), not components of a mixture.
"""

from pyroboost.flows.autoregressive import InverseAutoregressive, iaf
from pyroboost.flows.couplings import AdditiveCoupling, AffineCoupling, Coupling, SplineCoupling
from pyroboost.flows.elementwise import Affine, NonlinearSquared, Spline
from pyroboost.flows.factories import affine, householder, lower, lu, nice, nlsq, realnvp, spline
from pyroboost.flows.flow import Flow
from pyroboost.flows.forward_only import Planar, Radial, planar, radial
from pyroboost.flows.invertible import check_invertible
from pyroboost.flows.linear import LU, Householder, LowerTriangular, Permutation
from pyroboost.flows.step import Step
from pyroboost.flows.sylvester import Sylvester, sylvester

__all__ = [
    "LU",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Coupling",
    "Flow",
    "Householder",
    "InverseAutoregressive",
    "LowerTriangular",
    "NonlinearSquared",
    "Permutation",
    "Planar",
    "Radial",
    "Spline",
    "SplineCoupling",
    "Step",
    "Sylvester",
    "affine",
    "check_invertible",
    "householder",
    "iaf",
    "lower",
    "lu",
    "nice",
    "nlsq",
    "planar",
    "radial",
    "realnvp",
    "spline",
    "sylvester",
]
