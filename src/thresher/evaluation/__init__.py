"""Measure models: their answers, MACs and times, on one machine whose circumstances are stated."""
