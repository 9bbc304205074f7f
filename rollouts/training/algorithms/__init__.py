"""Advantages, policy losses, KL, corrections, values, preferences: pure functions of tensors, each held to a formula.

Tensors hold learned tokens back to back, without padding: [N] beside ``sequence_ids`` [N]. Losses return sums.
"""
