"""Every test starts from the same state and may not leave another one behind."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import pyro
import pytest
import torch


class CleanProcess:
    """A plugin rather than a bare fixture, so that doctests of the package are covered too."""

    @pytest.fixture(autouse=True)
    def clean_process(self):
        """Clear Pyro's store, seed torch, and see that global settings come back unchanged."""
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        before = (
            torch.get_default_dtype(),
            torch.distributions.Distribution._validate_args,
            pyro.settings.get("module_local_params"),
            torch.is_grad_enabled(),
        )
        yield
        after = (
            torch.get_default_dtype(),
            torch.distributions.Distribution._validate_args,
            pyro.settings.get("module_local_params"),
            torch.is_grad_enabled(),
        )
        pyro.clear_param_store()
        assert after == before, "a test changed torch's or Pyro's global settings"


def pytest_configure(config):
    config.pluginmanager.register(CleanProcess(), "clean-process")
