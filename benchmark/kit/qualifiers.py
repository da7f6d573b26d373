"""Qualifiers of measurements: `k=v` pairs in the order of their names, separated by semicolons."""

from __future__ import annotations

from dataclasses import replace

from sleeperbench.contracts.evaluator import Measurement


def tagged(row: Measurement, **parts: object) -> Measurement:
    """The row with further `k=v` pairs in its qualifier."""
    pairs = dict(pair.split("=", 1) for pair in row.qualifier.split(";") if pair) | {
        k: str(v) for k, v in parts.items()
    }
    return replace(row, qualifier=";".join(f"{k}={v}" for k, v in sorted(pairs.items())))
