"""Eight studies of Fixed Point Diffusion Models on handwritten digits.

Every study is a function `cells(scale)` of a file. A cell is a name, a training configuration, and sampling settings.
"""
