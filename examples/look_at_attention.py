"""For each head of a trained GPT, the word that each word of a text looks at most.

    python examples/look_at_attention.py CHECKPOINT "some text"

`fusedformer attention-map` draws all of it.
"""

import argparse

import torch

from fusedformer import GPT
from fusedformer.transformer import checkpoint
from fusedformer.transformer.attention_maps import attention_weights
from fusedformer.transformer.data import encode
from fusedformer.transformer.words import labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", help="a GPT that `fusedformer train gpt` made")
    parser.add_argument("text")
    args = parser.parse_args()

    model, tokenizer = checkpoint.load(args.checkpoint)
    if not isinstance(model, GPT):
        parser.error(f"{args.checkpoint} holds a {type(model).__name__}; wanted a GPT")
    (ids,) = encode(tokenizer, [args.text], sos=True)
    words = labels(tokenizer, ids)

    # By kind of attention; a GPT has one. (layers, 1, heads, N, N): each row adds up to 1.
    weights = attention_weights(model, torch.tensor([ids]))["stack.self_attention"][:, 0]
    for layer, heads in enumerate(weights, start=1):
        for head, rows in enumerate(heads, start=1):
            largest, at = rows.max(dim=-1)
            looks = [
                f"{word} → {words[i]} {weight:.0%}"
                for word, i, weight in zip(words, at.tolist(), largest.tolist(), strict=True)
            ]
            print(f"layer {layer} head {head}:  " + "  ".join(looks))


if __name__ == "__main__":
    main()
