"""Experiments that reproduce the papers' tables and figures, each with its errors and settings."""
