"""Bridges to the solvers of scipy and torchdeq."""
