"""Eight studies of Fixed Point Diffusion Models on handwritten digits, one file each: what is varied, and how.

Every file has a function `cells(scale)` that lists its cells: a name, a configuration to train, and ways to sample it.
"""
