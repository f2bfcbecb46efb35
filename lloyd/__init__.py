"""From rotated groups to codes and levels: pure numeric kernels. Imports formats only."""
