"""Linear algebra of the backward solve: GMRES per sample and the adjoint system u = g + J^T u."""
