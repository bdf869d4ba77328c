"""The forms in which a pruned model is written, one module each.

Each has `check(source, plan)`, which refuses what the form cannot express before a byte is written,
`write(source, plan, folder, shard_bytes, on_bytes)`, and `prove(folder, reference)`.
"""
