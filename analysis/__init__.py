"""Posterior, plots and export."""
