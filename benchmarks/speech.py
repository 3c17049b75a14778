"""Whisper with fewer frames: ``python benchmarks/speech.py words [MODEL] | time [MODEL]``.

    words   word errors of every method; rows land in results/speech, one file for each
    time    milliseconds of the encoder, in turns; nothing else may run on the machine

MODEL is whisper-tiny.en (default) or whisper-base, from ``python benchmarks/weights.py MODEL``. ``THRESHER_DATA`` holds
``glue/stsb``; Debian's espeak-ng speaks, and alsa-utils has eight recorded phrases (``apt-get install espeak-ng
alsa-utils``). What is said: captions of STS-B, 6 to 14 words without figures, by two voices. "sentences": one in a
window of 30 s; "full": as many as fit into 27 s, 0.3 s apart; "recorded": the eight phrases, one in a window.

Shapes: windows of 3,000 frames of spectrum, 1,500 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time as clock
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weights import TINY, available, pretrained

RESULTS = Path(__file__).resolve().parent / "results" / "speech"
RUNS = Path(__file__).resolve().parent.parent / "runs" / "benchmarks" / "speech"
RATE, LONGEST, PAUSE = 16_000, 27.0, 0.3
VOICES = ("en-us", "en-gb")
SENTENCES, FULL, CALM = 24, 6, 2  # windows; of the last, of other sentences, budgets are met on
PHRASES = Path("/usr/share/sounds/alsa")
TARGETS = (0.7, 0.5)  # of the encoder's MACs
BUDGETED = ("atome", "random", "topk", "tome")


def captions() -> list[str]:
    """Captions of STS-B, each once."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(Path(os.environ["THRESHER_DATA"]) / "glue" / "stsb" / "validation.parquet")
    said = dict.fromkeys(one for name in ("sentence1", "sentence2") for one in table[name].to_pylist())
    return [one for one in said if re.fullmatch(r"[A-Z][a-z]*( [a-z]+){5,13}\.", one)]


def read(file: Path) -> Any:
    """(T,) samples in [-1, 1], one channel at 16 kHz."""
    import numpy as np
    from scipy.signal import resample_poly

    with wave.open(str(file)) as sound:
        rate, channels = sound.getframerate(), sound.getnchannels()
        samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16).reshape(-1, channels).mean(1) / 32768
    return resample_poly(samples, RATE, rate).astype(np.float32)


def spoken(text: str, voice: str) -> Any:
    """(T,) samples of a text."""
    with tempfile.TemporaryDirectory() as aside:
        file = Path(aside) / "said.wav"
        subprocess.run(["espeak-ng", "-v", voice, "-s", "150", "-w", str(file), text], check=True)
        return read(file)


def sounds(sentences: int = SENTENCES, full: int = FULL) -> dict[str, list[tuple[str, Any]]]:
    """What is said in each window, and its samples, by part; "calm" is for the budgets."""
    import numpy as np

    known = captions()
    voice = [VOICES[i % len(VOICES)] for i in range(len(known))]
    parts = {"sentences": [(text, spoken(text, voice[i])) for i, text in enumerate(known[:sentences])], "full": []}
    pause, at = np.zeros(int(PAUSE * RATE), np.float32), SENTENCES
    for _ in range(full + CALM):
        words, heard = [], []
        while True:
            sound = spoken(known[at], voice[0])
            if sum(map(len, heard)) + len(sound) > LONGEST * RATE:
                break
            words, heard, at = [*words, known[at]], [*heard, sound, pause], at + 1
        parts["full"].append((" ".join(words), np.concatenate(heard)))
    parts["calm"] = [parts["full"].pop() for _ in range(CALM)]
    files = sorted(file for file in PHRASES.glob("*.wav") if file.stem != "Noise")
    parts["recorded"] = [(file.stem.replace("_", " "), read(file)) for file in files]
    return parts


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"[a-z0-9']+", text.lower())


def errors(wanted: list[str], said: list[str]) -> int:
    """Words that are wrong, missing or too many: Levenshtein's distance."""
    row = list(range(len(said) + 1))
    for i, word in enumerate(wanted, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(said, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


def methods() -> dict[str, Callable[[float | None], Any]]:
    """By name: functions of a share of the MACs, which the last four of them take."""
    from thresher import AToMe, Random, Silence, ToMe, TopK

    every = {"at": (0, 1, 2)}
    return {
        "dense": lambda _: Random(keep=1.0),
        "silence": lambda _: Silence(),
        "silence+atome-0.1": lambda _: Silence(r=0.1),
        "silence+atome-0.2": lambda _: Silence(r=0.2),
        "silence-put-back": lambda _: Silence(group=None),
        "silence-removed": lambda _: Silence(group=None),
        "atome": lambda target: AToMe(target_flops=target),
        "random": lambda target: Random(target_flops=target, **every),
        "topk": lambda target: TopK(target_flops=target, **every),
        "tome": lambda target: ToMe(target_flops=target),
    }


def heard(net: Any, processor: tuple, windows: list[tuple[str, Any]], removed: bool = False) -> tuple[list[str], float]:
    """What is understood of each window, and the share of the encoder's MACs. ``removed``: the decoder reads the frames
    that are left alone, one window at a time."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    extractor, tokenizer = processor
    said, used, whole, size = [], 0.0, 0.0, 1 if removed else 6
    for start in range(0, len(windows), size):
        some = [sound for _, sound in windows[start : start + size]]
        given = extractor(some, sampling_rate=RATE, return_tensors="pt").input_features
        how = {"max_new_tokens": 200, "do_sample": False, "num_beams": 1}
        if net.config.vocab_size > 51864:
            how |= {"language": "en", "task": "transcribe"}
        with torch.inference_mode():
            if removed:
                states = net.get_encoder()(given).last_hidden_state
                left = net.token_pruner.record.left.spread_votes()[0] > 0
                ids = net.generate(encoder_outputs=BaseModelOutput(states[:, left]), **how)
            else:
                ids = net.generate(given, **how)
        record = net.token_pruner.record
        used, whole = used + float(record.used), whole + float(record.dense)
        said += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return said, used / whole


def opened(model: str) -> tuple[Any, tuple]:
    """A model in fp32 with what makes spectrums and words."""
    import torch
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    folder = pretrained(model)
    net = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return net, (WhisperFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


def budgeted(net: Any, method: Any, calm: list[tuple[str, Any]], extractor: Any) -> None:
    """Prune a model, on the method's budget if it has one."""
    from thresher import prune

    prune(net, method)
    given = extractor([sound for _, sound in calm], sampling_rate=RATE, return_tensors="pt").input_features

    def forward(features: Any) -> Any:
        net.get_encoder()(features)
        return net.token_pruner.record

    net.token_pruner.calibrate(forward, [given])


def measure(model: str) -> None:
    """Rows of word errors; a method's budget is met on full windows."""
    import numpy as np
    import torch

    from thresher import unprune
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row, whole, write_rows

    (net, processor), parts = opened(model), sounds()
    calm, known = parts.pop("calm"), RUNS / f"{model}.json"  # of the dense model's errors, window by window
    base = {name: np.array(own) for name, own in json.loads(known.read_text()).items()} if known.exists() else {}
    for name, make in methods().items():
        for target in TARGETS if name in BUDGETED else (None,):
            file = RESULTS / f"{model}-{name}{'' if target is None else f'-{target:g}'}.json"
            if file.exists() and base:
                continue
            budgeted(net, make(target), calm, processor[0])
            rows = []
            for part, windows in parts.items():
                said, share = heard(net, processor, windows, name == "silence-removed")
                wanted = [words(text) for text, _ in windows]
                many = np.array([len(one) for one in wanted])
                wrong = np.array([errors(one, words(own)) for one, own in zip(wanted, said, strict=True)])
                base.setdefault(part, wrong)
                drawn = np.random.default_rng(0).integers(0, len(many), (2000, len(many)))
                more = 100 * (wrong - base[part])[drawn].sum(1) / many[drawn].sum(1)
                low, high = np.percentile(more, (2.5, 97.5))
                rate, before = (100 * own.sum() / many.sum() for own in (wrong, base[part]))
                own = {"task": part, "model": model, "method": name, "target_flops": target, "seed": 0}
                own |= {"runtime": "torch", "precision": "fp32", "layout": "padded", "threads": torch.get_num_threads()}
                own |= {"mode": "pruned", "metric": "words right", "quality": 100 - rate, "quality_dense": 100 - before}
                own |= {"flops_ratio": 1 / share, "interval_low": low, "interval_high": high, "split": "test"}
                own |= {"n_examples": len(windows), "note": f"{int(wrong.sum())} errors in {int(many.sum())} words"}
                rows.append(row(**own, **environment()))
                print(f"{model} {name} {target} {part}: {rate:.1f} ({before:.1f}), {1 / share:.2f}x", flush=True)
                if name == "dense":
                    print(said[:3], flush=True)
            unprune(net)
            write_rows(file, rows)
            with whole(known) as aside:
                aside.write_text(json.dumps({name: own.tolist() for name, own in base.items()}))


def time(model: str, tiny: bool) -> None:
    """Milliseconds of the encoder on one window of a sentence and on a full one, at batch 1, in turns; ``tiny``: on one
    window of each, once, and no rows."""
    import copy

    import numpy as np
    import torch

    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row, write_rows

    windows, repeats = (1, 1) if tiny else (3, 4)
    (net, (extractor, _)), parts = opened(model), sounds(windows, windows)
    nets, rows = {("dense", None): net}, []
    for name in ("silence", "silence+atome-0.2", "atome", "topk"):
        for target in TARGETS if name in ("atome", "topk") else (None,):
            own = copy.deepcopy(net)
            budgeted(own, methods()[name](target), parts["calm"], extractor)
            nets[name, target] = own
    for part in ("sentences", "full"):
        calls = [extractor(s, sampling_rate=RATE, return_tensors="pt").input_features for _, s in parts[part]]
        taken = np.empty((len(nets), 1 + repeats, len(calls)))
        with torch.inference_mode():
            for repeat in range(1 + repeats):
                for c, given in enumerate(calls):
                    for turn in range(len(nets)):
                        i = (turn + repeat + c) % len(nets)
                        start = clock.perf_counter()
                        [*nets.values()][i].get_encoder()(given)
                        taken[i, repeat, c] = clock.perf_counter() - start
        totals = np.median(taken[:, 1:], 1).sum(1)
        for i, ((name, target), one) in enumerate(nets.items()):
            own = {"task": part, "model": model, "method": name, "target_flops": target, "runtime": "torch"}
            own |= {"precision": "fp32", "batch_size": 1, "threads": torch.get_num_threads(), "repeats": repeats}
            own |= {"mode": "pruned" if i else "dense-unpadded", "n_timed": len(calls)}
            own |= {"latency_ms_p50": float(1000 * np.median(taken[i, 1:])), "speedup_unpadded": totals[0] / totals[i]}
            sums = taken[i, 1:].sum(1)
            own |= {"spread": float(np.subtract(*np.percentile(sums, (75, 25))) / np.median(sums))}
            if i:
                shares = []
                for given in calls:
                    one.get_encoder()(given)
                    shares.append(float(one.token_pruner.record.flops_fraction()))
                own |= {"flops_ratio": 1 / np.mean(shares), "efficiency": totals[0] / totals[i] * np.mean(shares)}
            rows.append(row(**own, **environment()))
    if not tiny:
        write_rows(RESULTS / f"{model}-time.json", rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("words", "time"))
    parser.add_argument("model", nargs="?", default=TINY)
    parser.add_argument("--tiny", action="store_true", help="of time: try it, and write no rows")
    given = parser.parse_args()
    if not available(given.model):
        parser.error(f"{pretrained(given.model)} is not there: python benchmarks/weights.py {given.model}")
    if given.step == "words":
        measure(given.model)
    else:
        time(given.model, given.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
