"""Sweep every text, vision and audio family of transformers that builds from a tiny configuration.

    python benchmarks/families.py                   # sweep all of them and write docs/models.md
    python benchmarks/families.py --only bert,vit   # some, on screen alone

A family ends as one of four: *served* under some layouts, *refused* by prune() with a reason, *failing* (prune() takes
it and a forward raises) or *lying* (it runs and differs). The last two are faults. A family is served if, for each
batch below and both attention implementations, keeping everything is the dense model, and removing half of the tokens
or uneven counts under a layout is the same as hiding them, to 1e-5 of the largest value. The weights are random and
sharpened, so that attention is not uniform and ties do not decide.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import resource
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.utils import logging

from thresher import FirstK, Threshold, TopK, prune, unprune
from tiny_models import KINDS, batches, build, families, head_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
TOLERANCE, ROUNDING = 1e-5, 1e-4  # of answers; what may be rounding between attention implementations, at most
SECONDS, MEMORY = 40, 8 << 30  # for one family
METHODS = {
    "all": lambda: TopK(keep=1.0),
    "half": lambda: TopK(keep=0.5),
    "first": lambda: FirstK(keep=0.5),
    "uneven": lambda: Threshold(threshold=1.0),
}
SKIPPED = {"auto": ("all", "first", "uneven"), "eager": ("first",)}  # what another run has shown already
BRIEF = ("padded right", "one row", "pictures", "sound", "padded sound")  # the batches under eager
LAYOUTS = ("mask", "padded", "packed", "auto")


@dataclasses.dataclass
class Verdict:
    """What became of one family."""

    family: str
    model: str
    kind: str
    worst: float = 0.0
    rounding: float = 0.0  # by which the dense model's own attention implementations differ
    runs: int = 0
    faults: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # of state "failing" or "lying"
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)  # by layout
    notes: list[str] = dataclasses.field(default_factory=list)  # warnings of prune()

    @property
    def state(self) -> str:
        """served, refused, failing or lying."""
        if self.faults:
            return "failing" if any(state == "failing" for state, _ in self.faults) else "lying"
        return "refused" if "auto" in self.refusals else "served"

    @property
    def tolerance(self) -> float:
        """What the answers may differ by: more than ``TOLERANCE`` where the dense model's own do so by rounding."""
        return max(TOLERANCE, self.rounding if self.rounding < ROUNDING else 0.0)

    @property
    def layouts(self) -> list[str]:
        """The layouts that prune() takes."""
        return [name for name in LAYOUTS if name not in self.refusals]

    @property
    def reason(self) -> str:
        """The faults, or why it is refused."""
        if self.faults:
            return "; ".join(dict.fromkeys(text for _, text in self.faults))
        if self.state == "refused":
            return self.refusals["auto"]
        own = f"its own sdpa and eager differ by {self.rounding:.1e}"
        return "; ".join([*self.notes, *([own] if self.worst > TOLERANCE else [])])


# --- answers ----------------------------------------------------------------------------------------------------------
def answers(model, batch: dict) -> dict[str, Tensor]:
    """What the model and its base say of the live tokens, by name."""
    seen: dict[str, Tensor] = {}

    def note(prefix, output):
        for key in ("logits", "last_hidden_state", "pooler_output", "encoder_last_hidden_state"):
            value = output.get(key) if hasattr(output, "get") else None
            if isinstance(value, Tensor) and value.is_floating_point():
                seen[prefix + key] = value.detach()

    base = model.base_model
    handle = base.register_forward_hook(lambda m, a, output: note("base ", output)) if base is not model else None
    try:
        with torch.no_grad():
            output = model(**batch)
    finally:
        if handle is not None:
            handle.remove()
    note("", output)
    if not seen and isinstance(output, (tuple, list)):
        seen["output"] = output[0]
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2 and not bool(mask.all()):
        seen = {k: _live(model, v, mask) for k, v in seen.items()}
    return {k: v for k, v in seen.items() if v.numel()}


def _live(model, value: Tensor, mask: Tensor) -> Tensor:
    if value.dim() == 3 and value.shape[:2] == mask.shape:
        return value[mask.bool()]
    if value.dim() == 3 and len(value) == len(mask) and KINDS.get(model.main_input_name) == "audio":
        return value[mask.bool().all(1)]  # frames: which of them are padding is the model's own affair
    return value


def difference(a: dict, b: dict) -> float:
    """The largest difference between two answers, relative where values are larger than 1; infinite for NaN."""
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        return float("inf")
    worst = [((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1)).item() for k in b]
    return max(float("inf") if x != x else x for x in worst)


# --- the sweep --------------------------------------------------------------------------------------------------------
def dense_answers(model) -> tuple[dict[str, dict], dict[str, dict], str]:
    """Batches that the dense model takes, its answers, and why there are none."""
    taken, dense, why = {}, {}, "no batch"
    for name, batch in batches(model).items():
        try:
            first, second = answers(model, batch), answers(model, batch)
        except Exception as error:  # which batches a family takes is found by trying
            why = f"{type(error).__name__}: {error}".split("\n")[0][:120]
            continue
        if not first or difference(first, second) > 0:
            why = "answers differ from call to call" if first else "no output of states"
            continue
        if all(v.isfinite().all() for v in first.values()):
            taken[name], dense[name] = batch, first
        else:
            why = "answers are not finite"
    return taken, dense, why


def dense_under(model, implementation: str) -> tuple[dict[str, dict], dict[str, dict], str] | None:
    """``dense_answers`` under an attention implementation; None where the model has no such."""
    if model._can_set_attn_implementation():
        try:
            model.set_attn_implementation(implementation)
        except (ValueError, ImportError):
            return None
    elif implementation == "eager":
        return None
    return dense_answers(model)


def sweep(family: str, sharpen: float = 4.0) -> Verdict:
    """The verdict on ``family``. Raises LookupError where no tiny dense model of it runs."""
    model = build(family, sharpen)
    verdict = Verdict(family, head_of(family), KINDS.get(model.main_input_name, model.main_input_name))
    plain = {name: found for name in ("sdpa", "eager") if (found := dense_under(model, name)) is not None}
    if not any(taken for taken, _, _ in plain.values()):
        raise LookupError(f"the dense model does not run: {next(iter(plain.values()))[2]}")
    first, last = (list(plain.values())[place][1] for place in (0, -1))
    verdict.rounding = max((difference(first[name], last[name]) for name in first.keys() & last.keys()), default=0.0)
    for implementation, (taken, dense, _) in plain.items():
        if model._can_set_attn_implementation():
            model.set_attn_implementation(implementation)
        Judge(verdict, model, implementation, taken, dense).run()
    return verdict


@dataclasses.dataclass
class Judge:
    """The runs of one model under one attention implementation, against its ``dense`` answers to the ``taken``
    batches."""

    verdict: Verdict
    model: torch.nn.Module
    implementation: str
    taken: dict[str, dict]
    dense: dict[str, dict]
    hidden: dict[tuple[str, str], dict] = dataclasses.field(default_factory=dict)  # by method and batch, under mask
    tried: set[str] = dataclasses.field(default_factory=set)

    def run(self) -> None:
        unread = pooled_from_padding(self.dense)
        for layout in LAYOUTS:
            for how, method in METHODS.items():
                if how in SKIPPED.get(layout, ()) or how in SKIPPED.get(self.implementation, ()):
                    continue
                if not self.pruned(layout, method()):
                    break
                for name, batch in self.taken.items():
                    if layout == "packed" and name == "cached":
                        continue  # packed rows do not fit a cache, and say so
                    if self.implementation == "sdpa" or name.startswith(BRIEF):
                        self.compare(layout, how, name, batch, unread if name == "padded left" else set())
                with suppress(ValueError):
                    unprune(self.model)
        for name, batch in self.taken.items():
            if difference(answers(self.model, batch), self.dense[name]) > 0:
                self.fault("lying", f"unprune() does not give the dense model back/{name}")
        for how in ("half", "first", "uneven"):
            self.independent(how)

    def pruned(self, layout: str, method) -> bool:
        """Prune the model; whether prune() took it."""
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                prune(self.model, method, layout=layout, check=layout not in self.tried)
        except (ValueError, TypeError) as error:
            self.verdict.refusals[layout] = str(error).split("\n")[0]
            if hasattr(self.model, "token_pruner"):
                self.fault("failing", f"{layout}: prune() refuses and leaves a token_pruner")
            return False
        except Exception as error:
            self.fault("failing", f"{layout}: prune() raises {type(error).__name__}: {error}"[:200])
            self.verdict.refusals[layout] = str(error)
            return False
        self.tried.add(layout)
        self.verdict.notes += [str(w.message) for w in told if str(w.message) not in self.verdict.notes]
        return True

    def compare(self, layout: str, how: str, name: str, batch: dict, unread: set[str]) -> None:
        """Run a batch, and hold it against the dense model or against hidden tokens."""
        at = f"{layout}/{how}/{name}"
        try:
            got = answers(self.model, batch)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{at}: {type(error).__name__}: {error}".split("\n")[0][:220]
            self.fault("failing", f"{text} ({Path(frame.filename).name}:{frame.lineno})")
            return
        self.verdict.runs += 1
        expected = self.dense[name] if how == "all" else self.hidden.get((how, name))
        if layout == "mask" and how != "all":
            self.hidden[how, name] = got
        elif expected is not None:
            got, expected = ({k: v for k, v in x.items() if k not in unread} for x in (got, expected))
            gap = difference(got, expected) if expected else 0.0
            self.verdict.worst = max(self.verdict.worst, gap)
            if gap > self.verdict.tolerance:
                self.fault("lying", f"{at}: {gap:.1e}")

    def independent(self, how: str) -> None:
        """What makes no difference to the dense model makes none to the pruned one: padding, and a mask of ones."""
        for other, alone in (("padded right", "one row"), ("padded left", "one row"), ("full mask", "no mask")):
            if (how, other) not in self.hidden or (how, alone) not in self.hidden:
                continue
            gaps = []
            for source in (self.dense, {name: self.hidden[how, name] for name in (other, alone)}):
                a, b = source[other], source[alone]
                if other != "full mask":  # per token rows are no longer apart
                    a = {k: v[1:2] for k, v in a.items() if v.dim() == 2 and len(v) == 3}
                    b = {k: b[k] for k in a}
                gaps.append(difference(a, b) if b else 0.0)
            if gaps[0] <= TOLERANCE < gaps[1]:
                self.fault("lying", f"mask/{how}: {other} differs from {alone}: {gaps[1]:.1e}")

    def fault(self, state: str, text: str) -> None:
        self.verdict.faults.append((state, f"{text} ({self.implementation})"))


def pooled_from_padding(dense: dict[str, dict]) -> set[str]:
    """Pooled answers that say something else once padding stands before a row: they read the padding."""
    if "padded left" not in dense or "one row" not in dense:
        return set()
    left, alone = dense["padded left"], dense["one row"]
    pooled = [key for key, value in left.items() if value.dim() == 2 and len(value) == 3]
    return {key for key in pooled if (left[key][1] - alone[key][0]).abs().max() > TOLERANCE}


def apart(family: str, sharpen: float) -> Verdict | str:
    """``sweep`` in a process of its own, with bounds on its time and memory; a string says why there is no verdict."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(theirs, family, sharpen), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(30 * SECONDS) else "its process hangs"
    except EOFError:
        return f"a tiny model that takes more than {SECONDS} s or {MEMORY >> 30} GiB"
    finally:
        process.kill()
        process.join()
        ours.close()


def _send(pipe, family: str, sharpen: float) -> None:
    torch.set_num_threads(1)
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        pipe.send(sweep(family, sharpen))
    except Exception as error:  # one family must not stop the sweep
        pipe.send(f"{type(error).__name__}: {error}".split("\n")[0][:160])


# --- the page ---------------------------------------------------------------------------------------------------------
def page(verdicts: list[Verdict], left_out: dict[str, str], composed: int) -> str:
    """docs/models.md."""
    count = Counter(v.state for v in verdicts)
    runs, worst = sum(v.runs for v in verdicts), max((v.worst for v in verdicts if v.state == "served"), default=0.0)
    kinds = Counter(v.kind for v in verdicts if v.state == "served")
    lines = [
        "# Models",
        "",
        "Written by `python benchmarks/families.py`; do not edit.",
        "",
        f"Every text, vision and audio family of transformers {transformers.__version__} that builds from a tiny "
        "configuration is pruned with random, sharpened weights. *Served* means: keeping every token is the dense "
        "model, removing tokens is the same as hiding them, a row answers in a batch as alone, and `unprune()` gives "
        f"the dense model back bit for bit, within {TOLERANCE:.0e} of the largest value (or of 1), or "
        f"within the rounding by which the dense model's own attention implementations differ, below {ROUNDING:.0e}. "
        "*Refused* means: `prune()` says why and leaves the model as it is.",
        "",
        "| swept | served | refused | failing in a forward | answering wrongly | forwards | worst difference, served |",
        "|---|---|---|---|---|---|---|",
        f"| {len(verdicts)} | {count['served']} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}) | "
        f"{count['refused']} | {count['failing']} | {count['lying']} | {runs:,} | {worst:.1e} |",
        "",
        f"Not swept: {composed} families that are made of others (several modalities), and {len(left_out)} of which no "
        "tiny dense model runs on inputs made up here (last table).",
        "",
    ]
    for state, title in (("failing", "Failing"), ("lying", "Answering wrongly"), ("served", "Served")):
        rows = [v for v in verdicts if v.state == state]
        if not rows:
            continue
        lines += [
            f"## {title}",
            "",
            "| family | model | reads | layouts | worst difference | |",
            "|---|---|---|---|---|---|",
        ]
        for v in rows:
            layouts = ", ".join(name for name in v.layouts if name != "auto")
            lines.append(f"| {v.family} | `{v.model}` | {v.kind} | {layouts} | {v.worst:.1e} | {_cell(v.reason)} |")
        lines.append("")
    lines += ["## Refused", "", "| family | model | reads | reason |", "|---|---|---|---|"]
    lines += [f"| {v.family} | `{v.model}` | {v.kind} | {_cell(v.reason)} |" for v in verdicts if v.state == "refused"]
    lines += ["", "## Without a tiny dense model", "", "| family | reason |", "|---|---|"]
    lines += [f"| {family} | {_cell(reason)} |" for family, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A reason as plain text in a cell: what Markdown would read as a border or a link is escaped."""
    return text[:300].replace("\n", " ").replace("|", "\\|").replace("[", "\\[")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="families, with commas between; writes no page")
    parser.add_argument("--sharpen", type=float, default=4.0, help="factor of all weight matrices")
    options = parser.parse_args()
    logging.set_verbosity_error()
    names, composed = families()
    verdicts, left_out = [], {}
    for family in options.only.split(",") if options.only else names:
        start = time.perf_counter()
        verdict = apart(family, options.sharpen)
        seconds = time.perf_counter() - start
        if isinstance(verdict, str):
            left_out[family] = verdict
            print(f"{family:32} left out {seconds:5.1f}s {verdict}", flush=True)
            continue
        verdicts.append(verdict)
        layouts = ",".join(verdict.layouts)
        print(
            f"{family:32} {verdict.state:8} {seconds:5.1f}s {layouts:26} {verdict.worst:.1e} {verdict.reason}",
            flush=True,
        )
    print(dict(Counter(v.state for v in verdicts)), "left out", len(left_out))
    if not options.only:
        PAGE.write_text(page(verdicts, left_out, composed), encoding="utf-8")


if __name__ == "__main__":
    main()
