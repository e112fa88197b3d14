"""Trainer weights to engines: names, buckets, transports, and the proof that they arrived."""
