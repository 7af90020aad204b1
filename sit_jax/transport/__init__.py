"""The mathematics of interpolants: pure functions of arrays and of a callable `predict(x, t_b)`.

Time runs from noise (t=0) to data (t=1). Shape suffixes: b batch, h height, w width, c channels;
the functions accept any trailing axes after b. "The paper" is Ma et al., "SiT: Exploring Flow and
Diffusion-based Generative Models with Scalable Interpolant Transformers", arXiv 2401.08740, whose
time runs the other way.
"""
