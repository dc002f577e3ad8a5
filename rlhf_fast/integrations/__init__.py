"""Our operations inside trainers that are there already: one import, one call, and one call to take it back.

    from rlhf_fast.integrations import trl            # or verl, openrlhf, llamafactory
    trl.patch()                                       # until trl.unpatch(), or `with trl.patch():`

    from rlhf_fast.integrations.trl import FastGRPOTrainer    # TRL's GRPOTrainer, its loss in a single pass
    from rlhf_fast.integrations.lm_head import fuse_lm_head   # any causal LM: log-probs and losses from its forward

Hosts are imported when they are patched. What is not the host that a patch was written for is refused with an error,
and nothing is changed: see `_patching`. Versions, what is replaced and what is not: docs/integrations.md.
"""
