"""The scenes of the model that learns to see, and the cells that a question needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture
def visual(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import visual

    return visual


def test_a_scene_is_drawn_as_its_objects_say(visual):
    pixels, objects = visual.scenes(16, torch.Generator().manual_seed(0))
    for picture, scene in zip(pixels, objects.tolist(), strict=True):
        cells = picture.view(3, visual.CELLS, visual.PATCH, visual.CELLS, visual.PATCH)
        for colour, (row, column, shape, right) in enumerate(scene):
            drawn = 1.5 * visual.PALETTE[colour][:, None, None] * visual.shapes()[shape]
            noise = cells[:, row, :, column] - drawn
            assert noise.std() < 0.4 and cells[:, row, :, column][drawn > 0].mean() > 1
            if right >= 0:
                assert scene[right][:2] == [row, column + 1] and scene[right][3] == -1
        places = [(row, column) for row, column, *_ in scene]
        assert len({*places}) == visual.COLOURS and sum(one[3] >= 0 for one in scene) == visual.PAIRS
        rest = picture.view(3, 8, 8, 8, 8).permute(1, 3, 0, 2, 4).flatten(0, 1)
        empty = [i for i in range(visual.TOKENS) if divmod(i, visual.CELLS) not in places]
        assert rest[empty].std() < 0.35


def test_a_question_needs_the_cells_of_its_answer(visual):
    generator = torch.Generator().manual_seed(1)
    objects = visual.scenes(32, generator)[1]
    for kind in range(4):
        colour, answer, needed = visual.ask(objects, kind, generator)
        for scene, asked, told, cells in zip(
            objects.tolist(), colour, answer - visual.OFFSETS[kind], needed, strict=True
        ):
            own = scene[asked]
            other = scene[own[3]] if kind >= 2 else None
            assert told == (own[2], own[0], other and other[2], own[3])[kind]
            wanted = {visual.CELLS * one[0] + one[1] for one in (own, other) if one}
            assert {*cells.nonzero()[:, 0].tolist()} == wanted


def test_readers_see_the_points_over_random(visual, tmp_path):
    rows = [
        {"method": name, "kept": 16, "accuracy": right * 25.0, "fewer": 3.0, "right": f"{right}" * 4}
        for name, right in (("Random", 2), ("Pool 4x4", 3), ("Random after layer 1", 1), ("FastV after layer 1", 4))
    ]
    for row in rows:
        row["right"] = row["right"][:-1] + "2"
    (tmp_path / "seed0.json").write_text(visual.json.dumps({"rows": rows}))
    said = "\n".join(visual.page(tmp_path))
    assert "| Random | 50.0, 3.0× |" in said and "| Pool | 75.0 (+18.8 ± 12.2) |" in said
    assert "| FastV | 100.0 (+56.2 ± 36.8) |" in said and "equal MACs" not in said
