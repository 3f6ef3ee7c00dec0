"""Training on real data, with networks from small to millions of parameters."""
