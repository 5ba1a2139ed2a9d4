"""The encoder-decoder Transformer learns to copy sequences of random tokens, or to reverse them.

python examples/copy_task.py --steps 400 --reverse
"""

import argparse

import torch
from torch import Tensor

from fusedformer import Transformer, TransformerConfig
from fusedformer.transformer.generate import generate

PAD, SOS, EOS = 0, 1, 2
VOCAB = 20


def pairs(count: int, longest: int, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sources (B, longest), targets <sos> ... <eos> (B, longest + 2), and the sources' lengths."""
    lengths = torch.randint(1, longest + 1, (count,))
    source = torch.randint(3, VOCAB, (count, longest))
    target = torch.full((count, longest + 2), PAD)
    target[:, 0] = SOS
    for row, length in enumerate(lengths.tolist()):
        source[row, length:] = PAD
        copied = source[row, :length]
        target[row, 1 : length + 1] = copied.flip(0) if reverse else copied
        target[row, length + 1] = EOS
    return source, target, lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--longest", type=int, default=8)
    parser.add_argument("--reverse", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)

    config = TransformerConfig(
        vocab_size=VOCAB, max_length=args.longest + 2, d_model=64, layers=2, heads=4, d_ff=128,
        dropout=0.0, prenorm=True,
    )  # fmt: skip
    model = Transformer(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=args.steps)
    for step in range(1, args.steps + 1):
        source, target, lengths = pairs(128, args.longest, args.reverse)
        loss = model.loss(source, target, lengths, lengths + 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if step % 50 == 0 or step == args.steps:
            print(f"step {step:4}  loss {loss.item():.4f}", flush=True)

    source, target, lengths = pairs(200, args.longest, args.reverse)
    written, _ = generate(
        model, source=source, source_lengths=lengths, max_new_tokens=args.longest + 1,
        temperature=0, start_token=SOS, end_token=EOS,
    )  # fmt: skip
    right = sum(
        row[: length + 1] == wanted[1 : length + 2]
        for row, wanted, length in zip(
            written.tolist(), target.tolist(), lengths.tolist(), strict=True
        )
    )
    print(f"{right} of 200 new sequences without a fault")


if __name__ == "__main__":
    main()
