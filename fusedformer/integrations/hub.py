"""Writes the ops as a kernel of the Hugging Face hub, in the layout that the package kernels loads.

    python -m fusedformer.integrations.hub FOLDER

makes FOLDER/build/torch-cuda and FOLDER/build/torch-cpu, pure Python both: Triton kernels on a GPU,
plain PyTorch elsewhere. ``kernels.get_local_kernel(FOLDER)`` loads it as it is.

There, several versions of one kernel must be able to live in one process, and beside an installed
fusedformer: imports become relative, and the ops get a name of their own.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

import fusedformer

BACKENDS = ("cuda", "cpu")

_INIT = '''"""Fused attention, layer norm, dropout and cross-entropy of fusedformer {version}."""

from . import layers
from .kernels.activation import bias_activation
from .kernels.attention import attention
from .kernels.cross_entropy import cross_entropy
from .kernels.dispatch import available_backends, use_backend
from .kernels.dropout import dropout
from .kernels.layer_norm import dropout_add_layer_norm, layer_norm, rms_norm
from .kernels.linear_cross_entropy import linear_cross_entropy
from .kernels.sdpa import scaled_dot_product_attention

__all__ = [
    "attention",
    "available_backends",
    "bias_activation",
    "cross_entropy",
    "dropout",
    "dropout_add_layer_norm",
    "layer_norm",
    "layers",
    "linear_cross_entropy",
    "rms_norm",
    "scaled_dot_product_attention",
    "use_backend",
]
'''

# Layers of the hub have no state and no __init__: they lend their forward to a model's modules.
_LAYERS = '''"""Forwards for modules like torch's LayerNorm and transformers' RMS norms."""

import torch

from .kernels.layer_norm import layer_norm, rms_norm


class LayerNorm(torch.nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return layer_norm(input, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)
'''


def export(folder: Path) -> str:
    """Writes the kernel; the name of its ops, torch.ops.<name>."""
    root = next(Path(path) for path in fusedformer.__path__ if (Path(path) / "kernels").is_dir())
    # The native kernels stay behind: their ops have one name in C++ for all copies.
    sources = {
        path.relative_to(root): path.read_text()
        for path in sorted((root / "kernels").rglob("*.py"))
        if not path.stem.startswith("native") and path.parent.name != "cuda"
    }
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:10]
    name = f"fusedformer_{digest}"
    files = {path: _renamed(text, path, name) for path, text in sources.items()}
    files[Path("__init__.py")] = _INIT.format(version=fusedformer.__version__)
    files[Path("layers.py")] = _LAYERS
    for backend in BACKENDS:
        build = folder / "build" / f"torch-{backend}"
        metadata = {
            "id": f"{name}_{backend}", "name": "fusedformer", "version": 1, "license": "MIT",
            "python-depends": [], "backend": {"type": backend},
        }  # fmt: skip
        files[Path("metadata.json")] = json.dumps(metadata, indent=2) + "\n"
        for path, text in files.items():
            (build / path).parent.mkdir(parents=True, exist_ok=True)
            (build / path).write_text(text)
    return name


def _renamed(text: str, path: Path, name: str) -> str:
    """A file of ours as part of a package of any name, its ops called name."""
    up = "." * len(path.parts)
    text = re.sub(r"^(\s*)from fusedformer\.", rf"\1from {up}", text, flags=re.MULTILINE)
    # Modules that are imported by name, as backends are.
    text = re.sub(r'"fusedformer\.', '__package__.rpartition(".kernels")[0] + ".', text)
    text = re.sub(r"\btorch\.ops\.fusedformer\b", f"torch.ops.{name}", text)
    return text.replace('Library("fusedformer"', f'Library("{name}"').replace(
        'f"fusedformer::', f'f"{name}::'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(f"{folder}: torch.ops.{export(folder)}")


if __name__ == "__main__":
    main()
