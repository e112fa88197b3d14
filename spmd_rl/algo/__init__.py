"""Rewards to advantages to losses, as pure functions of flat arrays.

Everything per response token is a flat [R] array holding the response tokens of the samples one
after another; what belongs to a sample is [n]. `sample_ids` [R] says which sample a token is of.
Nothing here knows ranks or processes: where a sum must also run over other ranks, the caller passes
the function that does it.
"""
