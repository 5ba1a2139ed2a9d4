"""Every public op and module compiled and exported."""

import io
import logging

import pytest
import torch
from mode_cases import CASES, Call, results
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import fusedformer

pytestmark = pytest.mark.usefixtures("on_device", "fresh_compiler")

nn = fusedformer.nn
# Without the stacks, which are loops over the layers.
every = pytest.mark.parametrize("name", [n for n in CASES if not n.endswith(("coder", "former"))])


def make(name: str) -> tuple[torch.nn.Module, list[tuple]]:
    """A module, and inputs of three sizes."""
    torch.manual_seed(0)
    module, inputs = CASES[name]
    return module(), [inputs(batch, length) for batch, length in ((3, 7), (3, 19), (5, 12))]


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.slow
@every
def test_compiles_as_one_graph(name):
    """The same numbers, dropout included, and the same graph for every size."""
    module, sizes = make(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = set()
    for inputs in sizes:
        expected = results(module, inputs)
        for found, wanted in zip(results(compiled, inputs), expected, strict=True):
            torch.testing.assert_close(found, wanted)
        counts.add(counter.frame_count)
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("norm_first", "training"),
    [
        (False, True),
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("library", [nn, pytest.param(torch.nn, marks=pytest.mark.slow)])
def test_six_layers_share_a_graph(library, norm_first, training):
    """One for all layers; a second, of dynamic shapes, for all lengths after the first."""
    options = {"batch_first": True, "norm_first": norm_first}
    layer = library.TransformerEncoderLayer(16, 2, 32, 0.1, **options)
    stack = library.TransformerEncoder(layer, 6, enable_nested_tensor=False).train(training)
    if library is torch.nn:
        fusedformer.fuse(stack)
    counter = CompileCounter()
    for layer in stack.layers:
        layer.compile(fullgraph=True, backend=counter)
    graphs = []
    for length in (8, 9, 12, 17):
        x = torch.randn(2, length, 16, requires_grad=True)  # as each layer after the first gets it
        stack(x, is_causal=True)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2]


@pytest.mark.slow
def test_inductor():
    """Without dropout: Inductor draws other numbers than eager."""
    model = nn.Transformer(16, 2, 1, 1, 32, 0.0, "gelu", batch_first=True)
    inputs = (torch.randn(2, 7, 16), torch.randn(2, 9, 16))
    compiled = torch.compile(model, fullgraph=True)
    expected = results(model, inputs)
    for found, wanted in zip(results(compiled, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


# --- torch.export ---------------------------------------------------------------------------------


@pytest.mark.slow
@every
def test_export_with_dynamic_shapes(name):
    """Batch and length are free; the program is saved, loaded, and drops as the module does."""
    module, sizes = make(name)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=4096)
    module = Call(module)
    # Logits are (batch, classes, length), all others (batch, length, ...).
    places = [2 if x.dim() == 3 and x.shape[2] == 7 else 1 for x in sizes[0]]
    shapes = tuple({0: batch, place: length} for place in places)
    program = torch.export.export(module, sizes[0], dynamic_shapes=(shapes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for inputs in sizes:
        for function in (program.module(), again):
            torch.manual_seed(5)
            expected = module(*inputs)
            torch.manual_seed(5)
            torch.testing.assert_close(function(*inputs), expected)
    program.run_decompositions()


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    """Compiled ahead of time; it runs where fusedformer has been imported."""
    model = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True).eval()
    x = torch.randn(2, 9, 16)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=4096)
    logging.getLogger("torch").setLevel(logging.ERROR)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch, 1: length},))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "layer.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        longer = torch.randn(3, 21, 16)
        torch.testing.assert_close(loaded(longer), model(longer))
