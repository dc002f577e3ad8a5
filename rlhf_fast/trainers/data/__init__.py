"""Rows of files to batches of token ids: readers, registries, forms, templates, tokenising, collating, packing."""
