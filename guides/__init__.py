"""Guides of their own, for any Pyro model; the pairs of pyroboost.models bring theirs along."""
