"""``fusedformer score``: how likely a model holds texts to be."""

import argparse
import json

from fusedformer import use
from fusedformer.transformer.bert import BERT
from fusedformer.transformer.gpt import GPT
from fusedformer.transformer.score import Score, score_text
from fusedformer.transformer.seq2seq import Transformer
from fusedformer.transformer.words import visible


def configure(parser: argparse.ArgumentParser) -> None:
    use.add_checkpoint(parser)
    use.add_texts(parser, "a text; of standard input each line is one")
    parser.add_argument("--source", help="what a Transformer translates to the text")


def run(args: argparse.Namespace) -> int:
    model, tokenizer, about = use.load(args, GPT, Transformer, BERT)
    texts = use.texts(args)
    if isinstance(model, Transformer) != (args.source is not None):
        raise ValueError("--source is for a Transformer, and a Transformer wants it")
    for text in texts:
        score = score_text(
            model,
            tokenizer,
            text,
            source=args.source,
            right_to_left=about.get("right_to_left", False),
        )
        record = _json(score) if args.json else _text(score, isinstance(model, BERT))
        print(record, flush=True)
    return 0


def _json(score: Score) -> str:
    record = {
        "text": score.text,
        "log_prob": score.log_prob,
        "perplexity": score.perplexity,
        "tokens": [
            {"token": token, "log_prob": log_prob}
            for token, log_prob in zip(score.tokens, score.log_probs, strict=True)
        ],
    }
    return json.dumps(record, ensure_ascii=False)


def _text(score: Score, masked: bool) -> str:
    pseudo = "pseudo-" if masked else ""
    lines = [
        f"{log_prob:9.3f}  {visible(token)}"
        for token, log_prob in zip(score.tokens, score.log_probs, strict=True)
    ]
    count = len(score.tokens)
    total = f"{score.log_prob:9.3f}  {pseudo}log-probability of {count} tokens, natural logarithm"
    return "\n".join([*lines, total, f"{score.perplexity:9.3f}  {pseudo}perplexity"])
