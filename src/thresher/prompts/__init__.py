"""Prompts that get shorter before any engine reads them."""
