"""``python -m thresher``, the command."""

from .cli.app import main

main()
