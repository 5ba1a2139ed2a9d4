"""Whole models: training steps beside the same model in PyTorch, and decoding.

The operations of a training step are those that the model needs (transformer/train_flops.py);
bytes are not counted. Nothing is compared with float64: the models' own tests do that.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedformer.benchmarks import model_steps
from fusedformer.benchmarks.ops import common
from fusedformer.benchmarks.ops.common import Held, Impl, Op, Sizes
from fusedformer.transformer import train_flops
from fusedformer.transformer.generate import generate
from fusedformer.transformer.gpt import GPT, GPTConfig
from fusedformer.transformer.seq2seq import TransformerConfig

STEP = "step"


@dataclass(frozen=True)
class Case(Sizes):
    """A model of some sizes on ``batch`` sequences of ``seq`` tokens; of decoding, written ones."""

    batch: int
    seq: int
    layers: int
    width: int
    heads: int
    vocab: int
    dtype: str = "fp32"
    device: str = "cpu"
    dropout: float = 0.1
    dropout_p: float = 0.0  # no mask is compared

    def gpt(self) -> GPTConfig:
        """The configuration of a GPT of these sizes."""
        return GPTConfig(
            vocab_size=self.vocab, max_length=self.seq + 1, d_model=self.width, layers=self.layers,
            heads=self.heads, d_ff=4 * self.width, dropout=self.dropout,
        )  # fmt: skip

    def transformer(self) -> TransformerConfig:
        """The configuration of an encoder-decoder of these sizes, with torch's choices."""
        return TransformerConfig(
            vocab_size=self.vocab, max_length=self.seq + 1, d_model=self.width, layers=self.layers,
            heads=self.heads, d_ff=4 * self.width, dropout=self.dropout, final_norms=True,
            ff_dropout=self.dropout,
        )  # fmt: skip


def _no_inputs(case: Case, seed: int = 0) -> Held:
    return Held([], torch.zeros((), device=case.device))


def _gpt(provider: str, compiled: bool, optimize: bool, case: Case) -> Callable[[], Tensor]:
    dtype = common.DTYPES[case.dtype]
    return model_steps.gpt_step(
        provider, case.batch, case.seq, dtype, case.device, case.gpt(), compiled=compiled,
        optimize=optimize,
    )  # fmt: skip


def _transformer(provider: str, compiled: bool, case: Case) -> Callable[[], Tensor]:
    dtype = common.DTYPES[case.dtype]
    return model_steps.transformer_step(
        provider, case.batch, case.seq, dtype, case.device, case.transformer(), compiled=compiled
    )


def _steps(ours: str, theirs: str, make: Callable[..., Callable[[], Tensor]]) -> dict[str, Impl]:
    """A step of ours and of PyTorch, each as it is and through torch.compile.

    Args:
        ours, theirs: what each is, in a line.
        make: a provider, whether to compile, and a problem -> the step.
    """
    by_torch = "the same through torch.compile"
    return {
        "fused": Impl(ours, functools.partial(make, "fusedformer", False)),
        "torch": Impl(theirs, functools.partial(make, "torch", False)),
        "fused-compile": Impl(
            f"fused: {by_torch}", functools.partial(make, "fusedformer", True), compiles=True
        ),
        "compile": Impl(
            f"torch: {by_torch}", functools.partial(make, "torch", True), compiles=True
        ),
    }


def _decode(use_cache: bool, case: Case) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    model = GPT(case.gpt()).to(case.device, common.DTYPES[case.dtype]).eval()
    prompt = torch.randint(case.vocab, (case.batch, 1), device=case.device)

    def call() -> Tensor:
        return generate(
            model, prompt, max_new_tokens=case.seq, temperature=0.0, use_cache=use_cache
        )[0]

    return call


def _hugging_face(case: Case) -> Callable[[], Tensor]:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=case.vocab, n_positions=case.seq + 1, n_embd=case.width, n_layer=case.layers,
        n_head=case.heads, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).to(case.device, common.DTYPES[case.dtype]).eval()
    prompt = torch.randint(case.vocab, (case.batch, 1), device=case.device)
    full = torch.ones_like(prompt)
    options = {"max_new_tokens": case.seq, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(prompt, attention_mask=full, **options)[:, 1:]


def _op(name: str, impls: dict[str, Impl], eager: str, flops: Callable[[Case], float]) -> Op:
    return Op(
        name=name,
        case=Case,
        inputs=_no_inputs,
        impls=impls,
        eager=eager,
        flops=lambda case, mode: flops(case),
        moved=lambda case, mode: 0.0,
        seeded=lambda case, seed, backend=None: impls["fused"].make(case),
        compare=None,
        checked=lambda case: case,
        tiny=lambda case: case.at(batch=1, seq=min(case.seq, 8)),
        peak=lambda impl, case: 0.0,
        x="seq",
        modes=(STEP,),
    )


OPS = (
    _op(
        "gpt_step",
        _steps(
            "fusedformer.GPT: forward, loss and backward",
            "the same in PyTorch, on its scaled_dot_product_attention",
            lambda provider, compiled, case: _gpt(provider, compiled, False, case),
        ),
        "torch",
        lambda case: train_flops.gpt(case.gpt(), case.batch, case.seq),
    ),
    _op(
        "gpt_training",
        _steps(
            "fusedformer.GPT: forward, loss, backward and AdamW",
            "the same in PyTorch, on its scaled_dot_product_attention",
            lambda provider, compiled, case: _gpt(provider, compiled, True, case),
        ),
        "torch",
        lambda case: train_flops.gpt(case.gpt(), case.batch, case.seq),
    ),
    _op(
        "transformer_step",
        _steps(
            "fusedformer.Transformer: forward, loss, backward and AdamW",
            "the same on torch.nn.Transformer",
            _transformer,
        ),
        "torch",
        lambda case: train_flops.seq2seq(case.transformer(), [(case.seq, case.seq)] * case.batch),
    ),
    _op(
        "gpt_decode",
        {
            "fused": Impl(
                "generate() with fusedformer.GPT and its cache", functools.partial(_decode, True)
            ),
            "no-cache": Impl(
                "the same without a cache, every token anew", functools.partial(_decode, False)
            ),
            "hugging-face": Impl(
                "GPT2LMHeadModel.generate of transformers, with its cache",
                _hugging_face,
                common.needs("transformers", gpu=False),
                "transformers",
            ),
        },
        "no-cache",
        lambda case: 0.0,
    ),
)


def sizes(quick: bool, device: str) -> dict[str, list[Case]]:
    """The problems of the suite, by op: a model that the device trains in practice."""
    if quick:
        small = Case(2, 16, 1, 32, 2, 64, device=device)
        return {op.name: [small] for op in OPS}
    if device == "cuda":
        gpt2 = Case(8, 1024, 12, 768, 12, 50257, "bf16", device)
        base = Case(32, 512, 6, 512, 8, 37000, "bf16", device)
        return {
            "gpt_step": [gpt2, gpt2.at(dropout=0.0)],
            "gpt_training": [gpt2.at(batch=32)],
            "transformer_step": [base],
            "gpt_decode": [gpt2.at(seq=512)],
        }
    gpt = Case(1, 512, 4, 256, 4, 8192, device=device)
    return {
        "gpt_step": [gpt, gpt.at(dropout=0.0), gpt.at(dtype="bf16")],
        "gpt_training": [gpt],
        "transformer_step": [gpt.at(batch=4, seq=128)],
        "gpt_decode": [gpt.at(seq=128)],
    }
