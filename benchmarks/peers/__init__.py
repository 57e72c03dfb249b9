"""Other methods, so that ours is compared with what exists: one file a method.

A post-training peer has `quantize(model, config, batches)`, a trained one `prepare(model, config)`; both are described
in `common.py`. All land on the same grids, of `2**bits` levels a group, which `common.check_levels` verifies from the
weights alone.
"""
