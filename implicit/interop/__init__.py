"""Other packages' solvers here, ours there."""
