"""Memory of one process that answers thousands of calls of varying length: ``python benchmarks/soak.py FOLDER CALLS``.

FOLDER holds a pruned model (torch) or an exported one. Prints resident memory in MB by the number of calls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

AT = (100, 1000, 3000)


def soak(folder: str, calls: int) -> dict[str, float]:
    """Resident MB after so many calls, of 1 to 4 random rows of 3 to 128 tokens."""
    import torch

    spec = Path(folder, "thresher.json")
    if "format" in (json.loads(spec.read_text()) if spec.exists() else {}):
        from thresher import load_runtime

        graph = load_runtime(folder)
        forward, config, tokenizer = graph.forward, graph.config, graph.tokenizer
    else:
        from thresher.data.models import load

        forward, tokenizer = load(folder)
        config = forward.config
    draw, found = torch.Generator().manual_seed(0), {}
    for call in range(1, calls + 1):
        size, length = (int(torch.randint(low, high, (1,), generator=draw)) for low, high in ((1, 5), (3, 129)))
        ids = torch.randint(5, config.vocab_size, (size, length), generator=draw)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_type_ids" in tokenizer.model_input_names:
            inputs["token_type_ids"] = torch.zeros_like(ids)
        with torch.inference_mode():
            forward(**inputs)
        if call in AT or call == calls:
            found[str(call)] = resident()
    return found


def resident() -> float:
    """MB of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_soak(entry, runs: Path) -> list[dict]:
    """A row for torch and for each graph of the model, each in a process of its own."""
    from entries import TASKS
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row
    from thresher.experiments.export import export
    from thresher.exporting.export import FORMATS

    setting, model = TASKS[entry.task], runs / entry.needs[0]
    places = {("torch", "fp32"): model}
    for pair in ((runtime, precision) for runtime, precisions in FORMATS.items() for precision in precisions):
        places[pair] = runs / "graphs" / entry.name / "-".join(pair)
        if not (places[pair] / "thresher.json").exists():
            given = {"data": setting.path, "config": setting.config}
            export(str(model), str(places[pair]), format=pair[0], precision=pair[1], **given)
    rows = []
    for (runtime, precision), place in places.items():
        command = [sys.executable, __file__, str(place), str(entry.options["calls"])]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        first, *_, last = found.values()
        common = {"task": entry.task, "model": entry.model, "method": "top", "target_flops": entry.target}
        common |= {"seed": entry.seed, "runtime": runtime, "precision": precision, "mode": "pruned", "split": "none"}
        told = ", ".join(f"{mb:.0f} MB after {int(calls):,} calls" for calls, mb in found.items())
        rows.append(row(**common, peak_memory_mb=last, memory_start_mb=first, note=told, **environment()))
    return rows


if __name__ == "__main__":
    print(json.dumps(soak(sys.argv[1], int(sys.argv[2]))))
