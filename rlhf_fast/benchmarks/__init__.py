"""The benchmark suite: providers and cases as data, accuracy before speed, the physical limit in the same run.

`cases` what is measured, `providers` by whom, `measure` and `memory` how, `suite` the run, `report` what comes out of
it. `grpo_step` and `dpo_step` put a whole training step beside TRL's. The command line is `rlhf-fast bench`.
"""
