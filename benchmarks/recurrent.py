"""What came before the Transformer: recurrent encoder-decoders, and a task that tells them apart.

ContextVector: the encoder's last state is all that the decoder sees (Sutskever, Vinyals & Le 2014;
Cho et al. 2014). RecurrentAttention: the decoder also attends to every state of the encoder
(Bahdanau, Cho & Bengio 2015; scores as products, Luong, Pham & Manning 2015). Both are gated
recurrent units, which take one step after another; the Transformer beside them takes all at once.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusedformer.benchmarks import timing
from fusedformer.transformer.seq2seq import Transformer, TransformerConfig

SYMBOLS = 16  # to be recalled; as many others are noise
_START = 0
VOCAB = 1 + 2 * SYMBOLS

MODELS = ("context vector", "recurrent attention", "transformer")


class ContextVector(nn.Module):
    """source (B, Ns), target (B, Nt) -> logits (B, Nt, VOCAB) of the token after each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.output = nn.Linear(width, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, context = self.encoder(self.embedding(source))
        states, _ = self.decoder(self.embedding(target), context)
        return self.output(states)


class RecurrentAttention(nn.Module):
    """As ContextVector; each state of the decoder reads the encoder's states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.output = nn.Linear(2 * width, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, context = self.encoder(self.embedding(source))
        states, _ = self.decoder(self.embedding(target), context)
        weights = (states @ memory.transpose(1, 2) / math.sqrt(states.shape[-1])).softmax(-1)
        return self.output(torch.cat((weights @ memory, states), -1))


def model(name: str, width: int, length: int, device: str) -> nn.Module:
    """One of MODELS, its weights from seed 0; the Transformer has one layer, as the others have."""
    torch.manual_seed(0)
    if name == MODELS[0]:
        return ContextVector(width).to(device)
    if name == MODELS[1]:
        return RecurrentAttention(width).to(device)
    config = TransformerConfig(
        vocab_size=VOCAB, max_length=length, d_model=width, layers=1, heads=4, d_ff=2 * width,
        dropout=0.0, prenorm=True,
    )  # fmt: skip
    return Transformer(config).to(device)


def sequential_steps(name: str, length: int) -> int:
    """Steps of a forward, source and target of ``length``, that wait for the one before."""
    return 2 * length if name != MODELS[2] else 2


# --- Recall ---------------------------------------------------------------------------------------


def recall_batches(
    distance: int, batch: int, device: str, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (source, symbol): a symbol, then ``distance`` tokens of noise."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        symbol = torch.randint(1, 1 + SYMBOLS, (batch, 1), generator=generator)
        noise = torch.randint(1 + SYMBOLS, VOCAB, (batch, distance), generator=generator)
        yield torch.cat((symbol, noise), 1).to(device), symbol[:, 0].to(device)


def recall(
    name: str, distance: int, width: int, steps: int, batch: int, device: str
) -> dict[str, float]:
    """Trains a model to say the first token of its source, and asks it.

    Returns:
        "accuracy" on 512 fresh sequences, guessing right being 1 / SYMBOLS; "gradient", the norm
        of the loss's gradient at the first token over that at the last, before any training: what
        is left of it after so many steps; "loss" at the end.
    """
    net = model(name, width, distance + 1, device)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    batches = recall_batches(distance, batch, device, seed=1)
    start = torch.full((batch, 1), _START, device=device)
    gradient = _first_over_last(net, *next(batches), start)
    loss = torch.zeros(())
    for _ in range(steps):
        source, symbol = next(batches)
        loss = functional.cross_entropy(net(source, start)[:, 0], symbol)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    right = asked = 0
    fresh = recall_batches(distance, batch, device, seed=2)
    with torch.no_grad():
        while asked < 512:
            source, symbol = next(fresh)
            right += int((net(source, start)[:, 0].argmax(-1) == symbol).sum())
            asked += batch
    return {"accuracy": right / asked, "gradient": gradient, "loss": float(loss.detach())}


def _first_over_last(net: nn.Module, source: Tensor, symbol: Tensor, start: Tensor) -> float:
    """The gradient's norm at the first token of the source over that at its last."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    embedding = next(part for part in net.modules() if isinstance(part, nn.Embedding))
    hook = embedding.register_forward_hook(keep)
    functional.cross_entropy(net(source, start)[:, 0], symbol).backward()
    hook.remove()
    grad = seen[0].grad  # the source is embedded before the target
    assert grad is not None
    net.zero_grad()
    return float(grad[:, 0].norm() / grad[:, -1].norm())


# --- Speed ----------------------------------------------------------------------------------------


def times(length: int, width: int, batch: int, device: str, seconds: float) -> dict[str, dict]:
    """A training step's milliseconds, source and target of ``length``, models in turns.

    Returns:
        name -> {"ms": [...]}, or {"error": exception}; see timing.time_interleaved().
    """
    generator = torch.Generator().manual_seed(0)
    source, target = (
        torch.randint(1, VOCAB, (batch, length), generator=generator).to(device) for _ in range(2)
    )

    def step(net: nn.Module) -> timing.Call:
        def call() -> None:
            logits = net(source, target)
            functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
            net.zero_grad()

        return call

    calls = {name: step(model(name, width, length, device)) for name in MODELS}
    return timing.time_interleaved(
        {name: timing.whole([call]) for name, call in calls.items()},
        timing.clock_for(device),
        seconds=seconds,
        min_rounds=3,
        max_rounds=20,
        warmup=2,
    )
