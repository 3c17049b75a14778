"""A graph answers as its model at shapes that it was not traced at; tokens that leave are not in its tensors."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, ViTConfig, pipeline
from transformers import ViTForImageClassification as ViT
from typer.testing import CliRunner

from support.families import FAMILIES, NO_DROPOUT, TEXT, VISION
from support.methods import METHODS
from support.tiny import tiny_tokenizer
from thresher import PoWERBERT, Threshold, ToP, TopK, export, load_runtime, prune
from thresher.cli import app as cli
from thresher.data.embedder import Embedder, Pooling, Projection
from thresher.experiments.describe import describe
from thresher.exporting import export as exporting
from thresher.exporting.export import _spec_of, completed, inputs_of
from thresher.methods.parts.rank_bins import within
from thresher.serving.score import Scorer

TEXTS = ["the farmer and the grain", "thresh", "the grain and the script and the farmer and the wheat", "chaff"]
SHAPES = ((1, 1), (1, 2), (1, 7), (5, 9), (2, 33), (1, 64))


def classifier(**options) -> BertForSequenceClassification:
    """A tiny model whose scores are far apart, so that no rounding decides which token leaves."""
    return FAMILIES["bert"].build(pad_token_id=0, **options)


def differs(model, graph) -> float:
    """The largest difference of logits, at several shapes and with a row that holds no token."""
    batches = [inputs_of(model, graph.tokenizer, *shape) for shape in SHAPES]
    batches[-1]["attention_mask"][:] = 0
    with torch.no_grad():
        return max(float((model(**b).logits - graph.forward(**b)["logits"]).abs().max()) for b in batches)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A pruned classifier with its tokenizer, and the folder of its ONNX graph."""
    model = prune(classifier(num_labels=3, vocab_size=len(tiny_tokenizer())), TopK(keep=0.6))
    folder = tmp_path_factory.mktemp("graphs") / "topk"
    spec = export(model, folder, tokenizer=tiny_tokenizer(), max_length=64)
    return model, folder, spec


# --- the property ----------------------------------------------------------------------------------------------------
def test_a_graph_answers_as_its_model_at_other_shapes(exported):
    model, folder, spec = exported
    assert spec["difference"] <= 1e-4
    assert differs(model, load_runtime(folder)) <= 1e-4
    assert not model.training and model.token_pruner.hooks.layout == "auto"


def test_a_graph_of_a_reranker_keeps_the_query(tmp_path):
    method = TopK(keep=0.3, at=(0, 1), protect={"until": [3]})
    model = prune(classifier(num_labels=1, vocab_size=len(tiny_tokenizer())), method)
    assert export(model, tmp_path / "graph", tokenizer=tiny_tokenizer(), max_length=64)["difference"] <= 1e-4
    graph, rows = load_runtime(tmp_path / "graph"), inputs_of(model, tiny_tokenizer(), 3, 40)
    with torch.no_grad():
        wanted = model.eval()(**rows).logits
    left = model.token_pruner.record.sites[-1].keep.sum(1)
    assert (rows["input_ids"][:, 10] == 3).all() and left.tolist()[0] >= 11, "the first eleven tokens of each"
    torch.testing.assert_close(graph.forward(**rows)["logits"], wanted, atol=1e-4, rtol=1e-4)


def voting(method: TopK, **options) -> BertForSequenceClassification:
    return prune(classifier(num_labels=1, vocab_size=len(tiny_tokenizer()), **options), method)


def differs_by_voters(model, graph) -> float:
    """The largest difference over batches whose rows have queries of other lengths, at either side, at once or not at
    all."""
    worst = 0.0
    for at, side in (((3, 9, 14), 1), ((1, 2, 3), -1), ((0, 5, 30), 1)):
        rows = inputs_of(model, tiny_tokenizer(), 3, 40)
        rows["input_ids"] = rows["input_ids"].masked_fill(rows["input_ids"] == 3, 4)
        for row, place in enumerate(at):
            if place:  # a row without has no query: all of it is one
                rows["input_ids"][row, place] = 3
        given = rows
        if side < 0:  # padding on the left, the tokens in their order
            given = {
                name: torch.stack([left(a, b) for a, b in zip(x, rows["attention_mask"], strict=True)])
                for name, x in rows.items()
            }
        with torch.no_grad():
            expected = model(**given).logits
        worst = max(worst, float((graph.forward(**given)["logits"] - expected).abs().max()))
    return worst


def left(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A padded row with its padding in front."""
    return torch.cat([x[mask == 0], x[mask == 1]])


def softmaxes(folder, feed: dict) -> list[tuple[int, ...]]:
    """The shapes of all probabilities that an ONNX graph makes of some inputs."""
    import onnx
    import onnxruntime

    graph = onnx.load(folder / "model.onnx")
    made = [node.output[0] for node in graph.graph.node if node.op_type == "Softmax"]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in made)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return [x.shape for x in session.run(made, {i.name: feed[i.name].numpy() for i in session.get_inputs()})]


VOTING = {
    "query": lambda: TopK(keep=0.4, at=(0, 1), protect={"until": [3]}),
    "class": lambda: TopK(keep=0.4, at=(0, 1), votes="protected"),
    "ids": lambda: TopK(keep=0.4, at=(0, 1), protect={"ids": [3]}, votes="protected"),
    "threshold": lambda: Threshold(0.8, at=(0, 1), protect={"until": [3]}),
    "powerbert": lambda: PoWERBERT(keep=0.4, at=(0, 1), protect={"until": [3]}),
}


@pytest.mark.parametrize("name", ["query", "class"])
def test_few_rows_of_probabilities_are_in_a_graph_where_few_vote(name, tmp_path):
    model = voting(VOTING[name]())
    export(model, tmp_path / "graph", tokenizer=tiny_tokenizer(), max_length=64)
    assert differs_by_voters(model, load_runtime(tmp_path / "graph")) <= 1e-5
    rows = inputs_of(model, tiny_tokenizer(), 2, 40)  # a query of eleven tokens
    shapes, layers = softmaxes(tmp_path / "graph", rows), model.config.num_hidden_layers
    votes = [shape for shape in shapes if shape[2] != shape[3]]
    assert len(shapes) == layers + 2 and [shape[2] for shape in votes] == [11 if name == "query" else 1] * 2
    assert votes[0][3] == 40 > votes[1][3]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("name", VOTING)
def test_voters_anywhere_in_every_format(name, format, tmp_path):
    model = voting(VOTING[name]())
    export(model, tmp_path / "graph", tokenizer=tiny_tokenizer(), format=format, max_length=64)
    graph = load_runtime(tmp_path / "graph")
    assert differs_by_voters(model, graph) <= 1e-5
    if format == "openvino":
        import openvino

        kinds = [
            op.get_type_name() for op in openvino.Core().read_model(tmp_path / "graph" / "openvino_model.xml").get_ops()
        ]
        assert kinds.count("ScaledDotProductAttention") == model.config.num_hidden_layers


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8", "bf16"])
@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_every_format(method, format, precision, tmp_path):
    if precision not in exporting.FORMATS[format]:
        pytest.skip("refused, see below")
    model = prune(classifier(), METHODS[method][1]())
    calibration = [inputs_of(model, None, 1, n) for n in (8, 16, 40)]
    spec = export(model, tmp_path / "graph", format=format, precision=precision, calibration=calibration)
    if precision == "fp32":
        assert spec["difference"] <= 1e-4
        assert differs(model, load_runtime(tmp_path / "graph")) <= 1e-4
    else:
        assert 0 < spec["difference"] < 5


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "albert", "mpnet", "modernbert", "deberta"])
def test_every_family(family, format, tmp_path):
    source = FAMILIES[family]
    model = prune(source.build(), TopK(keep=0.6))
    export(model, tmp_path / "graph", format=format, max_length=32)
    graph = load_runtime(tmp_path / "graph")
    for lengths in ((9,), (12, 5, 3), (20, 20)):
        batch = source.batch(lengths)
        with torch.no_grad():
            assert (model(**batch).logits - graph.forward(**batch)["logits"]).abs().max() <= 1e-4


def test_dropped_tokens_are_absent_from_the_tensors(exported):
    import onnx
    import onnxruntime

    model, folder, _ = exported
    graph = onnx.load(folder / "model.onnx")
    constants = {c.name for c in graph.graph.initializer}
    linear = [node for node in graph.graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(node.output[0]) for node in linear)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    batch = inputs_of(model, tiny_tokenizer(), 1, 40)
    feed = {i.name: batch[i.name].numpy() for i in session.get_inputs()}
    shapes = [x.shape[1] for x in session.run([node.output[0] for node in linear], feed) if x.ndim == 3]
    with torch.no_grad():
        model(**batch)
    entering = [row["tokens_in"] for row in model.token_pruner.report]
    passed = [row["tokens_kept"] for row in model.token_pruner.report]
    assert sorted(set(shapes)) == sorted({*entering, *passed})
    for there, after in zip(
        entering, passed, strict=True
    ):  # q, k, v at the tokens that enter; the rest where they left
        assert there in shapes and after in shapes
    assert shapes.count(40) < len(shapes) / 2


def test_openvino_keeps_as_many_ranks():
    import openvino

    class Within(torch.nn.Module):
        def forward(self, count, on):
            return within(on, count, 32)

    count, on = torch.arange(1, 8193)[:, None], torch.tensor([0, 3, 17, 31, 32])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = openvino.compile_model(openvino.convert_model(torch.export.export(Within(), (count, on))), "CPU")
    assert torch.equal(torch.from_numpy(compiled((count.numpy(), on.numpy()))[0]).long(), within(on, count, 32))


@pytest.mark.slow
def test_a_site_that_lets_everything_stay_is_not_in_the_graph(tmp_path):
    import onnx

    model = prune(classifier(), ToP(bins=8))
    model.token_pruner.mask[1, 3:] = False
    export(model, tmp_path / "graph", max_length=64)
    kinds = [node.op_type for node in onnx.load(tmp_path / "graph" / "model.onnx", load_external_data=False).graph.node]
    assert kinds.count("TopK") == 2, "one to rank and one to drop, at one site of three"
    assert differs(model, load_runtime(tmp_path / "graph")) <= 1e-4
    assert model.token_pruner.hooks.passed == frozenset()


# --- what the user is given ------------------------------------------------------------------------------------------
def test_info_of_a_graph(exported):
    _, folder, spec = exported
    told = describe(str(folder))
    assert told["format"] == "onnx" and told["pruning"]["method"] == "topk" and told["difference"] == spec["difference"]


def test_texts_in_labels_out(exported):
    model, folder, _ = exported
    graph = load_runtime(folder)
    reference = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer(), device="cpu")
    for found, expected in zip(graph(TEXTS), reference(TEXTS), strict=True):
        assert found["label"] == expected["label"]
        assert found["score"] == pytest.approx(expected["score"], abs=1e-4)
    assert graph(TEXTS[0]) == graph([TEXTS[0]])[0]
    assert graph(TEXTS, batch_size=1) == [{**r, "score": pytest.approx(r["score"], abs=1e-5)} for r in graph(TEXTS)]
    pair = reference({"text": TEXTS[0], "text_pair": TEXTS[2]})
    assert graph(TEXTS[0], TEXTS[2])["score"] == pytest.approx(pair["score"], abs=1e-4)
    assert graph([]) == []


def test_few_widths_give_the_same_answers(exported):
    _, folder, _ = exported
    with pytest.raises(ValueError, match=r"lengths=\(16, 65\): expected numbers of tokens from 1 to 64"):
        load_runtime(folder, lengths=(16, 65))
    wide, plain = load_runtime(folder, lengths=(64, 16)), load_runtime(folder)
    assert [wide.width(n) for n in (3, 16, 17, 64, 65)] == [16, 16, 64, 64, 65]
    for a, b in zip(wide(TEXTS), plain(TEXTS), strict=True):
        assert a["label"] == b["label"] and a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_calibration_may_leave_out_what_a_model_does_not_need():
    ids = torch.tensor([[5, 6, 7]])
    names = ("input_ids", "attention_mask", "token_type_ids", "pooling_mask")
    found = completed({"input_ids": ids, "labels": torch.tensor([1])}, names)
    assert [*found] == [*names] and torch.equal(found["attention_mask"], torch.ones_like(ids))
    assert torch.equal(found["pooling_mask"], torch.ones_like(ids)) and not found["token_type_ids"].any()
    mask = torch.tensor([[1, 1, 0]])
    assert torch.equal(completed({"input_ids": ids, "attention_mask": mask}, names)["pooling_mask"], mask)


def test_masks_may_be_left_out_and_of_any_kind(exported):
    model, folder, _ = exported
    graph, ids = load_runtime(folder), inputs_of(model, tiny_tokenizer(), 1, 9)["input_ids"]
    expected = graph.forward(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    for given in ({}, {"attention_mask": torch.ones_like(ids, dtype=torch.bool)}):
        assert torch.equal(graph.forward(input_ids=ids.int(), **given)["logits"], expected)


def test_a_model_without_positions_takes_what_is_asked_for():
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    sizes = {"position_biased_input": False, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**TEXT | sizes)).eval()
    assert _spec_of(model, "onnx", "fp32", 1024)["max_length"] == 1024
    limited = classifier()
    assert _spec_of(limited, "onnx", "fp32", 9999)["max_length"] == limited.config.max_position_embeddings


def test_plain_onnxruntime_runs_it(exported):
    import onnxruntime

    model, folder, _ = exported
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = tiny_tokenizer()(TEXTS, padding=True, return_tensors="np")
    found = session.run(["logits"], {i.name: inputs[i.name] for i in session.get_inputs()})[0]
    expected = model(**tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt")).logits.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_regression_and_answers(tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes = TEXT | NO_DROPOUT | {"vocab_size": len(tokenizer), "initializer_range": 0.3}
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=1, problem_type="regression")).eval()
    export(prune(model, TopK(keep=0.6)), tmp_path / "score", tokenizer=tokenizer)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    assert load_runtime(tmp_path / "score")(TEXTS[0])["score"] == pytest.approx(model(**inputs).logits.item(), abs=1e-4)

    reader = prune(BertForQuestionAnswering(BertConfig(**sizes)).eval(), TopK(keep=0.6))
    export(reader, tmp_path / "reader", tokenizer=tokenizer, max_length=48)
    graph, question, paragraph = load_runtime(tmp_path / "reader"), TEXTS[1], " ".join(TEXTS)
    found = graph(question, paragraph)
    assert found["answer"] == paragraph[found["start"] : found["end"]] != ""
    inputs = tokenizer(question, paragraph, return_tensors="pt", return_offsets_mapping=True)
    first, last = inputs.pop("offset_mapping")[0].T
    inside = torch.tensor([part == 1 for part in inputs.sequence_ids(0)])
    with torch.no_grad():
        output = reader(**inputs)
    start, end = (x[0].masked_fill(~inside, float("-inf")).softmax(0) for x in (output.start_logits, output.end_logits))
    i, j = divmod(int((start[:, None] * end[None]).triu().argmax()), len(start))
    assert (found["start"], found["end"]) == (int(first[i]), int(last[j]))
    assert found["score"] == pytest.approx(float(start[i] * end[j]), abs=1e-4)
    with pytest.raises(ValueError, match="needs paragraphs"):
        graph(question)
    both = graph([question] * 2, [paragraph, TEXTS[0]])
    graph.tokenizer.padding_side = "left"
    assert graph([question] * 2, [paragraph, TEXTS[0]]) == both, "whatever side is padded"


@pytest.mark.slow
def test_the_command(tmp_path, exported):
    model, _, _ = exported
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    texts = "text,label\n" + "".join(f"{text},{i % 3}\n" for i, text in enumerate(TEXTS * 30))
    (tmp_path / "farm.csv").write_text(texts)
    out = tmp_path / "graph"
    line = ["export", tmp_path / "model", "--out", out, "--format", "openvino", "--max-length", "32", "--json", "-"]
    result = CliRunner().invoke(cli.app, [*map(str, line), "--precision", "int8"])
    assert result.exit_code == 2 and "--data" in result.output and not out.exists()
    result = CliRunner().invoke(cli.app, [*map(str, line), "--precision", "int8", "--data", str(tmp_path / "farm.csv")])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert row == json.loads((out / "thresher.json").read_text())
    assert (row["precision"], row["max_length"], row["pruning"]["method"]) == ("int8", 32, "topk")
    assert len(load_runtime(out)(TEXTS)) == len(TEXTS)


# --- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, said",
    [
        ({"format": "tensorrt"}, "expected onnx, openvino, executorch"),
        ({"precision": "bf16"}, "onnxruntime has no bf16"),
        ({"format": "openvino", "precision": "fp16"}, "openvino takes fp32, bf16, int8"),
        ({"format": "openvino", "precision": "int8"}, "needs inputs to calibrate on"),
    ],
)
def test_what_cannot_be_is_refused(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        export(classifier(), tmp_path / "graph", **options)
    assert not os.listdir(tmp_path)


def test_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pixel_values"):
        export(ViT(ViTConfig(**VISION)), tmp_path / "graph")


def test_nothing_is_half_written(tmp_path, monkeypatch, exported):
    model, _, _ = exported
    folder = tmp_path / "graph"

    class Exported:
        def save_pretrained(self, folder):
            (folder / "model.onnx").write_text("half")

    class Exporter:
        def export(self, *arguments, **options):
            return Exported()

    monkeypatch.setattr(exporting, "graph_exporter", lambda *_: (Exporter(), None))
    monkeypatch.setattr(exporting, "_difference", lambda *_: 0.5)
    with pytest.raises(ValueError, match=r"differ by 0\.5"):
        export(model, folder)
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(exporting, "_difference", lambda *_: 0.0)
    folder.mkdir()
    (folder / "thesis.txt").write_text("of somebody")
    with pytest.raises(ValueError, match="holds something else"):
        export(model, folder)
    assert os.listdir(tmp_path) == ["graph"] and os.listdir(folder) == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    for _ in range(2):  # a new graph takes the place of an older one
        export(model, folder)
        assert sorted(os.listdir(folder)) == ["model.onnx", "thresher.json"] and os.listdir(tmp_path) == ["graph"]


def test_a_graph_that_answers_otherwise_is_refused(tmp_path, monkeypatch):
    model = prune(classifier(), TopK(keep=0.6))
    monkeypatch.setattr(exporting, "CLOSE", 0.0)  # which no graph reaches
    with pytest.raises(ValueError, match=r"answers otherwise than the model \(logits differ by .*nothing was written"):
        export(model, tmp_path / "graph", max_length=16)
    monkeypatch.undo()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(ValueError, match="differ by nan"):
        export(model, tmp_path / "graph", max_length=16)
    assert not os.listdir(tmp_path)


def test_a_graph_without_a_tokenizer_tells_segments_apart(tmp_path):
    model = prune(classifier(), TopK(keep=0.6))
    export(model, tmp_path / "graph", max_length=32)
    graph, inputs = load_runtime(tmp_path / "graph"), inputs_of(model, None, 2, 12)
    assert set(graph.spec["inputs"]) == {"input_ids", "attention_mask", "token_type_ids"}
    assert inputs["token_type_ids"].any(), "the check of the graph sees both segments"
    plain = {name: x for name, x in inputs.items() if name != "token_type_ids"}
    with torch.no_grad():
        both, first = (model(**kinds).logits for kinds in (inputs, plain))
    assert (both - first).abs().max() > 1e-3
    for given, expected in ((inputs, both), (plain, first)):
        torch.testing.assert_close(graph.forward(**given)["logits"], expected, atol=1e-4, rtol=0)


def test_segments_are_never_dropped_in_silence(tmp_path):
    model, tokenizer = prune(classifier(vocab_size=len(tiny_tokenizer())), TopK(keep=0.6)), tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    export(model, tmp_path / "graph", tokenizer=tokenizer, max_length=32)
    graph, inputs = load_runtime(tmp_path / "graph"), inputs_of(model, None, 2, 12)
    with pytest.raises(ValueError, match="without token_type_ids: it would drop them"):
        graph.forward(**inputs)
    inputs["token_type_ids"].zero_()
    with torch.no_grad():
        torch.testing.assert_close(graph.forward(**inputs)["logits"], model(**inputs).logits, atol=1e-4, rtol=0)


def test_a_trained_model_is_not_written_over(tmp_path, exported):
    model, _, _ = exported
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "thresher.json").write_text('{"recipe": {}, "rows": []}')
    before = sorted(os.listdir(tmp_path / "model"))
    with pytest.raises(ValueError, match="holds something else"):
        export(model, tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == before


def test_a_fingerprint_tells_models_apart():
    model = classifier()
    plain = exporting.fingerprint(model)
    assert exporting.fingerprint(classifier()) == plain
    pruned = exporting.fingerprint(prune(model, TopK(keep=0.6)))
    assert len({plain, pruned, exporting.fingerprint(prune(classifier(), TopK(keep=0.5)))}) == 3
    with torch.no_grad():
        model.classifier.bias[0] += 1e-3
    assert exporting.fingerprint(model) != pruned


def test_a_fingerprint_tells_models_of_the_same_weights_apart(tmp_path):
    """Their graphs answer otherwise."""
    model = classifier()
    plain = exporting.fingerprint(model)
    changed = ({"hidden_act": "relu"}, {"layer_norm_eps": 0.1})
    others = {plain} | {exporting.fingerprint(classifier(**options)) for options in changed}
    assert len(others) == 3
    model.save_pretrained(tmp_path)
    assert exporting.fingerprint(type(model).from_pretrained(tmp_path)) == plain, "where it lies is no part of it"
    base = model.bert
    ways = Pooling(), Pooling("cls"), Pooling(normalize=False)
    assert len({exporting.fingerprint(Embedder(base, way)) for way in ways} | {exporting.fingerprint(base)}) == 4


def test_a_folder_without_a_graph_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no exported model"):
        load_runtime(tmp_path)
    (tmp_path / "thresher.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="holds no exported model"):
        load_runtime(tmp_path)


# --- embedders and rankers -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """A pruned embedder, and the folder of its graph."""
    net = FAMILIES["bert"].build(pad_token_id=0, vocab_size=len(tiny_tokenizer()), max_position_embeddings=128).bert
    embedder = Embedder(net.eval(), prompts={"query": "the "})
    prune(embedder, TopK(keep=0.5, pooling="survivors", min_tokens=4))
    folder = tmp_path_factory.mktemp("graphs") / "embedder"
    return embedder, folder, export(embedder, folder, tokenizer=tiny_tokenizer(), max_length=64)


def test_the_pooling_is_part_of_the_graph(vectors):
    embedder, folder, spec = vectors
    assert spec["difference"] <= 1e-4 and spec["pooling"] == asdict(embedder.pooling)
    runtime, tokenizer = load_runtime(folder), tiny_tokenizer()
    with torch.no_grad():
        expected = embedder(**tokenizer(TEXTS, return_tensors="pt", padding=True))
    assert expected.last_hidden_state is not None  # the states are left out of the graph alone
    found = runtime.encode(TEXTS, batch_size=3)
    assert found.shape == (4, 32) and np.abs(found - expected.sentence_embedding.numpy()).max() <= 1e-4
    assert np.abs(runtime.encode(TEXTS[1]) - found[1]).max() <= 1e-5
    assert np.abs(runtime.encode("thresh", prompt_name="query") - runtime.encode("the thresh")).max() <= 1e-5
    assert runtime.encode([]).shape == (0, 32)
    with pytest.raises(ValueError, match="the model has query"):
        runtime.encode(TEXTS, prompt_name="passage")
    with pytest.raises(ValueError, match="gives texts no labels: call encode"):
        runtime(TEXTS)
    with pytest.raises(ValueError, match="gives vectors: rank"):
        runtime.rank("wheat", TEXTS)


def test_a_graph_leaves_prompts_out_of_its_pooling(tmp_path):
    net = FAMILIES["bert"].build(pad_token_id=0, vocab_size=len(tiny_tokenizer()), max_position_embeddings=128).bert
    embedder = Embedder(net.eval(), Pooling(include_prompt=False), prompts={"query": "the farmer "})
    embedder.default_prompt, tokenizer = "query", tiny_tokenizer()
    spec = export(prune(embedder, TopK(keep=0.6)), tmp_path / "graph", tokenizer=tokenizer, max_length=64)
    runtime = load_runtime(tmp_path / "graph")
    assert spec["difference"] <= 1e-4 and "pooling_mask" in runtime.spec["inputs"]
    inputs = tokenizer([f"the farmer {text}" for text in TEXTS], return_tensors="pt", padding=True)
    places = torch.arange(inputs["input_ids"].shape[1])
    with torch.no_grad():
        expected = embedder(**inputs, pooling_mask=(places >= 3).long().expand_as(inputs["input_ids"]))
        whole = embedder(**inputs).sentence_embedding.numpy()
    expected = expected.sentence_embedding.numpy()
    assert np.abs(expected - whole).max() > 1e-3
    assert np.abs(runtime.encode(TEXTS, batch_size=3) - expected).max() <= 1e-5
    assert np.abs(Scorer(tmp_path / "graph", threads=1)(TEXTS)["embedding"] - expected).max() <= 1e-5
    plain = {name: x for name, x in inputs.items()}  # without a mask all tokens are pooled
    assert np.abs(runtime.forward(**plain)["sentence_embedding"].numpy() - whole).max() <= 1e-5


def test_a_graph_ranks(tmp_path):
    model = classifier(num_labels=1, vocab_size=len(tiny_tokenizer()), max_position_embeddings=128)
    prune(model, TopK(keep=0.6, at=(1, 2), protect={"until": [tiny_tokenizer().sep_token_id]}))
    export(model, tmp_path / "ranker", tokenizer=tiny_tokenizer(), max_length=32)
    runtime, query = load_runtime(tmp_path / "ranker"), "the farmer"
    inputs = tiny_tokenizer()([query] * 4, TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        scores = model(**inputs).logits[:, 0].sigmoid().tolist()
    ranked = runtime.rank(query, TEXTS, return_text=True, batch_size=2)
    assert [row["index"] for row in ranked] == sorted(range(4), key=lambda i: -scores[i])
    assert all(abs(row["score"] - scores[row["index"]]) <= 1e-4 for row in ranked)
    assert all(row["text"] == TEXTS[row["index"]] for row in ranked)
    best = runtime.rank(query, TEXTS, top_k=2)
    assert [row["index"] for row in best] == [row["index"] for row in ranked[:2]] and "text" not in best[0]
    assert runtime.rank(query, []) == []
    with pytest.raises(ValueError, match="the model takes 32: there is no room for a text"):
        runtime.rank("the farmer " * 20, TEXTS)
    with pytest.raises(ValueError, match="gives no vectors: encode"):
        runtime.encode(TEXTS)


def test_dense_modules_are_part_of_the_graph(tmp_path):
    net = FAMILIES["bert"].build(pad_token_id=0, vocab_size=len(tiny_tokenizer()), max_position_embeddings=128).bert
    torch.manual_seed(0)
    embedder = Embedder(net, projections=[Projection(net.config.hidden_size, 8)]).eval()
    export(prune(embedder, TopK(keep=0.6)), tmp_path / "graph", tokenizer=tiny_tokenizer(), max_length=64)
    with torch.no_grad():
        expected = embedder(**tiny_tokenizer()(TEXTS, return_tensors="pt", padding=True)).sentence_embedding.numpy()
    runtime = load_runtime(tmp_path / "graph")
    assert np.abs(runtime.encode(TEXTS) - expected).max() <= 1e-4
    assert runtime.encode([]).shape == (0, 8) and expected.shape[1] == 8


def test_classes_rank_nothing(exported):
    with pytest.raises(ValueError, match="gives 3 classes: rank"):
        load_runtime(exported[1]).rank("wheat", TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("format, precision", [("openvino", "fp32"), ("openvino", "int8"), ("onnx", "int8")])
@pytest.mark.parametrize(
    "mode, pooling",
    [(mode, "put-back") for mode in ("mean", "cls", "max", "lasttoken")]
    + [("mean", "survivors"), ("max", "survivors")],
)
def test_every_pooling_in_every_runtime(tmp_path, mode, pooling, format, precision):
    net = FAMILIES["bert"].build(pad_token_id=0, vocab_size=len(tiny_tokenizer()), max_position_embeddings=128).bert
    embedder = Embedder(net.eval(), Pooling(mode))
    prune(embedder, TopK(keep=0.6, pooling=pooling))
    calibration = [dict(tiny_tokenizer()(text, return_tensors="pt")) for text in TEXTS]
    how = {"format": format, "precision": precision, "calibration": calibration}
    export(embedder, tmp_path / "graph", tokenizer=tiny_tokenizer(), max_length=64, **how)
    with torch.no_grad():
        expected = embedder(**tiny_tokenizer()(TEXTS, return_tensors="pt", padding=True)).sentence_embedding.numpy()
    found = load_runtime(tmp_path / "graph").encode(TEXTS)
    if precision == "fp32":
        assert np.abs(found - expected).max() <= 1e-4
    else:  # sharpened weights are hard to round: alike, and not equal
        assert (found * expected).sum(1).min() > 0.5
