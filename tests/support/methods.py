"""Every method, as the matrix runs it: keeping every token, and pruning. A new method is one line here."""

from __future__ import annotations

from support.families import FAMILIES
from thresher import (
    ATS,
    LAT,
    LTMP,
    LTP,
    TRBERT,
    VATP,
    AdapLeR,
    AToMe,
    Cut,
    DynamicViT,
    Entropy,
    EViT,
    FirstK,
    LazyLLM,
    PoWERBERT,
    Random,
    Silence,
    SpAtten,
    Threshold,
    ToFu,
    ToMe,
    ToP,
    TopK,
    Transkimmer,
)


class Holes(ToP):
    """ToP with masks that have holes, as they come out of a training."""

    holes: bool = True

    name = "top-holes"

    def build(self, model):
        """Every other bin off from the second on, at all sites but the last of several, whose gate is off."""
        super().build(model)
        self.mask[:, 1::2] = False
        if len(self.mask) > 1:
            self.mask[-1] = True


class Prefix(ToP):
    """ToP with masks without holes, fewer bins at each site."""

    name = "top-prefix"

    def build(self, model):
        super().build(model)
        for site, mask in enumerate(self.mask):
            mask[self.bins * 2 // (3 + site) :] = False


# name: (keeps every token, lets tokens leave); made anew for each model
METHODS = {
    "topk": (lambda: TopK(keep=1.0), lambda: TopK(keep=0.6)),
    "topk-counts": (lambda: TopK(keep=64), lambda: TopK(keep=(9, 6, 3))),
    "random": (lambda: Random(keep=1.0), lambda: Random(keep=0.6)),
    "firstk": (lambda: FirstK(keep=1.0), lambda: FirstK(keep=0.6)),
    "cut": (lambda: Cut(at=()), lambda: Cut()),
    "spatten": (lambda: SpAtten(keep=1.0), lambda: SpAtten(keep=0.6)),
    "vatp": (lambda: VATP(keep=1.0), lambda: VATP(keep=0.6)),
    "entropy-row": (lambda: Entropy(keep=1.0), lambda: Entropy(keep=0.6)),
    "entropy-column": (lambda: Entropy(keep=1.0, criterion="column"), lambda: Entropy(keep=0.6, criterion="column")),
    "ats": (lambda: ATS(keep=1.0), lambda: ATS(keep=0.6)),
    "lazyllm": (
        lambda: LazyLLM(keep=1.0, sinks=1, recent=2),
        lambda: LazyLLM(keep=0.6, sinks=1, recent=2),
    ),
    "evit": (lambda: EViT(keep=1.0), lambda: EViT(keep=0.6)),
    "tome": (lambda: ToMe(r=0.0), lambda: ToMe(r=0.2)),
    "tome-states": (lambda: ToMe(r=0.0, metric="states", rounds=2), lambda: ToMe(r=0.2, metric="states", rounds=2)),
    "tofu": (lambda: ToFu(r=0), lambda: ToFu(r=3)),
    "atome": (lambda: AToMe(r=0.0), lambda: AToMe(r=0.2)),
    "silence": (lambda: Silence(below=1e6), lambda: Silence(below=40.0, margin=0, group=3, r=0.2)),
    "lat": (lambda: LAT(), lambda: LAT(keep=0.6)),
    "ltmp": (lambda: LTMP(merge_init=2.0), lambda: LTMP(init=0.8, merge_init=0.5)),
    "powerbert": (lambda: PoWERBERT(), lambda: PoWERBERT(keep=0.6)),
    "dynamicvit": (lambda: DynamicViT(keep=1.0), lambda: DynamicViT(keep=0.6)),
    "transkimmer": (lambda: Transkimmer(start=50.0), lambda: Transkimmer(start=0.0)),
    "trbert": (lambda: TRBERT(start=50.0), lambda: TRBERT(start=0.0)),
    "adapler": (lambda: AdapLeR(init=0.0), lambda: AdapLeR(init=1.0)),
    "threshold": (lambda: Threshold(0.0), lambda: Threshold((0.4, 0.6, 0.8))),
    "top": (lambda: ToP(), lambda: Prefix(bins=8)),
    "top-holes": (lambda: ToP(holes=True), lambda: Holes(bins=8)),
    "top-fused": (lambda: ToP(fuse=True), lambda: Prefix(bins=8, fuse=True)),
    "ltp": (lambda: LTP(init=0.0), lambda: LTP(init=1.6)),
    "ltp-fused": (lambda: LTP(init=0.0, fuse=True), lambda: LTP(init=2.4, fuse=True)),
}
# What a method says (a regular expression) on families that it cannot serve: {"mine": {"siglip": "shows no keys"}}
REFUSES: dict[str, dict[str, str]] = {
    method: dict.fromkeys(("mpnet", "deberta-v2", "roformer", "siglip-vision"), "needs the keys or values")
    for method in ("ats", "vatp", "tome", "tome-states", "tofu", "ltmp", "atome")
}
REFUSES["ats"]["whisper-encoder"] = "which has no class token"
DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
for method in ("tome", "tome-states", "tofu", "ltmp", "atome", "top-fused", "ltp-fused"):
    REFUSES.setdefault(method, {}).update(dict.fromkeys(DECODERS, "a decoder: a merged token"))
REFUSES["evit"] = dict.fromkeys(DECODERS, "a decoder: a merged token") | dict.fromkeys(
    ("whisper-encoder", "siglip-vision"), "no class token"
)
REFUSES["lazyllm"] = {name: "an encoder, in which the last token" for name in FAMILIES if name not in DECODERS}
REFUSES["silence"] = {name: "not possible" for name in FAMILIES if name != "whisper-encoder"}
REFUSES["entropy-row"] = dict.fromkeys(DECODERS, "use criterion='column'")


def refusal(method: str, family: str, layout: str) -> str | None:
    """What the error says (a regular expression) where a combination cannot run."""
    if layout == "packed" and not FAMILIES[family].packed:
        return "layout='packed' is not possible"  # its attention shows no View, or has position biases
    return REFUSES.get(method, {}).get(family)
