"""What the configurations of all models share."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from typing_extensions import Self

from fusedformer.kernels.checks import check_dropout_p
from fusedformer.transformer.layers import check_activation


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a stack of layers; each model's own configuration gives the defaults."""

    d_model: int
    layers: int
    heads: int
    d_ff: int
    dropout: float
    activation: str
    prenorm: bool
    eps: float
    share_layers: bool  # one layer's weights, used by all of a stack (Lan et al. 2020)
    ff_dropout: float = 0.0  # after the feed-forward's activation, as torch.nn.Transformer

    # name -> the fields in which a published size differs from the defaults
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in fields(self):
            size = getattr(self, field.name)
            if field.type is int and (not isinstance(size, int) or size < 1):
                raise ValueError(f"{name}: {field.name} must be an int, 1 or more; got {size!r}")
        if self.d_model % self.heads:
            raise ValueError(
                f"{name}: d_model must be a multiple of heads; got {self.d_model} and {self.heads}"
            )
        check_dropout_p(name, self.dropout, "dropout")
        check_dropout_p(name, self.ff_dropout, "ff_dropout")
        check_activation(name, self.activation)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A published size, with some fields changed.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in cls.PRESETS:
            known = ", ".join(cls.PRESETS)
            raise ValueError(f"{cls.__name__}: preset must be one of {known}; got {name!r}")
        return cls(**{**cls.PRESETS[name], **changes})
