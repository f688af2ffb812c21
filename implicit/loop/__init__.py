"""Parts of the loop (`implicit.iterate`): reading of residuals, verification, progress, a fixed count."""
