"""Products of activations and weights: the kernels that stream the weights of few rows, and the formats of weights."""
