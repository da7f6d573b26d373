"""Suites shipped with the package, as TOML."""
