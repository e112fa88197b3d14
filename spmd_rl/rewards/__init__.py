"""Verifiers: what an answer is worth. See score.py for which one is asked."""
