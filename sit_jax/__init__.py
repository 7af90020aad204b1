"""Scalable Interpolant Transformers in JAX/Flax: training, sampling and evaluation on CPU, GPU and TPU."""
