"""Functions of functions: gradients, checkpoints, and the compilation of a function to one command list."""
