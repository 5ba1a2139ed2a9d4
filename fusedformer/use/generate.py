"""``fusedformer generate``: a GPT continues a text, a BERT fills in its masked words."""

import argparse
import json

import torch

from fusedformer import use
from fusedformer.transformer.bert import BERT
from fusedformer.transformer.data import EOS, MASK, SOS, encode
from fusedformer.transformer.generate import generate
from fusedformer.transformer.gpt import GPT
from fusedformer.transformer.words import labels

MASK_WORD = "<mask>"
_NEW_TOKENS = 200


def configure(parser: argparse.ArgumentParser) -> None:
    use.add_checkpoint(parser)
    use.add_texts(parser, f"what a GPT continues, or with {MASK_WORD} what a BERT fills in")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N",
        help=f"default: {_NEW_TOKENS}, or as many as the model has positions for",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest of probability P"
    )
    parser.add_argument("--beams", type=int, default=1, help="above 1: beam search, no draws")
    parser.add_argument("--seed", type=int, help="of the draws; default: another each time")
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help=f"words for a BERT's {MASK_WORD} (5)"
    )


def run(args: argparse.Namespace) -> int:
    model, tokenizer, about = use.load(args, GPT, BERT)
    for text in use.texts(args, lines=False):
        if isinstance(model, BERT):
            record = fill(model, tokenizer, text, args.top)
            shown = _filled(record)
        else:
            continuation = _continuation(model, tokenizer, text, args, about)
            shown = text + continuation
            record = {"prompt": text, "continuation": continuation}
            if about.get("right_to_left"):
                shown = continuation + text
        print(json.dumps(record, ensure_ascii=False) if args.json else shown, flush=True)
    return 0


def _continuation(model: GPT, tokenizer, text: str, args: argparse.Namespace, about: dict) -> str:
    """What a GPT writes after a text; one that reads from right to left, before it."""
    backwards = about.get("right_to_left", False)
    (ids,) = encode(tokenizer, [text])
    prompt = [SOS, *(ids[::-1] if backwards else ids)]
    use.check_room(len(prompt), model, "the text, with its <sos>,")
    room = model.config.max_length - len(prompt) + 1
    temperature = args.temperature
    if temperature is None:
        temperature = 0.8 if args.beams == 1 else 1.0
    written, lengths = generate(
        model,
        torch.tensor([prompt], device=next(model.parameters()).device),
        max_new_tokens=min(_NEW_TOKENS, room) if args.max_new_tokens is None
        else args.max_new_tokens,
        temperature=temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_beams=args.beams,
        end_token=EOS,
        seed=args.seed,
    )  # fmt: skip
    new = written[0, : lengths[0]].tolist()
    return tokenizer.decode(new[::-1] if backwards else new)


@torch.no_grad()
def fill(model: BERT, tokenizer, text: str, top: int = 5) -> dict:
    """The likeliest words for each ``<mask>`` of a text, in one pass.

    Returns:
        {"text": ..., "masks": [[{"token": ..., "probability": ...}, ...], ...]}

    Raises:
        ValueError: the text has no mask or is too long.
    """
    parts = text.split(MASK_WORD)
    if len(parts) < 2:
        raise ValueError(f"a BERT fills in words: write {MASK_WORD} where they are missing")
    if top < 1:
        raise ValueError(f"--top must be at least 1; got {top}")
    # The space before a word belongs to its token.
    parts = [part.removesuffix(" ") for part in parts[:-1]] + parts[-1:]
    tokens = [SOS]
    for part in encode(tokenizer, parts):
        tokens += [*part, MASK]
    tokens[-1] = EOS
    use.check_room(len(tokens), model, "the text")
    read = torch.tensor([tokens], device=next(model.parameters()).device)
    hidden = model(read)[read == MASK]
    found = model.masked_lm(hidden).float().softmax(-1).topk(min(top, model.config.vocab_size))
    masks = [
        [
            {"token": word, "probability": prob}
            for word, prob in zip(labels(tokenizer, ids), probs, strict=True)
        ]
        for ids, probs in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]
    return {"text": text, "masks": masks}


def _filled(record: dict) -> str:
    """The text with the likeliest words in it, and below it the others."""
    parts = record["text"].split(MASK_WORD)
    text = parts[0]
    for likeliest, part in zip(record["masks"], parts[1:], strict=True):
        text += likeliest[0]["token"] + part
    lines = [
        "  ".join(f"{one['token']} {one['probability']:.1%}" for one in likeliest)
        for likeliest in record["masks"]
    ]
    return "\n".join([text, *(f"  {number}: {line}" for number, line in enumerate(lines, 1))])
