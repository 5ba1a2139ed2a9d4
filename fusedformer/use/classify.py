"""``fusedformer classify``: images by a ViT, texts by a BERT with a trained classifier."""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from fusedformer import use
from fusedformer.transformer.bert import BERT
from fusedformer.transformer.data import encode, read_image
from fusedformer.transformer.vit import ViT


def configure(parser: argparse.ArgumentParser) -> None:
    use.add_checkpoint(parser)
    use.add_texts(parser, "a ViT's image file, or a BERT's text")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes shown of each (3)")


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    model, tokenizer, about = use.load(args, ViT, BERT)
    if args.top < 1:
        raise ValueError(f"--top must be at least 1; got {args.top}")
    labels = about.get("labels")
    if labels is None and isinstance(model, BERT):
        raise ValueError(
            f"{args.checkpoint} has no labels: its classifier was not trained. "
            "`fusedformer generate` fills in its masked words"
        )
    labels = labels or [str(number) for number in range(model.config.classes)]
    device = next(model.parameters()).device
    for text in use.texts(args):
        if isinstance(model, ViT):
            logits = model(model_input(text, model, about)[None].to(device))
        else:
            (tokens,) = encode(tokenizer, [text], sos=True, eos=True)
            use.check_room(len(tokens), model, "the text")
            logits = model.classify(model(torch.tensor([tokens], device=device)))
        found = logits[0].float().softmax(-1).topk(min(args.top, len(labels)))
        classes = [
            {"class": labels[index], "probability": prob}
            for index, prob in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]
        if args.json:
            print(json.dumps({"input": text, "classes": classes}, ensure_ascii=False), flush=True)
        else:
            line = "  ".join(f"{one['class']} {one['probability']:.1%}" for one in classes)
            print(f"{text}: {line}", flush=True)
    return 0


def model_input(file: str, model: ViT, about: dict) -> Tensor:
    """An image file as the model was trained on: (channels, size, size) float32.

    Raises:
        ValueError: it cannot be read, or Pillow is missing.
    """
    if not Path(file).is_file():
        raise ValueError(f"there is no image file {file}")
    size = model.config.image_size
    pixels = read_image(file, (model.config.channels, size, size)) / 255
    return (pixels - about.get("mean", 0.0)) / about.get("std", 1.0)
