"""Limits of numeric fields, checked where a configuration is made."""

from __future__ import annotations


def at_least(where: object, least: float, *names: str) -> None:
    """Raises ValueError where one of these fields is below `least`; None passes."""
    for name in names:
        value = getattr(where, name)
        if value is not None and not value >= least:
            raise ValueError(f"{type(where).__name__}.{name} must be at least {least}, got {value}.")


def within(where: object, low: float, high: float, *names: str) -> None:
    """Raises ValueError unless low <= value < high for these fields."""
    for name in names:
        value = getattr(where, name)
        if not low <= value < high:
            raise ValueError(f"{type(where).__name__}.{name} must lie in [{low}, {high}), got {value}.")
