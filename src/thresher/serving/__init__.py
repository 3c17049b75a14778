"""Scoring of any number of texts; batches by a budget of tokens."""
