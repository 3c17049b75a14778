"""The floor of a forward is arithmetic by hand; what is measured is remembered, and torch is left as it was."""

from __future__ import annotations

import json
import math
from itertools import cycle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from support.families import FAMILIES
from thresher import TopK, prune
from thresher.core.cost import LayerCost, LayerCount
from thresher.evaluation import roofline as module
from thresher.evaluation.roofline import Roofline, roofline, table

# In fp32 a MAC takes 2 ns and a weight is read in 8 ns, in bf16 0.2 ns and 4 ns.
LINE = Roofline(peak={"fp32": 1.0, "bf16": 10.0}, bandwidth=0.5, threads=2, hardware="a machine")
# What the project's own machine does with one thread.
XEON = Roofline(peak={"fp32": 160.0, "bf16": 1250.0, "int8": 1406.0}, bandwidth=15.0, threads=1, hardware="a Xeon")
COSTS = [LayerCost(attention=1000, ffn=3000, width=10), LayerCost(attention=500, ffn=700, width=20)]
NS = 1e-6  # ms


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder, and measuring that takes no time: the threads it finds are what it reports."""
    rates = cycle((1.0, 2.0, 3.0))
    monkeypatch.setattr(module, "_peak", lambda *_: next(rates))
    monkeypatch.setattr(module, "_bandwidth", lambda *_: float(torch.get_num_threads()))
    return tmp_path


@pytest.mark.parametrize(
    "tokens, precision, expected",
    [
        # 8 tokens, 6^2 + 2^2 = 40 pairs: arithmetic everywhere
        ([6, 2], "fp32", 2 * (8 * 1000 + 2 * 10 * 40) + 2 * (8 * 3000) + 2 * (8 * 500 + 2 * 20 * 40) + 2 * (8 * 700)),
        # 3 tokens: reading everywhere
        ([2, 1], "fp32", 8 * (1000 + 3000 + 500 + 700)),
        # 4 tokens are M*: both take the same time in the FFN, and the pairs make attention arithmetic
        ([4], "fp32", 2 * (4 * 1000 + 2 * 10 * 16) + 8 * 3000 + 2 * (4 * 500 + 2 * 20 * 16) + 8 * 700),
        ([6, 2], "bf16", 4 * (1000 + 3000 + 500 + 700)),
        ([60], "bf16", 0.2 * (60 * (1000 + 3000 + 500 + 700) + 2 * (10 + 20) * 3600)),
    ],
)
def test_the_floor_of_a_dense_batch_is_as_by_hand(tokens, precision, expected):
    assert LINE.floor(COSTS, torch.tensor(tokens), precision) == pytest.approx(expected * NS)


def test_the_floor_of_a_pruned_batch_is_as_by_hand():
    """Arithmetic in the first attention block alone; a score is no part of the bound."""
    many, few, one = torch.tensor([6, 2]), torch.tensor([2, 1]), torch.tensor([1, 1])
    counts = [LayerCount(many, few, scored=True), LayerCount(few, one)]
    expected = 2 * (8 * 1000 + 2 * 10 * 40) + 8 * (3000 + 500 + 700)
    assert LINE.floor(COSTS, counts) == pytest.approx(expected * NS)
    soft = [LayerCount(c.n_attention.float().requires_grad_(), c.n_ffn, c.scored) for c in counts]
    assert LINE.floor(COSTS, soft) == pytest.approx(expected * NS)
    with pytest.raises(ValueError, match="argument"):
        LINE.floor(COSTS, counts[:1])


def test_bert_base_is_read_in_the_time_that_the_reference_gives():
    """85 million weights: 22.7, 11.3 and 5.7 ms at 15 GB/s."""
    costs = [LayerCost(4 * 768 * 768, 2 * 768 * 3072, 768)] * 12
    times = [XEON.floor(costs, torch.tensor([1]), precision) for precision in XEON.peak]
    assert times == pytest.approx([22.65, 11.32, 5.66], abs=0.01)


def test_the_floor_of_a_model_that_was_pruned():
    model = prune(FAMILIES["bert"].build(), TopK(keep=0.5, at=(1, 2)))
    FAMILIES["bert"].run(model, FAMILIES["bert"].batch((12, 7), width=20))
    record, dense = model.token_pruner.record, torch.tensor([12, 7])
    quick = Roofline(peak={"fp32": 1.0}, bandwidth=math.inf, threads=1, hardware="")  # arithmetic alone
    scores = 32 * (12**2 + 7**2 + 6**2 + 4**2)
    assert quick.floor(record.costs, record.counts) == pytest.approx(2 * NS * (record.used.item() - scores))
    assert quick.floor(record.costs, dense) == pytest.approx(2 * NS * record.dense.item())
    slow = Roofline(peak={"fp32": math.inf}, bandwidth=1.0, threads=1, hardware="")
    assert slow.floor(record.costs, record.counts) == slow.floor(record.costs, dense) > 0


rows = st.lists(st.integers(1, 60), min_size=1, max_size=4)


@given(st.data(), rows, st.sampled_from(("fp32", "bf16")))
def test_fewer_tokens_never_have_a_higher_floor(data, tokens, precision):
    left, counts = tokens, []
    for _ in COSTS:
        after = [data.draw(st.integers(1, n)) for n in left]
        counts.append(LayerCount(torch.tensor(left), torch.tensor(after), scored=True))
        left = after
    least, dense = LINE.floor(COSTS, torch.tensor(left), precision), LINE.floor(COSTS, torch.tensor(tokens), precision)
    assert least <= LINE.floor(COSTS, counts, precision) <= dense
    assert dense < LINE.floor(COSTS, torch.tensor([n + 60 for n in tokens]), precision)


def test_below_the_break_even_fewer_tokens_gain_nothing():
    assert (LINE.break_even("fp32"), LINE.break_even("bf16")) == (4, 20)
    costs = [LayerCost(attention=1000, ffn=3000, width=0)]
    times = [LINE.floor(costs, torch.tensor([n]), "bf16") for n in (1, 19, 20, 21, 40)]
    assert times == pytest.approx([16_000 * NS] * 3 + [16_800 * NS, 32_000 * NS])
    assert [XEON.break_even(name) for name in XEON.peak] == pytest.approx([21.3, 83.3, 46.9], abs=0.05)


def test_a_precision_that_was_not_measured_is_an_error_that_says_what_there_is():
    for precision in ("int8", "fp8"):
        for ask in (LINE.break_even, lambda p: LINE.floor(COSTS, torch.tensor([1]), p)):
            with pytest.raises(ValueError, match=f"'{precision}' was not measured here; there is fp32, bf16$"):
                ask(precision)


def test_the_table_and_the_dictionary_say_the_same():
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table(XEON))
    shown = captured.get()
    for cells in (("fp32", "160", "15.0", "21"), ("bf16", "1,250", "15.0", "83"), ("int8", "1,406", "15.0", "47")):
        assert any(line.split() == list(cells) for line in shown.splitlines()), shown
    assert shown.splitlines()[0].strip() == "a Xeon; 1 thread"
    told = json.loads(json.dumps(XEON.to_dict()))
    assert told["peak"] == XEON.peak and told["bandwidth"] == 15 and told["threads"] == 1
    assert told["break_even"] == pytest.approx({"fp32": 21.3, "bf16": 83.3, "int8": 46.9}, abs=0.05)


def test_it_is_measured_once_for_each_number_of_threads(cache):
    first = roofline(cache=cache)
    assert first.peak == {"fp32": 1, "bf16": 2, "int8": 3} and first.threads == torch.get_num_threads() == 1
    assert "torch" in first.versions and first.hardware and first.date
    (file,) = cache.iterdir()
    changed = json.loads(file.read_text()) | {"bandwidth": 77.0}
    file.write_text(json.dumps(changed))
    assert roofline(1, cache=cache) == Roofline(**changed), "the file is read"
    other = roofline(2, cache=cache)
    assert (other.threads, other.bandwidth) == (2, 2), "measured with the threads that were asked for"
    assert len(list(cache.iterdir())) == 2 and json.loads(file.read_text()) == changed
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b'{"peak": {}}', b'{"speed": 1}', b"\xff\xfe"])
def test_a_broken_file_is_measured_again(cache, content):
    roofline(cache=cache)
    (file,) = cache.iterdir()
    file.write_bytes(content)
    found = roofline(cache=cache)
    assert found.bandwidth == 1 and Roofline(**json.loads(file.read_text())) == found
    assert list(cache.iterdir()) == [file], "nothing is left aside"


def test_the_environment_names_the_folder(cache, monkeypatch):
    monkeypatch.setenv("THRESHER_CACHE", str(cache / "deep" / "inside"))
    roofline()
    assert len(list((cache / "deep" / "inside").iterdir())) == 1


def test_a_failure_leaves_the_threads_as_they_were_and_no_file(cache, monkeypatch):
    def fail(*_):
        assert torch.get_num_threads() == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_bandwidth", fail)
    with pytest.raises(KeyboardInterrupt):
        roofline(2, cache=cache)
    assert torch.get_num_threads() == 1 and not list(cache.iterdir())


def test_what_cannot_be_measured_is_refused(cache):
    with pytest.raises(ValueError, match="threads=0"):
        roofline(0, cache=cache)
    with pytest.raises(ValueError, match="device='tpu': expected cpu or cuda"):
        roofline(device="tpu", cache=cache)


def test_a_product_that_is_missing_leaves_its_precision_out(monkeypatch, tmp_path):
    def missing(*_):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(torch, "_int_mm", missing)
    monkeypatch.setattr(module, "_bandwidth", lambda *_: 1.0)
    assert list(roofline(seconds=0.01, cache=tmp_path).peak) == ["fp32", "bf16"]


def test_the_peak_is_that_of_the_fastest_run_of_the_best_product(monkeypatch):
    """Runs of 2 and 3 ms of a small product, then of 40 and 50 ms of one 16 times as large, which ends it."""
    times = iter((0.002, 0.003, 0.040, 0.050))
    monkeypatch.setattr(module, "_timed", lambda *_: next(times))
    monkeypatch.setattr(module, "_at_least", lambda least, end: range(least))
    assert module._peak(torch.float32, 1.0, "cpu") == pytest.approx(2 * 256**3 / 0.002 / 1e9)
    assert next(times, None) is None


def test_the_bandwidth_heeds_neither_pieces_that_are_cached_nor_interruptions(monkeypatch):
    """Of 32 pieces of 8 MiB most are read in 4 ms."""
    times = cycle([0.001] * 8 + [0.004] * 16 + [0.100] * 8)
    monkeypatch.setattr(module, "_timed", lambda *_: next(times))
    monkeypatch.setattr(module, "_caches", lambda device: 0)
    assert module._bandwidth(0.0, "cpu") == pytest.approx(2**23 / 0.004 / 1e9)


def test_what_is_read_is_several_times_what_the_caches_hold(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_timed", lambda run, device: seen.append(run.args[0]) or 1.0)
    monkeypatch.setattr(module, "_caches", lambda device: 80 * 2**20)
    module._bandwidth(0.0, "cpu")
    spaces = {piece.data_ptr(): piece.nbytes for piece in seen}
    assert sum(spaces.values()) == 320 * 2**20 and len(spaces) == 32
    assert [piece.data_ptr() for piece in seen[:64]] == 2 * list(spaces), "in turn"


def test_this_machine(tmp_path):
    """Nothing is claimed of the numbers, for what else runs here is not known."""
    found = roofline(seconds=0.05, cache=tmp_path)
    assert {"fp32"} <= set(found.peak) <= {"fp32", "bf16", "int8"}
    for rate in (*found.peak.values(), found.bandwidth, *map(found.break_even, found.peak)):
        assert math.isfinite(rate) and rate > 0
    assert torch.get_num_threads() == found.threads == 1
    assert roofline(seconds=0.05, cache=tmp_path) == found
