"""The experiments that can be run again, by name."""

from __future__ import annotations

import difflib

from pyroboost.experiments import (
    cascade,
    cascade_celeba,
    cascade_figure2,
    cascade_figure4,
    cascade_table2,
    cascade_table3,
    semi_supervised,
)
from pyroboost.experiments.flows_entries import FLOWS
from pyroboost.experiments.runner import SCALES, Experiment

__all__ = ["EXPERIMENTS", "find", "listing"]

_PAPER = "Cascaded meta-models"
EXPERIMENTS = (
    Experiment(
        name="cascade.table1",
        title="one and two VAEs on MNIST",
        reference=f"{_PAPER}, Table 1 and Figure 3, MNIST",
        function=cascade.table1,
        times={"smoke": "5 s", "cpu": "25 min", "paper": "hours; take a GPU"},
        seeds={"smoke": 1, "cpu": 2, "paper": 5},
    ),
    Experiment(
        name="cascade.table1_celeba",
        title="one and two VAEs on CelebA, from your own copy",
        reference=f"{_PAPER}, Table 1, CelebA",
        function=cascade_celeba.table1_celeba,
        times={"smoke": "5 s", "cpu": "30 min", "paper": "a day; take a GPU"},
        seeds={"smoke": 1, "cpu": 1, "paper": 1},
    ),
    Experiment(
        name="cascade.figure2",
        title="RBMs and VAEs in four orders, one to six stages, on MNIST",
        reference=f"{_PAPER}, Figure 2",
        function=cascade_figure2.figure2,
        times={"smoke": "10 s", "cpu": "45 min", "paper": "a day; take a GPU"},
        seeds={"smoke": 1, "cpu": 1, "paper": 3},
    ),
    Experiment(
        name="cascade.table2",
        title="a Gaussian mixture on top of ConvVAE, LVAE and IWAE on MNIST",
        reference=f"{_PAPER}, Table 2",
        function=cascade_table2.table2,
        times={"smoke": "5 s", "cpu": "45 min", "paper": "days; take a GPU"},
        seeds={"smoke": 1, "cpu": 1, "paper": 3},
    ),
    Experiment(
        name="cascade.table3",
        title="cascade, parallel and hybrid boosting on MNIST, with the price of each",
        reference=f"{_PAPER}, Table 3",
        function=cascade_table3.table3,
        times={"smoke": "10 s", "cpu": "20 min", "paper": "a day; take a GPU"},
        seeds={"smoke": 1, "cpu": 1, "paper": 3},
    ),
    Experiment(
        name="cascade.figure4",
        title="a VAE against a deeper, a wider and a boosted one on MNIST",
        reference=f"{_PAPER}, Figure 4",
        function=cascade_figure4.figure4,
        times={"smoke": "5 s", "cpu": "35 min", "paper": "a day; take a GPU"},
        seeds={"smoke": 1, "cpu": 1, "paper": 3},
    ),
    Experiment(
        name="cascade.semi_supervised",
        title="classification from few labels, by one and by two models, on MNIST",
        reference=f"{_PAPER}, section 2.6 and supplement C",
        function=semi_supervised.semi_supervised,
        times={"smoke": "10 s", "cpu": "50 min", "paper": "days; take a GPU"},
        seeds={"smoke": 2, "cpu": 2, "paper": 10},
    ),
    *FLOWS,
)


def find(name: str) -> Experiment:
    """Return an experiment by its name.

    Raises:
        ValueError: there is none of that name; the sentence names the nearest.

    Example:
        >>> find("cascade.table1").reference
        'Cascaded meta-models, Table 1 and Figure 3, MNIST'
    """
    names = {experiment.name: experiment for experiment in EXPERIMENTS}
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else "see `pyroboost reproduce --list`."
        raise ValueError(f"there is no experiment {name!r}; {hint}")
    return names[name]


def listing() -> str:
    """Return the experiments as a table for people, with the time on two cores at each scale."""
    rows = [f"{'name':<24} {'smoke':<7} {'cpu':<8} {'paper':<18}  what it shows"]
    for one in EXPERIMENTS:
        times = [one.times[scale] for scale in SCALES]
        rows.append(
            f"{one.name:<24} {times[0]:<7} {times[1]:<8} {times[2]:<18}  "
            f"{one.title} ({one.reference})"
        )
    return "\n".join(rows)
