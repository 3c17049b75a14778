"""Texts that arrive in pieces."""

from .classifier import Answer, Stream

__all__ = ["Answer", "Stream"]
