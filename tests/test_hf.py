"""transformers' models with attn_implementation="fusedformer", against the same models without."""

import copy

import pytest
import torch
from backends import ROW_BACKENDS
from bounds import assert_within_bound
from third_party import (
    BATCH,
    HF_MODELS,
    LENGTH,
    VOCABULARY,
    cast,
    gradients,
    in_several_draws,
    output,
    padding,
)

from fusedformer import use_backend

hf = pytest.importorskip("fusedformer.integrations.hf", reason="needs transformers")

LANGUAGE_MODELS = ("gpt2", "llama", "mistral")
WITH_TOKENS = ("bert", "t5", "bart", *LANGUAGE_MODELS)


@pytest.fixture(autouse=True)
def _registered():
    torch.manual_seed(0)
    hf.register()
    yield
    torch.compiler.reset()


def implemented(model, name, dtype=torch.float32):
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(name)
    return model


def compare(make, dtype=torch.float32):
    """Logits and gradients of ours, eager and the truth.

    make() gives the model, its inputs, and which of the outputs count, None for all.
    """

    def run():
        model, inputs, counts = make()
        logits, grads = [], []
        for name, of in (("fusedformer", dtype), ("eager", dtype), ("sdpa", torch.float64)):
            one = implemented(model, name, of)
            result = output(one, cast(inputs, of))
            logits.append(result if counts is None else result[counts])
            grads.append(gradients(one, logits[-1]))
        return {"logits": logits, "gradients": grads}

    for label, values in in_several_draws(run).items():
        assert_within_bound(label, *values)


@pytest.mark.parametrize("name", HF_MODELS)
def test_a_model_is_what_it_was(name):
    compare(lambda: (*HF_MODELS[name](), None))


@pytest.mark.slow
@pytest.mark.parametrize("name", HF_MODELS)
def test_a_model_is_what_it_was_in_bfloat16(name):
    compare(lambda: (*HF_MODELS[name](), None), torch.bfloat16)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", WITH_TOKENS)
def test_padding(name, side):
    def make():
        model, inputs = HF_MODELS[name]()
        mask = padding(left=side == "left")
        inputs["attention_mask"] = mask
        if "decoder_input_ids" in inputs:
            length = inputs["decoder_input_ids"].shape[1]
            mask = mask[:, -length:] if side == "left" else mask[:, :length]
            inputs["decoder_attention_mask"] = mask
        return model, inputs, mask.bool()

    compare(make)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_packed_sequences_do_not_see_each_other(name):
    model, inputs = HF_MODELS[name]()
    model = implemented(model, "fusedformer")
    tokens = inputs["input_ids"][:1]
    positions = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None]
    packed = model(tokens, position_ids=positions).logits
    alone = torch.cat([model(part).logits for part in (tokens[:, :9], tokens[:, 9:])], 1)
    truth = implemented(model, "sdpa", torch.float64)(tokens, position_ids=positions).logits
    assert_within_bound("packed", packed, alone, truth)


def test_a_mask_of_the_users_own():
    """4-d, bool: taken as it is, without the causal rule."""
    model, inputs = HF_MODELS["gpt2"]()
    inputs["attention_mask"] = torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.5
    inputs["attention_mask"][..., 0] = True
    truth, ours = (
        output(implemented(model, name, dtype), inputs)
        for name, dtype in (("sdpa", torch.float64), ("fusedformer", torch.float32))
    )
    assert_within_bound("logits", ours, output(implemented(model, "sdpa"), inputs), truth)


# --- What the kernels are given -------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """(key, mask, key_lengths, causal) of every call of attention."""
    seen = []

    def spy(name, query, key, value, mask, key_lengths, causal, *args, **kwargs):
        seen.append((key, mask, key_lengths, causal))
        return run(name, query, key, value, mask, key_lengths, causal, *args, **kwargs)

    run = hf.checked_attention
    monkeypatch.setattr(hf, "checked_attention", spy)
    return seen


def test_right_padding_is_lengths_and_left_padding_one_row(calls):
    for name, causal in (("gpt2", "first"), ("bert", False)):
        model, inputs = HF_MODELS[name]()
        model = implemented(model, "fusedformer")
        for left in (False, True):
            calls.clear()
            model(**inputs, attention_mask=padding(left))
            for _, mask, lengths, rule in calls:
                assert rule == causal
                assert lengths.tolist() == ([LENGTH] * BATCH if left else [LENGTH, 14, 5])
                assert mask is None if not left else mask.shape == (BATCH, 1, 1, LENGTH)


def test_no_padding_is_no_mask(calls):
    for name in ("gpt2", "bert"):
        model, inputs = HF_MODELS[name]()
        implemented(model, "fusedformer")(**inputs, attention_mask=torch.ones(BATCH, LENGTH))
    assert all(mask is None and lengths is None for _, mask, lengths, _ in calls)


def test_a_sliced_mask_is_used_as_it_is():
    """It no longer carries what it was made of, which says another thing now."""
    attended = padding().bool()
    mask = hf.attention_mask(BATCH, LENGTH, LENGTH, attention_mask=attended)
    assert mask.fusedformer.lengths.tolist() == [LENGTH, 14, 5]
    assert not hasattr(mask[:, :, :, :7], "fusedformer")
    assert not hasattr(mask & True, "fusedformer")


def test_grouped_queries_are_not_repeated(calls):
    model, inputs = HF_MODELS["llama"]()
    implemented(model, "fusedformer")(**inputs)
    assert {key.shape[1] for key, *_ in calls} == {2}


def test_a_learned_bias_is_not_copied_for_each_batch(calls):
    model, inputs = HF_MODELS["t5"]()
    implemented(model, "fusedformer")(**inputs, attention_mask=padding())
    biases = [mask for _, mask, _, _ in calls if mask is not None]
    assert biases
    assert all(bias.shape[:2] == (1, 4) for bias in biases)


# --- Generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["dynamic", "beams", "static", "no cache"],
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "t5", "bart"])
def test_generate(name, options):
    model, inputs = HF_MODELS[name]()
    inputs.pop("decoder_input_ids", None)
    inputs["attention_mask"] = padding(left=name in LANGUAGE_MODELS)
    generated = []
    for implementation in ("sdpa", "fusedformer"):
        model.set_attn_implementation(implementation)
        generated.append(
            model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)
        )
    assert torch.equal(*generated)
    assert generated[0].shape[1] >= 8


# --- Modes ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_dropout_is_that_of_the_reference(name):
    model, inputs = HF_MODELS[name](dropout=0.2)
    inputs["attention_mask"] = padding()
    if name == "t5":
        inputs["decoder_attention_mask"] = padding()[:, :13]

    def run(backend, dtype=torch.float32, seed=7):
        torch.manual_seed(seed)
        with use_backend(backend):
            return output(implemented(model, "fusedformer", dtype).train(), inputs)

    eager, exact = run("reference"), run("reference", torch.float64)
    for backend in ROW_BACKENDS[1:]:
        assert_within_bound(backend, run(backend), eager, exact)
    assert not torch.allclose(run("reference", seed=8), eager)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_compile_is_one_graph(name):
    model, inputs = HF_MODELS[name]()
    model = implemented(model, "fusedformer")
    inputs["attention_mask"] = padding()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exact = output(implemented(model, "sdpa", torch.float64), inputs)
    counts = padding().bool()
    assert_within_bound(
        "logits", output(compiled, inputs)[counts], output(model, inputs)[counts], exact[counts]
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_gradient_checkpointing(name, reentrant):
    """Layers that run once more in the backward drop what they dropped before."""
    model, inputs = HF_MODELS[name](dropout=0.2)
    inputs["attention_mask"] = padding()

    def run(checkpointed, dtype=torch.float32):
        one = implemented(model, "fusedformer", dtype).train()
        if checkpointed:
            one.gradient_checkpointing_enable({"use_reentrant": reentrant})
            one.enable_input_require_grads()
        torch.manual_seed(3)
        output(one, inputs).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None])

    with use_backend("reference"):
        exact = run(False, torch.float64)
    if reentrant:  # makes tensors anew, which the mask's lengths do not survive
        assert_within_bound("gradients", run(True), run(False), exact)
    else:
        assert torch.equal(run(True), run(False))


def test_autocast():
    model, inputs = HF_MODELS["gpt2"]()
    exact = output(implemented(model, "sdpa", torch.float64), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = (
            output(implemented(model, name), inputs) for name in ("fusedformer", "eager")
        )
    assert ours.dtype == eager.dtype
    assert_within_bound("logits", ours, eager, exact)


def test_saved_and_loaded(tmp_path):
    """What is saved does not ask for us; loading may."""
    model, inputs = HF_MODELS["bert"]()
    model.set_attn_implementation("fusedformer")
    model.save_pretrained(tmp_path)
    assert "fusedformer" not in (tmp_path / "config.json").read_text()
    plain = type(model).from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "sdpa"
    fused = type(model).from_pretrained(tmp_path, attn_implementation="fusedformer")
    assert torch.equal(output(fused, inputs), output(model, inputs))


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "sinks", "cache", "indices"])
def test_what_would_change_the_result_is_refused(argument):
    tensors = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    module = torch.nn.Module()
    hf.attention_forward(module, *tensors, None, **{argument: None})
    with pytest.raises(ValueError, match=r'attn_implementation="fusedformer" has no .*"eager"'):
        hf.attention_forward(module, *tensors, None, **{argument: torch.ones(2)})


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_weights_are_refused(name):
    """GPT-2, for one, does not tell its layers that it waits for them."""
    model, inputs = HF_MODELS[name]()
    model.set_attn_implementation("fusedformer")
    with pytest.raises(ValueError, match=r"never makes .*set_attn_implementation\(.eager.\)"):
        model(**inputs, output_attentions=True)
    output(model, inputs)  # nothing of it stays


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_models_with_caps_or_sinks_are_refused(name):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    }  # fmt: skip
    if name == "gemma2":
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes))
    else:
        config = transformers.GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)
        model = transformers.GptOssForCausalLM(config)
    model.set_attn_implementation("fusedformer")
    with pytest.raises(ValueError, match="softcap" if name == "gemma2" else "sinks"):
        model(torch.randint(VOCABULARY, (1, 5)))
