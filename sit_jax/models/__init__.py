"""The SiT backbone in flax linen.

Parameters are a plain dict; mode and keys are arguments; no mesh axis is named here.
"""
