"""The commands that use a checkpoint: what they print is what the library gives; bad input."""

import io
import json
import shutil

import pytest
import torch

from fusedformer import (
    BERT,
    GPT,
    BERTConfig,
    GPTConfig,
    Transformer,
    TransformerConfig,
    ViT,
    ViTConfig,
    cli,
)

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from fusedformer.transformer import checkpoint, data
from fusedformer.transformer.generate import generate
from fusedformer.transformer.look import look_at_text
from fusedformer.transformer.score import score_text

V = 300
SIZES = {"d_model": 32, "layers": 2, "heads": 4, "d_ff": 64}
TEXT = {**SIZES, "vocab_size": V, "max_length": 24}
TOKENIZER = data.train_tokenizer(["the cat sat on the mat. a dog ate the cat."] * 3, V)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each model, with large random weights: what it says varies."""
    torch.manual_seed(2)
    base = tmp_path_factory.mktemp("checkpoints")
    image = {"image_size": 8, "patch_size": 4, "channels": 1, "classes": 3}
    made = {
        "seq2seq": (Transformer(TransformerConfig(**TEXT, share_embeddings=False)), {}),
        "gpt": (GPT(GPTConfig(**TEXT)), {}),
        "backwards": (GPT(GPTConfig(**TEXT)), {"right_to_left": True}),
        "bert": (BERT(BERTConfig(**TEXT, classes=2)), {}),
        "classifier": (BERT(BERTConfig(**TEXT, classes=2)), {"labels": ["bad", "good"]}),
        "vit": (ViT(ViTConfig(**SIZES, **image)), {"labels": list("abc"), "mean": 0.4, "std": 0.2}),
    }
    for name, (model, about) in made.items():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
        tokenizer = None if name == "vit" else TOKENIZER
        checkpoint.save(base / name, model, tokenizer, about)
    return base


@pytest.fixture
def run(folders, capsys, monkeypatch):
    """Runs a command on a checkpoint; returns what it prints."""

    def command(name, folder, *args, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = cli.main([name, str(folders / folder), *map(str, args)])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return command


def test_translate(run, folders):
    model, _ = checkpoint.load(folders / "seq2seq")
    texts = ["the cat", "a dog sat on the mat"]
    source, lengths = data.pad(data.encode(TOKENIZER, texts, eos=True))
    for options, chosen in (
        (["--beams", 1], {"temperature": 0}),
        (["--beams", 3, "--length-penalty", 1], {"num_beams": 3}),
    ):
        tokens, new = generate(
            model, source=source, source_lengths=lengths, max_new_tokens=9, start_token=data.SOS,
            end_token=data.EOS, **chosen,
        )  # fmt: skip
        rows = zip(tokens.tolist(), new.tolist(), strict=True)
        wanted = [TOKENIZER.decode(row[:count]).strip() for row, count in rows]
        options += ["--max-new-tokens", 9, "--json"]
        out = run("translate", "seq2seq", *options, *texts).splitlines()
        assert [json.loads(line)["translation"] for line in out] == wanted
        piped = run("translate", "seq2seq", *options, "-", stdin="\n".join(texts) + "\n")
        assert piped.splitlines() == out
    plain = run("translate", "seq2seq", "--beams", 1, "--max-new-tokens", 3, "the cat")
    assert plain.count("\n") == 1 + plain.strip().count("\n")


def test_generate(run, folders):
    model, _ = checkpoint.load(folders / "gpt")
    prompt = torch.tensor(data.encode(TOKENIZER, ["the cat"], sos=True))
    for options, chosen in (
        (["--seed", 3], {"seed": 3, "temperature": 0.8}),
        (["--seed", 3, "--temperature", 2, "--top-k", 9, "--top-p", 0.7],
         {"seed": 3, "temperature": 2.0, "top_k": 9, "top_p": 0.7}),
        (["--temperature", 0], {"temperature": 0}),
        (["--beams", 3], {"num_beams": 3}),
    ):  # fmt: skip
        tokens, count = generate(model, prompt, max_new_tokens=9, end_token=data.EOS, **chosen)
        wanted = TOKENIZER.decode(tokens[0, : count[0]].tolist())
        out = run("generate", "gpt", *options, "--max-new-tokens", 9, "the cat")
        assert out == f"the cat{wanted}\n"
        out = run("generate", "gpt", *options, "--max-new-tokens", 9, "--json", "the cat")
        assert json.loads(out) == {"prompt": "the cat", "continuation": wanted}
    # All positions are used by default; a text on standard input is one, with its lines.
    out = run("generate", "gpt", "--temperature", 0, "-", stdin="the cat\nsat\n")
    assert out.startswith("the cat\nsat")


def test_generate_from_right_to_left(run, folders):
    model, _ = checkpoint.load(folders / "backwards")
    ids = TOKENIZER.encode("the cat").ids
    prompt = torch.tensor([[data.SOS, *ids[::-1]]])
    new, _ = generate(model, prompt, max_new_tokens=4, temperature=0)
    out = run("generate", "backwards", "--temperature", 0, "--max-new-tokens", 4, "the cat")
    assert out == TOKENIZER.decode(new[0].tolist()[::-1]) + "the cat\n"


@torch.no_grad()
def test_generate_fills_masks(run, folders):
    model, _ = checkpoint.load(folders / "bert")
    before, after = TOKENIZER.encode("the").ids, TOKENIZER.encode(" sat").ids
    tokens = torch.tensor([[1, *before, 4, *after, 4, 2]])
    # Of these two rows alone, as the command: a product of more rows rounds otherwise.
    hidden = model(tokens)[0, [1 + len(before), -2]]
    probs = model.masked_lm(hidden).softmax(-1)
    out = json.loads(run("generate", "bert", "--json", "--top", 2, "the <mask> sat <mask>"))
    for row, likeliest in zip(probs, out["masks"], strict=True):
        values = row.topk(2).values.tolist()
        assert [one["probability"] for one in likeliest] == pytest.approx(values)
    best = [likeliest[0]["token"] for likeliest in out["masks"]]
    text = run("generate", "bert", "the <mask> sat <mask>").splitlines()[0]
    assert text == f"the {best[0]} sat {best[1]}"


def test_score(run, folders):
    for folder, options in (
        ("gpt", {}),
        ("backwards", {"right_to_left": True}),
        ("bert", {}),
        ("seq2seq", {"source": "a dog"}),
    ):
        model, _ = checkpoint.load(folders / folder)
        wanted = score_text(model, TOKENIZER, "the cat", **options)
        arguments = ["--source", "a dog"] if folder == "seq2seq" else []
        out = json.loads(run("score", folder, *arguments, "--json", "the cat"))
        assert out["log_prob"] == wanted.log_prob
        assert out["perplexity"] == wanted.perplexity
        assert [one["token"] for one in out["tokens"]] == wanted.tokens
        assert [one["log_prob"] for one in out["tokens"]] == wanted.log_probs
        text = run("score", folder, *arguments, "the cat").splitlines()
        assert len(text) == len(wanted.tokens) + 2
        assert text[-1].split() == [
            f"{wanted.perplexity:.3f}", "pseudo-perplexity" if folder == "bert" else "perplexity",
        ]  # fmt: skip


@torch.no_grad()
def test_classify(run, folders, tmp_path):
    pytest.importorskip("PIL")
    from PIL import Image

    model, _ = checkpoint.load(folders / "vit")
    pixels = torch.randint(256, (8, 8), dtype=torch.uint8)
    Image.frombytes("L", (8, 8), bytes(pixels.flatten().tolist())).save(tmp_path / "image.png")
    probs = model((pixels[None, None] / 255 - 0.4) / 0.2)[0].softmax(-1)
    out = json.loads(run("classify", "vit", "--json", tmp_path / "image.png"))
    found = {one["class"]: one["probability"] for one in out["classes"]}
    assert [found[label] for label in "abc"] == pytest.approx(probs.tolist())
    assert list(found.values()) == sorted(found.values(), reverse=True)

    model, _ = checkpoint.load(folders / "classifier")
    tokens = torch.tensor(data.encode(TOKENIZER, ["the cat"], sos=True, eos=True))
    best = model.classify(model(tokens))[0].softmax(-1).max()
    out = run("classify", "classifier", "--top", 1, "the cat")
    assert out.split()[2:] in ([label, f"{best:.1%}"] for label in ("bad", "good"))


def test_attention_map(run, folders, tmp_path):
    pytest.importorskip("matplotlib")
    out = run("attention-map", "seq2seq", "the cat", "--target", "a dog", "--out", tmp_path / "a")
    written = {path.name for path in (tmp_path / "a").iterdir()}
    assert {line.rpartition("/")[2] for line in out.splitlines()} == written
    assert {"attention.html", "attention-cross-layer2.png", "predictions.png"} <= written
    model, _ = checkpoint.load(folders / "seq2seq")
    one = look_at_text(model, TOKENIZER, "the cat", "a dog").predictions[0]
    text = (tmp_path / "a/attention.html").read_text()
    assert f"{one.after[0][1]:.1%}" in text


LONG = "zz " * 20


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["translate", "no-such-folder", "a"], "there is no folder"),
        (["translate", "", "a"], "is no checkpoint"),
        (["translate", "gpt", "a"], "holds a GPT; this command wants a Transformer"),
        (["classify", "gpt", "a"], "holds a GPT; this command wants a ViT or BERT"),
        (["generate", "vit", "a"], "holds a ViT; this command wants a GPT or BERT"),
        (["score", "vit", "a"], "holds a ViT; this command wants a GPT or Transformer or BERT"),
        (["translate", "seq2seq", " "], "the text is empty"),
        (["translate", "seq2seq", "-"], "the text is empty"),
        (["translate", "seq2seq", "a", ""], "text 2 is empty"),
        (["generate", "gpt", ""], "the text is empty"),
        (["score", "gpt", ""], "the text is empty"),
        (["attention-map", "gpt", "", "--out", "x"], "the text is empty"),
        (["translate", "seq2seq", LONG], "text 1 has 61 tokens; the model has 24 positions"),
        (["generate", "gpt", LONG], "61 tokens; the model has 24 positions"),
        (["generate", "bert", LONG + "<mask>"], "tokens; the model has 24 positions"),
        (["score", "gpt", LONG], "61 tokens"),
        (["attention-map", "gpt", LONG, "--out", "x"], "61 tokens"),
        (["generate", "gpt", "a", "--max-new-tokens", "99"], "the model has 24"),
        (["generate", "gpt", "a", "--top-p", "1.5"], "top_p must be above 0 and at most 1"),
        (["generate", "gpt", "a", "--top-k", "0"], "top_k must be at least 1"),
        (["generate", "gpt", "a", "--temperature", "-1"], "temperature must be 0"),
        (["generate", "gpt", "a", "--beams", "0"], "num_beams must be at least 1"),
        (["generate", "bert", "a"], "write <mask> where they are missing"),
        (["classify", "bert", "a"], "has no labels"),
        (["classify", "vit", "no-such-image"], "there is no image file no-such-image"),
        (["score", "seq2seq", "a"], "--source is for a Transformer, and a Transformer wants it"),
        (["score", "gpt", "a", "--source", "b"], "--source is for a Transformer"),
        (["attention-map", "gpt", "a", "--target", "b", "--out", "x"], "only a Transformer"),
        (["score", "gpt", "a", "--device", "nowhere"], "--device nowhere cannot be used here"),
    ],
)
def test_bad_input_is_one_sentence(argv, message, folders, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main([argv[0], str(folders / argv[1]), *argv[2:]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fusedformer {argv[0]}: ")
    assert message in err
    assert err.count(f"{argv[0]}: ") == 1
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"d_model": 64}, {"layers": 3}, {"max_length": 12}])
def test_a_checkpoint_of_another_shape(change, folders, tmp_path, capsys):
    folder = shutil.copytree(folders / "gpt", tmp_path / "gpt")
    about = json.loads((folder / "config.json").read_text())
    about["config"] |= change
    (folder / "config.json").write_text(json.dumps(about))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["generate", str(folder), "a"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fusedformer generate: ")
    assert "this GPT" in said
    assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_without_its_tokenizer(folders, tmp_path, capsys):
    checkpoint.save(tmp_path / "bare", GPT(GPTConfig(**TEXT)))
    assert cli.main(["score", str(tmp_path / "bare"), "a"]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
