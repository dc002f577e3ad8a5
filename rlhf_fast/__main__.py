"""`python -m rlhf_fast` is `rlhf-fast`: what launchers that take a module start."""

from rlhf_fast.cli.main import main

main()
