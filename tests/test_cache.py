"""The cache: a model gives with it what it gives without, whatever comes when."""

import pytest
import torch
from bounds import assert_within_bound
from model_cases import LENGTHS, TOKENS, gpt, randomize, seq2seq

SOURCE_LENGTHS = LENGTHS.flip(0)


def decoder(kind: str):
    """A model, and run(tokens, lengths=None, cache=None) -> logits."""
    if kind == "seq2seq":
        model = randomize(seq2seq()).eval()

        def run(tokens, lengths=None, cache=None):
            memory = model.encode(TOKENS, SOURCE_LENGTHS)
            return model.decode(tokens, memory, SOURCE_LENGTHS, lengths, cache)
    else:
        model = randomize(gpt(rotary=kind == "rotary gpt")).eval()

        def run(tokens, lengths=None, cache=None):
            return model(tokens, lengths, cache)

    return model, run


KINDS = ["gpt", "rotary gpt", "seq2seq"]


def uncached(model, run):
    """(in float32, in float64), of all tokens at once."""
    return run(TOKENS), (model.double(), run(TOKENS), model.float())[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [(1,) * 13, (5, 1, 1, 6), (13,), (4, 9)], ids=str)
@torch.no_grad()
def test_equal_rows(kind, steps):
    """Tokens in portions of any sizes."""
    model, run = decoder(kind)
    eager, truth = uncached(model, run)
    cache = model.new_cache(3, 13)
    found = torch.cat([run(part, cache=cache) for part in TOKENS.split(steps, 1)], 1)
    assert_within_bound("logits", found, eager, truth)
    assert cache.lengths.tolist() == [13, 13, 13]
    assert cache.longest == 13


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_unequal_rows(kind):
    """Prompts of unequal lengths, then each row goes on where it ended."""
    model, run = decoder(kind)
    eager, truth = uncached(model, run)
    prompt = torch.tensor([7, 1, 4])
    real = torch.arange(7) < prompt[:, None]
    cache = model.new_cache(3, 13)
    found = run(TOKENS[:, :7].masked_fill(~real, 0), prompt, cache)
    assert_within_bound("prompt", found[real], eager[:, :7][real], truth[:, :7][real])
    rows = torch.arange(3)
    for step in range(6):
        place = prompt + step
        found = run(TOKENS[rows, place][:, None], cache=cache)[:, 0]
        assert_within_bound(f"step {step}", found, eager[rows, place], truth[rows, place])
    assert cache.lengths.tolist() == [13, 7, 10]
    assert cache.longest == 13


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reorder(kind, ragged):
    """Rows repeated and dropped are as if they had been so from the start."""
    model, run = decoder(kind)
    index = torch.tensor([2, 2, 0])
    lengths = torch.tensor([5, 2, 3]) if ragged else None
    reordered = lengths[index] if ragged else None
    cache, again = model.new_cache(3, 13), model.new_cache(3, 13)
    run(TOKENS[:, :5], lengths, cache)
    cache.reorder(index)
    if kind == "seq2seq":
        # The memory that is handed over is no longer read: the cache has each row's own.
        memory = model.encode(TOKENS[index], SOURCE_LENGTHS[index])
        arguments = (memory, SOURCE_LENGTHS[index])
        model.decode(TOKENS[index, :5], *arguments, reordered, again)
        found = [model.decode(TOKENS[:, 5:6], *arguments, cache=c) for c in (cache, again)]
    else:
        run(TOKENS[index, :5], reordered, again)
        found = [run(TOKENS[:, 5:6], cache=c) for c in (cache, again)]
    assert torch.equal(*found)


@torch.no_grad()
def test_reorder_to_another_batch():
    model, run = decoder("gpt")
    cache = model.new_cache(1, 13)
    run(TOKENS[:1, :5], cache=cache)
    cache.reorder(torch.zeros(4, dtype=torch.int64))
    found = run(TOKENS[:1, 5:6].expand(4, 1), cache=cache)
    assert cache.lengths.tolist() == [6] * 4
    assert torch.equal(found, found[:1].expand(4, 1, -1))


@torch.no_grad()
def test_cross_attention_projects_memory_once():
    model, run = decoder("seq2seq")
    cache = model.new_cache(3, 13)
    run(TOKENS[:, :1], cache=cache)
    kept = [layer.cross.key for layer in cache.layers]
    assert all(key is not None and key.shape == (3, 4, 13, 8) for key in kept)
    run(TOKENS[:, 1:2], cache=cache)
    assert all(layer.cross.key is key for layer, key in zip(cache.layers, kept, strict=True))


@torch.no_grad()
def test_shared_layers_have_caches_of_their_own():
    model = randomize(gpt(share_layers=True)).eval()
    cache = model.new_cache(3, 13)
    found = torch.cat([model(part, cache=cache) for part in TOKENS.split(1, 1)], 1)
    assert len(cache.layers) == 2
    torch.testing.assert_close(found, model(TOKENS))


@torch.no_grad()
def test_autocast():
    """Kept in the dtype that the projections give."""
    model, run = decoder("gpt")
    cache = model.new_cache(3, 13)
    with torch.autocast("cpu", torch.bfloat16):
        run(TOKENS[:, :5], cache=cache)
        run(TOKENS[:, 5:6], cache=cache)
    assert cache.layers[0].key.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("capacity", "lengths", "first", "then", "message"),
    [
        (5, None, 5, 1, r"KVCache: 5 \+ 1 tokens must fit into a capacity of 5"),
        (13, torch.tensor([5, 1, 2]), 5, 2, "one token at a time; got 2"),
        (20, None, 13, 4, "max_length, 16 positions; got 4 tokens from position 13 on"),
    ],
)
@torch.no_grad()
def test_errors(capacity, lengths, first, then, message):
    model, run = decoder("gpt")
    cache = model.new_cache(3, capacity)
    run(TOKENS[:, :first], lengths, cache)
    with pytest.raises(ValueError, match=message):
        run(TOKENS[:, :then], cache=cache)


@torch.no_grad()
def test_unequal_rows_come_first():
    model, run = decoder("gpt")
    cache = model.new_cache(3, 13)
    run(TOKENS[:, :4], cache=cache)
    with pytest.raises(ValueError, match="must come first, on an empty cache; it holds 4 tokens"):
        run(TOKENS[:, 4:9], torch.tensor([5, 1, 2]), cache)


@torch.no_grad()
def test_a_row_may_stand_still():
    """A step that keeps no token of a row, which has come to its end, leaves it as it was."""
    model, run = decoder("gpt")
    cache = model.new_cache(3, 13)
    run(TOKENS[:, :5], LENGTHS.clamp(max=5), cache)
    run(torch.zeros(3, 1).long(), torch.tensor([1, 0, 1]), cache)
    found = run(TOKENS[:, 5:6], cache=cache)[1, 0]
    assert cache.lengths.tolist() == [7, 6, 7]
    torch.testing.assert_close(found, run(TOKENS)[1, 5])


def test_another_batch():
    model, run = decoder("gpt")
    with pytest.raises(ValueError, match="KVCache: key must have the batch size 3 of the cache"):
        run(TOKENS[:2], cache=model.new_cache(3, 13))
