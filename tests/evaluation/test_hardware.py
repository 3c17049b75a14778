"""Threads are torch's while something is measured, and set back whatever happens."""

from __future__ import annotations

import pytest
import torch

from thresher.evaluation.hardware import torch_threads


def test_threads_are_set_and_set_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with torch_threads(None):
            assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyboardInterrupt), torch_threads(before + 1):
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"threads={count}: at least one"), torch_threads(count):
            pytest.fail("it ran")
