"""Training of causal language models in plain PyTorch, on one process or many."""
