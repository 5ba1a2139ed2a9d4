"""``fusedformer attention-map``: which word looks at which, as a page and as pictures."""

import argparse
from pathlib import Path

from fusedformer import use
from fusedformer.transformer.attention_page import page
from fusedformer.transformer.bert import BERT
from fusedformer.transformer.gpt import GPT
from fusedformer.transformer.look import look_at_image, look_at_text
from fusedformer.transformer.seq2seq import Transformer
from fusedformer.transformer.vit import ViT
from fusedformer.use.classify import model_input

PAGE = "attention.html"


def configure(parser: argparse.ArgumentParser) -> None:
    use.add_checkpoint(parser)
    parser.add_argument("text", metavar="TEXT", help="what the model reads; a ViT's image file")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder for the files")
    parser.add_argument("--target", help="a Transformer's translation; default: its own, greedy")


def run(args: argparse.Namespace) -> int:
    model, tokenizer, about = use.load(args, Transformer, GPT, BERT, ViT)
    if isinstance(model, ViT):
        image = model_input(args.text, model, about).to(next(model.parameters()).device)
        look = look_at_image(model, image, args.text)
    else:
        backwards = about.get("right_to_left", False)
        look = look_at_text(model, tokenizer, args.text, args.target, backwards)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE).write_text(page(look), encoding="utf-8")
    print(folder / PAGE)
    try:
        from fusedformer.transformer.attention_pictures import write_pictures
    except ImportError:
        print("no PNG files: matplotlib is not installed (pip install matplotlib)")
        return 0
    pictures, lacking = write_pictures(look, folder)
    for path in pictures:
        print(path)
    if lacking:
        print(f"no installed font has all signs of this text: the PNG files lack some, {PAGE} none")
    return 0
