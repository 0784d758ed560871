"""Bilinear layers inside the mathematical framework for transformer circuits (Sharkey 2023)."""

from tl_bilinear.circuits.paths import PathCheck, Paths, check_paths, paths

__all__ = ["PathCheck", "Paths", "check_paths", "paths"]
