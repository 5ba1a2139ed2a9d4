"""The charts' sheet: each chart at its own size, and no words on top of others."""

import itertools

import pytest
from bench_pools import row

pytest.importorskip("matplotlib")

from fusedformer.benchmarks import bench_charts, charts

IMPLS = ("fused-triton", "fused-cuda", "sdpa", "sdpa-cudnn", "sdpa-flash", "flex", "compile")


@pytest.fixture
def sheet(monkeypatch, tmp_path):
    """The figure of a run's charts, laid out as it would be written."""
    found = []
    monkeypatch.setattr(charts.Figure, "savefig", lambda self, path, dpi: found.append(self))

    def make(rows):
        products = {"fp32": 50.0, "tf32": None, "fp16": 690.0, "bf16": 700.0, "fp64": 0.02}
        ceilings = {"copy_gbps": 4000.0, "matmul_tflops": products, "call_us": 4.0}
        bench_charts.png({"rows": rows, "ceilings": ceilings}, "a machine", tmp_path / "x.png")
        (figure,) = found
        figure.draw_without_rendering()
        return figure

    return make


def entries(count):
    """One of each dtype in turn; the third is the baseline, of every fourth by far the slowest."""
    return [
        row(
            impl, [900.0 if i == 2 and n % 4 == 0 else 1.0 + i] * 3, key=f"k{n}",
            title=f"attention, bf16, N = {n}, causal: forward",
            case=row(impl)["case"] | {"dtype": ("fp32", "fp16", "bf16", "fp64")[n % 4]},
        )
        for n in range(count)
        for i, impl in enumerate(IMPLS)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 9])
def test_no_words_on_others_and_none_outside(sheet, count):
    figure = sheet(entries(count))
    whole = figure.bbox
    for axes in figure.axes:
        words = [*axes.get_yticklabels(), *axes.texts, axes.title]
        legend = axes.get_legend()
        words += legend.get_texts() if legend else []
        boxes = [text.get_window_extent() for text in words if text.get_text()]
        assert boxes
        for box in boxes:
            assert whole.x0 <= box.x0, words
            assert box.x1 <= whole.x1
            assert whole.y0 <= box.y0
            assert box.y1 <= whole.y1
        texts = [text.get_window_extent() for text in axes.texts]
        if (roofline := "byte" in axes.get_xlabel()) and count > 1:
            names = [text.get_text().strip() for text in axes.texts]
            assert names == ["fp64 product", "fp32 product", "fp16, bf16 product"]
        for a, b in itertools.combinations(texts, 2):
            assert not a.overlaps(b)
        # No line through them: those of a roofline are beside it, and bars have one at 1x.
        if roofline:
            assert all(text.x0 >= axes.get_window_extent().x1 for text in texts)
            continue
        upright = [line for line in axes.lines if list(line.get_xdata()) == [1, 1]]
        assert upright
        for line in upright:
            (x, low), (_, high) = axes.transData.transform(line.get_xydata())
            for text in texts:
                assert x < text.x0 or x > text.x1 or high < text.y0 or low > text.y1
        ticks = [t.get_window_extent() for t in axes.get_yticklabels() if t.get_text()]
        ticks_below = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()]
        for labels in (ticks, ticks_below):
            for a, b in itertools.combinations(labels, 2):
                assert not a.overlaps(b)


def test_a_chart_keeps_its_size(sheet):
    """Nine entries make a tall chart and a short one: their bars are as thick."""
    tall, short = sheet(entries(9)).axes[:2]
    inches = [
        axes.get_window_extent().height / (axes.get_ylim()[1] - axes.get_ylim()[0])
        for axes in (tall, short)
    ]
    assert inches[0] == pytest.approx(inches[1], rel=0.35)
