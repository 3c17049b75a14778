"""Trainers of sentence-transformers with a method's loss: its parameters move, its budget is met, training resumes."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset

from support.families import FAMILIES
from support.tiny import save_tiny, tiny_tokenizer
from support.toy import FILLERS
from thresher import LTP, ToP, TopK, dense, prune
from thresher.training.sentence_transformers import PruningMixin

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries that it opens
    from sentence_transformers import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sentence_transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*unauthenticated requests.*"),
]
TEXTS = [" ".join(FILLERS[(i * k) % 6] for k in range(1, 4 + i % 9)) for i in range(32)]
PAIRS = Dataset.from_dict({"anchor": TEXTS, "positive": [f"wheat {text}" for text in TEXTS]})


class EmbedderTrainer(PruningMixin, SentenceTransformerTrainer):
    pass


class RankerTrainer(PruningMixin, CrossEncoderTrainer):
    pass


@pytest.fixture
def embedder(tmp_path):
    FAMILIES["bert"].build(max_position_embeddings=128).bert.save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    return SentenceTransformer(str(tmp_path / "encoder"), device="cpu")


def arguments(folder, kind=SentenceTransformerTrainingArguments, **options):
    given = {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 4}
    given |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return kind(output_dir=str(folder), **given | options)


def trainer_of(embedder, folder, loss=MultipleNegativesRankingLoss, **options):
    args = arguments(folder, **options)
    return EmbedderTrainer(embedder, args, PAIRS, PAIRS, loss=loss(embedder), calibration_texts=TEXTS)


def test_an_embedder_learns_what_to_drop(embedder, tmp_path):
    prune(embedder, LTP(target_flops=0.5, pooling="survivors"))
    pruner = embedder[0].auto_model.token_pruner
    before = pruner.threshold.detach().clone()
    trainer = trainer_of(embedder, tmp_path)
    trainer.train()
    assert (pruner.threshold != before).any()
    assert trainer.reached["flops_fraction"] == pytest.approx(0.5, abs=0.05)
    logged = [line for line in trainer.state.log_history if "flops_fraction" in line]
    assert logged and all(0 < line["flops_fraction"] <= 1 for line in logged)
    pruned = embedder.encode(TEXTS)
    with dense(embedder):
        assert abs(embedder.encode(TEXTS) - pruned).max() > 1e-4


def test_a_checkpoint_brings_the_method_back(embedder, tmp_path):
    """What load_best_model_at_end loads, and what a resumed training starts from, has the method's parameters."""
    prune(embedder, LTP(target_flops=0.5))
    looks = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = trainer_of(embedder, tmp_path / "a", load_best_model_at_end=True, **looks)
    trainer.train()
    best = prune(SentenceTransformer(trainer.state.best_model_checkpoint, device="cpu"))
    assert abs(best.encode(TEXTS) - embedder.encode(TEXTS)).max() <= 1e-5
    own = embedder[0].auto_model.token_pruner
    with torch.no_grad():
        own.threshold.fill_(7.0)
    trainer.saved_model(str(tmp_path / "a" / "checkpoint-4"))
    again = trainer_of(embedder, tmp_path / "a", **looks)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert again.state.global_step == 8 and own.threshold.max() < 7


def test_a_ranker_with_the_ranking_of_its_teacher(tmp_path):
    folder = str(save_tiny(tmp_path / "ranker", num_labels=1, max_position_embeddings=128))
    model, teacher = CrossEncoder(folder, device="cpu"), CrossEncoder(folder, device="cpu")
    prune(model, ToP(target_flops=0.9))
    pairs = [(text, f"wheat {text}") for text in TEXTS]
    rows = Dataset.from_dict({"a": TEXTS, "b": [b for _, b in pairs], "label": [float(i % 2) for i in range(32)]})
    args = arguments(tmp_path / "out", CrossEncoderTrainingArguments)
    given = {"loss": BinaryCrossEntropyLoss(model), "calibration_texts": pairs}
    with pytest.raises(ValueError, match="distils a teacher's ranking: pass teacher="):
        RankerTrainer(model, args, rows, **given)
    trainer = RankerTrainer(model, args, rows, teacher=teacher, **given)
    trainer.train()
    assert trainer.reached["flops_fraction"] == pytest.approx(0.9, abs=0.05)
    assert not hasattr(teacher[0].auto_model, "token_pruner")
    before = model.predict(pairs)
    model.save_pretrained(str(tmp_path / "saved"))
    assert abs(prune(CrossEncoder(str(tmp_path / "saved"), device="cpu")).predict(pairs) - before).max() <= 1e-5


def test_what_cannot_be_trained_is_refused(embedder, tmp_path):
    with pytest.raises(ValueError, match="needs a pruned model"):
        trainer_of(embedder, tmp_path)
    prune(embedder, TopK(keep=0.5))
    with pytest.raises(ValueError, match="calibration_texts is empty"):
        EmbedderTrainer(
            embedder,
            arguments(tmp_path),
            PAIRS,
            loss=MultipleNegativesRankingLoss(embedder),
            calibration_texts=[],
        )
    with pytest.warns(UserWarning, match="replaces it"):
        prune(embedder, LTP(target_flops=0.5))
    with pytest.raises(ValueError, match="runs the model without gradients"):
        trainer_of(embedder, tmp_path, CachedMultipleNegativesRankingLoss).train()
