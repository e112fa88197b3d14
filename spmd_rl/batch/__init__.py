"""A rollout's samples to packed micro-batches on each train rank: plan (rank 0), ship, pack."""
