"""Fused attention, layer norm, dropout and cross-entropy kernels for the standard Transformer."""

from pathlib import Path as _Path

_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "dispatch.py").is_file():
    # A checkout keeps kernels/, transformer/ and benchmarks/ beside this folder; an installed
    # copy has them inside it.
    __path__.append(str(_here.parent))

__version__ = "0.1.0"
