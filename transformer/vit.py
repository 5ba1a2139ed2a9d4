"""ViT, the Vision Transformer (Dosovitskiy et al. 2021).

An image is cut into patches, each patch is a token, and a token of no patch, the class token,
gathers what the classifier reads. The layers are those of BERT, in pre-norm.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fusedformer.kernels.checks import check_floating, shape
from fusedformer.transformer.blocks import EncoderLayer, Stack
from fusedformer.transformer.config import ModelConfig
from fusedformer.transformer.layers import init_weights, output_cross_entropy


@dataclass(frozen=True)
class ViTConfig(ModelConfig):
    """The defaults are those of ViT-B/16."""

    image_size: int = 224  # height and width, a multiple of patch_size
    patch_size: int = 16
    channels: int = 3
    classes: int = 1000
    d_model: int = 768
    layers: int = 12
    heads: int = 12
    d_ff: int = 3072
    dropout: float = 0.1
    activation: str = "gelu"
    prenorm: bool = True
    eps: float = 1e-6
    share_layers: bool = False

    PRESETS: ClassVar = {
        "tiny": {"d_model": 192, "heads": 3, "d_ff": 768},  # Ti/16, 5.7M parameters
        "small": {"d_model": 384, "heads": 6, "d_ff": 1536},  # S/16, 22M
        "base": {},  # B/16, 87M
        "large": {"d_model": 1024, "layers": 24, "heads": 16, "d_ff": 4096},  # L/16, 304M
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(
                "ViTConfig: image_size must be a multiple of patch_size; "
                f"got {self.image_size} and {self.patch_size}"
            )


class ViT(nn.Module):
    """images (B, channels, image_size, image_size) -> logits (B, classes)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embedding = nn.Linear(config.channels * config.patch_size**2, config.d_model)
        self.class_token = nn.Parameter(torch.empty(1, 1, config.d_model))
        self.position_embedding = nn.Parameter(torch.empty(1 + patches, config.d_model))
        self.encoder = Stack(EncoderLayer, config, config.layers)
        self.classifier = nn.Linear(config.d_model, config.classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated N(0, 0.02)."""
        init_weights(self, lambda name, weight: nn.init.trunc_normal_(weight, std=0.02))

    def patches(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) cut into P x P patches: (B, (S/P)^2, C P P), row by row."""
        config = self.config
        size, patch = config.image_size, config.patch_size
        check_floating("ViT", "images", images)
        if images.dim() != 4 or tuple(images.shape[1:]) != (config.channels, size, size):
            raise ValueError(
                f"ViT: images must be (batch, {config.channels}, {size}, {size}); "
                f"got {shape(images)}"
            )
        rows = size // patch
        x = images.reshape(-1, config.channels, rows, patch, rows, patch)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def hidden(self, images: Tensor, states: "list[Tensor] | None" = None) -> Tensor:
        """The class token after all layers, (B, d_model)."""
        x = self.patch_embedding(self.patches(images))  # (B, N, d_model)
        class_token = self.class_token.expand(x.shape[0], -1, -1).to(x.dtype)
        x = torch.cat((class_token, x), dim=1) + self.position_embedding  # (B, 1 + N, d_model)
        return self.encoder(x, states=states)[:, 0]

    def forward(
        self, images: Tensor, hidden_states: bool = False
    ) -> "Tensor | tuple[Tensor, list[Tensor]]":
        """Logits of each image's class.

        Args:
            images: (B, channels, image_size, image_size), floating point.
            hidden_states: also return the residual stream after each layer.

        Returns:
            (B, classes); with hidden_states also a list of (B, 1 + patches, d_model).

        Raises:
            ValueError, TypeError: images are not as above.
        """
        states: list[Tensor] | None = [] if hidden_states else None
        logits = self.classifier(self.hidden(images, states))
        return logits if states is None else (logits, states)

    def loss(self, images: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of labels, (B,) int, each the class of an image."""
        return output_cross_entropy(
            self.hidden(images), self.classifier.weight, labels, self.classifier.bias,
            label_smoothing=label_smoothing,
        )  # fmt: skip
