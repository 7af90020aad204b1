"""Sampling and densities: guidance, the probability-flow ODE, the reverse SDE and log p.

Everything here sees the network as a callable `predict(x_bhwc, t_b)`.
"""
