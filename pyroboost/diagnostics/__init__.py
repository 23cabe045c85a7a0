"""Posterior quality beyond k-hat: corrected averages, calibration, references, one report."""

from pyroboost.diagnostics.calibration import Calibration, vsbc
from pyroboost.diagnostics.comparison import Comparison, SiteComparison, compare
from pyroboost.diagnostics.expectations import Expectation, psis_expectation
from pyroboost.diagnostics.reports import PosteriorReport, report
from pyroboost.diagnostics.two_sample import (
    Distance,
    TwoSample,
    classifier_test,
    sliced_wasserstein,
)
from pyroboost.diagnostics.upper_bound import eubo

__all__ = [
    "Calibration",
    "Comparison",
    "Distance",
    "Expectation",
    "PosteriorReport",
    "SiteComparison",
    "TwoSample",
    "classifier_test",
    "compare",
    "eubo",
    "psis_expectation",
    "report",
    "sliced_wasserstein",
    "vsbc",
]
