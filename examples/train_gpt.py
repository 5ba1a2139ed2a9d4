"""A small GPT on the characters of a text file, and what it writes then.

    python examples/train_gpt.py FILE --steps 500

`fusedformer train gpt` does this with a tokenizer, checkpoints and held-out data.
"""

import argparse
from pathlib import Path

import torch

from fusedformer import GPT, GPTConfig
from fusedformer.transformer.generate import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--length", type=int, default=128, help="characters of an example")
    parser.add_argument("--width", type=int, default=128, help="d_model")
    args = parser.parse_args()
    torch.manual_seed(0)

    text = args.file.read_text(encoding="utf-8")
    letters = sorted(set(text))
    tokens = torch.tensor([letters.index(letter) for letter in text])
    if len(tokens) <= args.length + 1:
        parser.error(f"{args.file} has {len(tokens)} characters; at least {args.length + 2} wanted")

    config = GPTConfig(
        vocab_size=len(letters), max_length=args.length, d_model=args.width, layers=4, heads=4,
        d_ff=4 * args.width,
    )  # fmt: skip
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(args.steps + 1):
        starts = torch.randint(len(tokens) - args.length - 1, (16,))
        batch = tokens[starts[:, None] + torch.arange(args.length + 1)]  # (16, length + 1)
        loss = model.loss(batch)  # of each character, given those before it
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:5}  loss {loss.item():.3f}", flush=True)

    count = min(300, args.length - 7)
    written, _ = generate(model, tokens[None, :8], max_new_tokens=count, temperature=0.8, seed=0)
    print(text[:8] + "".join(letters[token] for token in written[0].tolist()))


if __name__ == "__main__":
    main()
