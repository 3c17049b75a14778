"""What is measured: one declarative list. An entry is a training run or a timing run; its result is one file of
rows."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from subsets import MADE, shorter_half, some_of_test
from thresher.experiments import recipes
from weights import pretrained

DATA = Path(os.environ.get("THRESHER_DATA", "data"))  # folders named as the hub's data sets, see benchmarks/README.md


@dataclass(frozen=True)
class TaskSetting:
    """A task's data and budget, and how it is trained: the same for every method on it."""

    data: str
    config: str | None = None
    limit: int | None = None
    target: float = 0.49
    training: dict = field(default_factory=dict, hash=False)
    shorter: bool = False  # train on the shorter half
    test: int | None = None  # rows of the test part, where not all

    @property
    def path(self) -> str:
        """Where the data are."""
        if self.data in MADE:
            return str(MADE[self.data](DATA))
        if self.data == "bbc-news":
            return self.data
        whole = DATA / self.data
        if self.shorter:
            return str(shorter_half(whole))
        return str(some_of_test(whole, self.test) if self.test else whole)


TASKS = {
    "mrpc": TaskSetting("glue/mrpc", training=recipes.TASKS["mrpc"]),
    "sst2": TaskSetting("glue/sst2", limit=20_000, training=recipes.TASKS["sst2"]),
    "20newsgroups": TaskSetting("20newsgroups", target=0.39, training=recipes.TASKS["20newsgroups"]),
    "20newsgroups-512": TaskSetting(
        "20newsgroups", target=0.286, training=recipes.TASKS["20newsgroups"] | {"max_length": 512}
    ),
    "imdb": TaskSetting(
        "imdb", limit=2000, target=0.32, training=recipes.TASKS["imdb"] | {"max_length": 256}, test=2500
    ),
    "mrpc-short": TaskSetting(
        "glue/mrpc", limit=320, training=recipes.TASKS["mrpc"] | {"epochs": 2, "prune_epochs": 2}
    ),
    "mrpc-l3": TaskSetting("glue/mrpc", training=recipes.TASKS["mrpc"]),
    "squad": TaskSetting("squad", target=0.54, training=recipes.TASKS["squad"]),
    "rte": TaskSetting("glue/rte", training=recipes.TASKS["rte"]),
    "cola": TaskSetting("glue/cola", training=recipes.TASKS["cola"]),
    "stsb": TaskSetting("glue/stsb", training=recipes.TASKS["stsb"]),
    "stsb-shorter": TaskSetting("glue/stsb", target=0.54, training=recipes.TASKS["stsb"], shorter=True),
    "trecqa": TaskSetting("trecqa", training=recipes.TASKS["trecqa"]),
}
# Trained until they are trained, at a rate and by a schedule that are chosen on held-out rows: the protocol of "depth".
KEPT = ("max_length", "batch_size")  # of a task's recipe; all else is open
TASKS |= {
    f"{name}-open": replace(of, training={key: of.training[key] for key in KEPT if key in of.training})
    for name, of in TASKS.items()
    if name in ("mrpc", "sst2", "cola", "stsb", "rte", "trecqa", "20newsgroups", "imdb")
}
TASKS |= {f"{name}-open": TaskSetting(name) for name in ("bbc-news", *MADE)}


@dataclass(frozen=True)
class Entry:
    """One measurement.

    kind: "train" (quality and FLOPs on the test part), "speed" (wall-clock of all methods of a task, in one run) or
        "efficiency" (wall-clock against FLOPs of fixed schedules, untrained), "runtimes" (a pruned model in every
        runtime and precision), "compression" (pruned and dense models of two depths, int8 besides), "anytime" (one
        model at several budgets), "tune" (a schedule found without training), "audit" (what that loses in slices),
        "coverage" (draws of texts against a tested bound), "synthetic" (fixed schedules at BERT-base's size, random
        weights), "choice" (what choosing alone takes), "vision" (a small ViT on pictures: quality and wall-clock of
        methods, trained or not) or "soak" (memory over thousands of calls).
    method: a pruning method, "dense" (fine-tuning alone) or "dense-continued" (the same extra steps, nothing pruned).
    variant: what sets it apart from the entry of the same method and target, in its name.
    options: of ``thresher.experiments.train.train``, or of the timing.
    needs: names of entries whose models it starts from: first the dense one, then the one whose counts it replays.
    after: name of the entry whose rate and schedule it takes, which were chosen on held-out rows.
    """

    task: str
    method: str
    seed: int = 0
    tier: str = "smoke"
    kind: str = "train"
    model: str = "minilm-l6"
    target: float | None = None
    variant: str = ""
    needs: tuple[str, ...] = ()
    options: dict = field(default_factory=dict, hash=False)
    after: str = ""

    @property
    def name(self) -> str:
        """task/model-method[-variant][-target]-seed."""
        parts = [self.model, self.method, self.variant, "" if self.target is None else f"{self.target:g}"]
        return f"{self.task}/{'-'.join(part for part in parts if part)}-s{self.seed}"

    @property
    def label(self) -> str:
        """What it is called on a leaderboard: the method, and its kind if there are several."""
        return f"{self.method} {self.variant.removesuffix('untrained').strip('-')}".strip()

    def recipe(self, folder: Path) -> dict:
        """The arguments of ``thresher.experiments.train.train``; ``folder`` holds the models of other entries."""
        task = TASKS[self.task]
        recipe: dict = {
            "model": pretrained(self.model),
            "data": task.path,
            "config": task.config,
            "limit": task.limit,
            **task.training,
            "seed": self.seed,
            "dropout": 0.0,
            "method": "dense" if self.method.startswith("dense") else self.method,
            **self.options,
        }
        if self.method == "dense" and not self.needs:
            recipe["prune_epochs"] = 0
        if self.needs:
            recipe["dense_model"] = str(folder / self.needs[0])
        if len(self.needs) > 1:
            recipe["replay"] = str(folder / self.needs[1])
        if self.target is not None and len(self.needs) < 2 and self.method != "dense":
            fitting = recipes.OPTIONS.get(self.method, {}).get(Path(task.data).name, {})
            recipe["method_options"] = {
                **fitting,
                "target_flops": self.target,
                **self.options.get("method_options", {}),
            }
        return recipe | self.chosen(folder)

    def chosen(self, folder: Path) -> dict:
        """The rate and the schedule of the entry that it comes ``after``."""
        if not self.after:
            return {}
        known = json.loads((folder / self.after / "thresher.json").read_text())
        schedule, own = known["schedule"], {"prune_lr": known["rates"]["prune"]}
        if self.method in ("ltp", "top"):
            options = {"target_flops": self.target, "at": schedule["at"], "schedule": schedule["keep"]}
        else:
            options = {"at": schedule["at"], "keep": schedule["keep"]}
        return own if self.method in ("dense", "cut") else own | {"method_options": options}


def smoke(task: str, seed: int) -> list[Entry]:
    """Dense, LTP at one budget, and the baselines that replay its counts with the same training."""
    target = TASKS[task].target
    dense = Entry(task, "dense", seed)
    ltp = Entry(task, "ltp", seed, target=target, needs=(dense.name,))
    rest = [Entry(task, m, seed, target=target, needs=(dense.name, ltp.name)) for m in ("topk", "firstk", "random")]
    return [dense, ltp, *rest, Entry(task, "dense-continued", seed, needs=(dense.name,))]


def constrained(task: str, seed: int, target: float = 0.417, model: str = "minilm-l6") -> list[Entry]:
    """ToP and LTP at one budget, by default the mean gain of ToP's paper, and TopK with ToP's counts."""
    dense = Entry(task, "dense", seed, model=model)
    top = Entry(task, "top", seed, model=model, target=target, needs=(dense.name,))
    ltp = Entry(task, "ltp", seed, model=model, target=target, needs=(dense.name,))
    topk = Entry(task, "topk", seed, model=model, target=target, variant="of-top", needs=(dense.name, top.name))
    return [top, ltp, topk]


def glue(task: str, seed: int, targets: tuple = (0.417, 0.54)) -> list[Entry]:
    """Dense, the same extra steps, and ``constrained`` at 2.4x and 1.85x."""
    dense = Entry(task, "dense", seed)
    found = [dense, Entry(task, "dense-continued", seed, needs=(dense.name,))]
    found += [entry for target in targets for entry in constrained(task, seed, target)]
    return [replace(entry, tier="full") for entry in found]


PARTS = {  # of ToP, by the name of the variant without them or with another one
    "unranked": {"rank_weight": 0.0},  # the ranking is watched and not distilled
    "ndcg": {"rank_loss": "ndcg"},
    "arp2-topk": {"rank_loss": "arp2-topk", "rank_weight": 0.01},  # the paper's, but for its decay
    "gated": {"site_gates": True},
    "8-bins": {"bins": 8},
    "128-bins": {"bins": 128},
    "holes": {"holes": True},
}


OWN = {"cola": 0.571, "sst2": 0.599, "rte": 0.41, "mrpc": 0.33, "stsb": 0.3, "20newsgroups": 0.187}  # of ToP's paper


def depth(task: str, target: float = 0.417, seed: int = 0, model: str = "minilm-l6") -> list[Entry]:
    """The protocol of "depth" at one budget: learned methods that start from the schedule that held-out rows choose,
    that schedule alone with two scores and with none, the cut, and the first half of the layers."""
    task, common = f"{task}-open", {"seed": seed, "tier": "depth", "model": model}
    dense = Entry(task, "dense", **common)
    common |= {"needs": (dense.name,)}
    first = Entry(task, "topk", target=target, **common)
    common |= {"after": first.name}
    others = [Entry(task, method, target=target, **common) for method in ("ltp", "top", "random", "firstk")]
    cut = Entry(task, "cut", options={"at": (2,)}, **common)
    return [dense, first, *others, cut, Entry(task, "dense", variant="layers", options={"layers": 3}, **common)]


def careful(task: str, seed: int = 0) -> list[Entry]:
    """The default of ``thresher train``: no budget but a drop of one point on the validation part."""
    dense = Entry(f"{task}-open", "dense", seed, tier="depth")
    options = {"max_drop": 1.0}
    return [dense, Entry(dense.task, "topk", seed, "depth", variant="careful", needs=(dense.name,), options=options)]


def changed(task: str, target: float, variant: str, tier: str = "smoke") -> Entry:
    """ToP with one of its ``PARTS`` changed, seed 0."""
    needs, options = (Entry(task, "dense").name,), {"method_options": PARTS[variant]}
    return Entry(task, "top", variant=variant, target=target, tier=tier, needs=needs, options=options)


def lengthened(task: str, target: float, epochs: int) -> Entry:
    """ToP with more epochs of pruning, seed 0: its authors take 10 to 150."""
    needs, options = (Entry(task, "dense").name,), {"prune_epochs": epochs}
    return Entry(task, "top", variant=f"{epochs}-epochs", target=target, tier="full", needs=needs, options=options)


def ablation(task: str, target: float) -> list[Entry]:
    """What each part of ToP is worth, seed 0."""
    whole = Entry(task, "top", target=target, tier="full", needs=(Entry(task, "dense").name,))
    return [whole, *(changed(task, target, variant, "full") for variant in PARTS)]


UNTRAINED = (
    *("topk", "random", "firstk", "spatten", "vatp", "entropy", "ats", "evit", "tome", "tofu"),
    ("entropy", "column", {"criterion": "column"}),
)
TRAINED = ("ltp", "top", "transkimmer", "dynamicvit", "powerbert", "lat", "ltmp", "trbert", "adapler")
BOARD = 0.45  # of the dense MACs, at which all methods are compared


def board(task: str, seed: int, methods: tuple = (*UNTRAINED, *TRAINED), tier: str = "smoke", **options) -> list[Entry]:
    """Every method at one budget, with the same teacher and the same training; without any where ``prune_epochs`` is
    0."""
    variant = "untrained" if options.get("prune_epochs") == 0 else ""
    entries = []
    for method in methods:
        method, kind, own = method if isinstance(method, tuple) else (method, "", {})
        given = {"variant": "-".join(filter(None, (kind, variant))), "target": BOARD, "tier": tier}
        given |= {"needs": (Entry(task, "dense", seed).name,), "options": options | {"method_options": own}}
        entries.append(Entry(task, method, seed, **given))
    return entries


def board_speed(task: str) -> Entry:
    """Wall-clock of all methods of the trained leaderboard beside dense, seed 0."""
    needs = (Entry(task, "dense").name, *(entry.name for entry in board(task, 0)))
    return Entry(task, "board", target=BOARD, kind="speed", needs=needs, options={"limit": 1000, "replayed": False})


def anytime(task: str, budgets: tuple = (0.6, BOARD, 0.3)) -> list[Entry]:
    """One model of LAT at several budgets, set at run time, and top-k models trained for each of them alone."""
    dense, lat = Entry(task, "dense").name, Entry(task, "lat", target=BOARD)
    options = {"method_options": {"at": (0, 1, 2, 3, 4), "keep": 0.8}}  # LAT's sites
    alone = [Entry(task, "topk", variant="alone", target=t, needs=(dense,), options=options) for t in budgets]
    served = Entry(
        task, "lat", kind="anytime", variant="anytime", needs=(dense, lat.name), options={"budgets": budgets}
    )
    return [*alone, served]


def merged(task: str, targets: tuple = (0.7, 0.5)) -> list[Entry]:
    """Merging without training at milder budgets, beside dropping."""
    common = {"variant": "untrained", "needs": (Entry(task, "dense").name,), "options": {"prune_epochs": 0}}
    return [Entry(task, method, target=t, **common) for t in targets for method in ("tome", "topk", "random")]


def tuned(task: str, target: float = 0.5, variant: str = "", **options: object) -> list[Entry]:
    """A schedule found without training, and what it loses where."""
    dense = Entry(task, "dense").name
    found = Entry(task, "tuned", kind="tune", variant=variant, target=target, needs=(dense,), options=options)
    return [found, Entry(task, "audit", kind="audit", variant=variant, target=target, needs=(dense, found.name))]


def lengths(task: str, methods: tuple = ("ltp", "topk", "random", "firstk")) -> list[Entry]:
    """Trained on short texts, judged on texts of all lengths: as LTP's paper has it for LAT and itself."""
    target, dense = TASKS[task].target, Entry(task, "dense")
    found = [dense]
    for method in methods:
        pruned = Entry(task, method, target=target, needs=(dense.name,))
        needs = (dense.name, pruned.name)
        found += [pruned, Entry(task, "audit", kind="audit", variant=method, target=target, needs=needs)]
    return found


def coverage() -> Entry:
    """The tested bound of disagreement, on reviews that SST-2's model never saw."""
    options = {"pool": 1500, "draws": 10_000, "limits": (0.02, 0.05), "max_length": 64}
    return Entry("imdb", "coverage", kind="coverage", needs=(Entry("sst2", "dense").name,), options=options)


def speed(task: str) -> Entry:
    """Wall-clock of LTP beside dense and TopK with its counts, seed 0."""
    dense, ltp, topk = smoke(task, 0)[:3]
    needs = (dense.name, ltp.name, topk.name)
    return Entry(task, "speed", target=ltp.target, kind="speed", needs=needs, options={"limit": 1000})


def efficiency(task: str) -> list[Entry]:
    """Wall-clock against FLOPs at 2.0x and 4.0x: on the task's own lengths, and on texts of 512 tokens one by one."""
    options = {"at": (0, 1, 3), "keeps": {"2x": 0.7, "4x": 0.45}, "max_length": 512}
    own, long = options | {"batch_sizes": (32, 1)}, options | {"batch_sizes": (1,), "least": 512}
    kind = "efficiency"
    return [Entry(task, kind, kind=kind, options=own), Entry(task, kind, kind=kind, variant="512", options=long)]


def headlines(task: str) -> list[Entry]:
    """Wall-clock at 512 tokens beside dense, padded to 512 and unpadded: six layers with a schedule like the one ToP
    learned at 3.5x, twelve with an even one at 5x. Untrained: what is timed is the schedule."""
    learned = {"keeps": {"3.5x": (0.59, 0.505, 0.669, 0.611, 0.369)}, "at": (0, 1, 2, 3, 4)}
    even = {"keeps": {"5x": 0.49}, "at": (0, 2, 4, 6)}
    common = {"max_length": 512, "batch_sizes": (32, 1)}
    common |= {
        "timing": {"modes": ("dense-padded", "dense-unpadded", "pruned"), "repeats": 3, "batches": 2, "examples": 32}
    }
    return [
        Entry(task, "efficiency", kind="efficiency", variant="headline", model=model, options=of | common)
        for model, of in (("minilm-l6", learned), ("mpnet-base", even))
    ]


def runtimes(task: str, target: float, **options) -> Entry:
    """ToP beside dense in every runtime and precision, seed 0."""
    needs = (Entry(task, "dense").name, Entry(task, "top", target=target).name)
    return Entry(task, "runtimes", target=target, kind="runtimes", needs=needs, options=options)


def compression(task: str, target: float) -> list[Entry]:
    """ToP beside half the layers and int8, and on top of both, as in ToP's fourth table; MiniLM-L3 is a distilled
    encoder, fine-tuned and pruned like MiniLM-L6."""
    small = constrained(f"{task}-l3", 0, target, model="minilm-l3")[0]
    needs = (Entry(task, "dense").name, Entry(task, "top", target=target).name, small.needs[0], small.name)
    timed = Entry(task, "compression", target=target, kind="compression", needs=needs)
    return [Entry(small.task, "dense", model="minilm-l3"), small, timed]


def synthetic() -> list[Entry]:
    """BERT-base's shape with random weights, 2.1x, 4x and 8x fewer FLOPs: one long text, eight short ones, and torch
    alone on 32 of 16 to 256 tokens."""
    shapes = {"1x512": ((1, 512), 4), "8x128": ((8, 128), 2)}
    keeps = {"2.1x": (0.66, (1, 3, 6)), "4x": (0.4, (1, 3, 6)), "8x": (0.3, (0, 2, 5))}
    options = {"graphs": ("onnx fp32", "onnx int8", "openvino bf16"), "precisions": ("fp32", "bf16")}
    options |= {"keeps": keeps, "repeats": 5}
    own = {name: options | {"shape": shape, "batches": batches} for name, (shape, batches) in shapes.items()}
    ragged = options | {"shape": (32, 256), "batches": 2, "least": 16, "graphs": (), "repeats": 3}
    own["8x128-openvino-int8"] = own["8x128"] | {"graphs": ("openvino int8",), "precisions": ("fp32",)}
    for precision in ("fp32", "bf16"):
        own[f"32x16-256-{precision}"] = ragged | {"precisions": (precision,)}
    common = {"kind": "synthetic", "model": "bert-base"}
    return [Entry("synthetic", "speed", variant=name, options=of, **common) for name, of in own.items()]


def vision() -> Entry:
    """Methods on a small ViT: untrained at 30 % and 50 % fewer MACs, and fine-tuned at 50 %; epochs and learning rates
    of the dense training and of the fine-tuning."""
    options = {"targets": (0.7, 0.5), "tuned": 0.5, "dense": (3, 2e-3), "steps": (0.6, 1e-3)}
    return Entry("vision", "methods", kind="vision", model="vit-digits", options=options)


ENTRIES: list[Entry] = [
    *smoke("20newsgroups", 0),
    *smoke("mrpc", 0),
    *smoke("sst2", 0),
    *smoke("mrpc", 1),
    *smoke("mrpc", 2),
    *constrained("20newsgroups", 0, TASKS["20newsgroups"].target)[::2],  # LTP's is there already
    *(entry for task in ("sst2", "mrpc") for entry in constrained(task, 0)),
    *(entry for seed in (1, 2) for entry in constrained("mrpc", seed)),
    *constrained("sst2", 0, TASKS["sst2"].target)[::2],
    Entry("squad", "dense"),
    *constrained("squad", 0, TASKS["squad"].target),
    *constrained("20newsgroups", 0, 0.286),
    *(lengthened(*of) for of in (("stsb", 0.417, 20), ("cola", 0.417, 20), ("20newsgroups", 0.286, 4))),
    *(
        entry
        for task in ("20newsgroups-512", "imdb")
        for entry in (Entry(task, "dense"), *constrained(task, 0, TASKS[task].target))
    ),
    changed("sst2", 0.417, "gated"),
    changed("20newsgroups", 0.286, "gated"),
    changed("20newsgroups", TASKS["20newsgroups"].target, "gated"),
    Entry("mrpc-short", "dense", model="mpnet-base"),
    *constrained("mrpc-short", 0, model="mpnet-base")[:2],
    *ablation("mrpc", 0.25),
    speed("mrpc"),
    speed("sst2"),
    speed("20newsgroups"),
    *efficiency("20newsgroups"),
    *headlines("20newsgroups"),
    runtimes("mrpc", 0.417),
    runtimes("sst2", 0.417, limit=600, repeats=3),
    runtimes("20newsgroups", 0.286, limit=500, repeats=3, runtime=("torch", "onnx")),
    runtimes("imdb", 0.32, limit=300, repeats=3, runtime=("torch", "onnx")),
    *compression("mrpc", 0.417),
    Entry(
        "mrpc",
        "soak",
        kind="soak",
        target=0.417,
        needs=(Entry("mrpc", "top", target=0.417).name,),
        options={"calls": 10_000},
    ),
    *synthetic(),
    Entry(
        "synthetic",
        "choice",
        kind="choice",
        model="bert-base",
        options={"shapes": ((1, 128), (32, 128), (1, 512), (32, 512)), "calls": 1000},
    ),
    *(entry for task in ("mrpc", "sst2", "20newsgroups") for entry in board(task, 0, UNTRAINED, prune_epochs=0)),
    *(entry for seed in range(3) for entry in board("mrpc", seed)),
    board_speed("mrpc"),
    *anytime("mrpc"),
    *(entry for task in ("mrpc", "sst2", "20newsgroups") for entry in tuned(task)),
    *tuned("sst2", variant="long", min_length=20),  # its train part holds phrases, its test part sentences
    tuned("sst2", variant="long-topk", min_length=20, method="topk")[0],  # with the score that is found on phrases
    *merged("mrpc"),
    coverage(),
    *(changed("stsb", 0.417, part, "full") for part in ("unranked", "gated")),
    *(entry for seed in range(3) for task in ("rte", "stsb", "cola", "trecqa") for entry in glue(task, seed)),
    *board("20newsgroups", 0, tier="full"),
    *lengths("stsb-shorter"),
    vision(),
    *(entry for task in ("cola", "stsb", "mrpc", "trecqa", *MADE, "bbc-news") for entry in careful(task)),
    *(entry for task in ("sst2", "20newsgroups", "imdb") for entry in careful(task)),
    *(
        entry
        for task in ("headlines", "stsb", "cola", "mrpc", "sst2", "20newsgroups", "trecqa")
        for entry in depth(task)
    ),
    *(
        entry
        for task, target in OWN.items()
        for entry in depth(task, target)
        if entry.method in ("dense", "topk", "top")
    ),
    *(entry for task in OWN for entry in depth(task, 0.5) if entry.method in ("topk", "ltp")),
]
ENTRIES = list({entry.name: entry for entry in ENTRIES}.values())
