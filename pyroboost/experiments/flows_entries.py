"""The experiments on gradient boosted flows, by name."""

from __future__ import annotations

from functools import partial

from pyroboost.experiments import (
    flows_figure1,
    flows_posteriors,
    flows_toys,
    flows_toys_matching,
    flows_vae,
    flows_vae_figure,
)
from pyroboost.experiments.runner import Experiment

__all__ = ["FLOWS"]

PAPER = "Gradient boosted flows"
FLOWS: tuple[Experiment, ...] = (
    Experiment(
        name="flows.table1_frey",
        title="VAEs with normal, flow and boosted posteriors on the Frey faces, bits per dimension",
        reference=f"{PAPER}, Table 1, Freyfaces",
        function=partial(flows_vae.table1, kind="frey"),
        times={"smoke": "15 s", "cpu": "15 min", "paper": "a day; take a GPU"},
        seeds={"smoke": 1, "cpu": 1, "paper": 3},
    ),
    Experiment(
        name="flows.table1_mnist",
        title="VAEs with normal, flow and boosted posteriors on MNIST",
        reference=f"{PAPER}, Table 1, MNIST",
        function=partial(flows_vae.table1, kind="mnist"),
        times={"smoke": "5 s", "cpu": "20 min", "paper": "weeks; take a GPU"},
        seeds={"smoke": 1, "cpu": 1, "paper": 3},
    ),
    Experiment(
        name="flows.table1_caltech",
        title="VAEs with normal, flow and boosted posteriors on Caltech-101 silhouettes",
        reference=f"{PAPER}, Table 1, Caltech 101",
        function=partial(flows_vae.table1, kind="caltech"),
        times={"smoke": "5 s", "cpu": "40 min", "paper": "days; take a GPU"},
        seeds={"smoke": 1, "cpu": 1, "paper": 3},
    ),
    Experiment(
        name="flows.table1_omniglot",
        title="VAEs with normal, flow and boosted posteriors on Omniglot, from your own copy",
        reference=f"{PAPER}, Table 1, Omniglot",
        function=partial(flows_vae.table1, kind="omniglot"),
        times={"smoke": "5 s", "cpu": "15 min", "paper": "weeks; take a GPU"},
        seeds={"smoke": 1, "cpu": 1, "paper": 3},
    ),
    Experiment(
        name="flows.figure3",
        title="decoder shock, with and without blending, on Caltech-101 silhouettes",
        reference=f"{PAPER}, Figure 3",
        function=flows_vae_figure.figure3,
        times={"smoke": "5 s", "cpu": "15 min", "paper": "days; take a GPU"},
        seeds={"smoke": 1, "cpu": 1, "paper": 1},
    ),
    Experiment(
        name="flows.figure1",
        title="one affine flow covers two modes, a second one and fine-tuning part them",
        reference=f"{PAPER}, Figure 1",
        function=flows_figure1.figure1,
        times={"smoke": "2 s", "cpu": "1 min", "paper": "30 min"},
        seeds={"smoke": 1, "cpu": 3, "paper": 3},
    ),
    Experiment(
        name="flows.figure4",
        title="boosted flows against one RealNVP of their size, on samples in the plane",
        reference=f"{PAPER}, Figure 4",
        function=flows_toys.figure4,
        times={"smoke": "5 s", "cpu": "30 min", "paper": "a day"},
        seeds={"smoke": 1, "cpu": 3, "paper": 3},
    ),
    Experiment(
        name="flows.figure5",
        title="two short flows against a RealNVP of twice their size, on four energies",
        reference=f"{PAPER}, Figure 5",
        function=flows_toys_matching.figure5,
        times={"smoke": "5 s", "cpu": "25 min", "paper": "hours"},
        seeds={"smoke": 1, "cpu": 8, "paper": 8},
    ),
    Experiment(
        name="flows.posteriors",
        title="nine posteriors: a boosted guide beside Pyro's own at equal time, against NUTS",
        reference=f"{PAPER}, beside the paper",
        function=flows_posteriors.posteriors,
        times={"smoke": "15 s", "cpu": "an hour", "paper": "hours"},
        seeds={"smoke": 1, "cpu": 1, "paper": 1},
    ),
)
