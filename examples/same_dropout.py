"""One seed, one dropout mask: on every backend, whole or in parts, forward and backward.

python examples/same_dropout.py
"""

import torch

from fusedformer import attention, available_backends, dropout

P, SEED = 0.1, 1234


def main() -> None:
    x = torch.ones(64, 100)
    q = k = torch.zeros(1, 2, 32, 32)  # even scores: each probability is 1/32 or dropped
    v = torch.eye(32).expand(1, 2, 32, 32)  # so that the output is the probabilities themselves

    kept = {}
    for backend, reason in available_backends("attention", "cpu").items():
        if reason is not None:
            print(f"{backend}: not here ({reason})")
            continue
        rows = dropout(x, P, seed=SEED, backend=backend) != 0
        probs = attention(q, k, v, dropout_p=P, seed=SEED, backend=backend) != 0
        kept[backend] = (rows, probs)
        print(f"{backend}: {rows.sum()} of {x.numel()} elements kept, {probs.sum()} probabilities")

    first = kept["reference"]
    same = all(
        torch.equal(mask, wanted)
        for masks in kept.values()
        for mask, wanted in zip(masks, first, strict=True)
    )
    print(f"masks equal on {', '.join(kept)}: {same}")

    # A part of the problem drops what the whole does: here the last 16 queries alone.
    part = attention(q[:, :, 16:], k, v, dropout_p=P, seed=SEED, offsets=(0, 0, 16, 0)) != 0
    print(f"the last 16 queries alone: {torch.equal(part, first[1][:, :, 16:])}")

    # The backward draws the mask again: no gradient flows through what was dropped.
    x.requires_grad_(True)
    dropout(x, P, seed=SEED).sum().backward()
    print(f"the backward's mask: {torch.equal(x.grad != 0, first[0])}")


if __name__ == "__main__":
    main()
