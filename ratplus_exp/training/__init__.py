"""Training: a plain PyTorch loop that knows tokens and losses, not papers."""
