"""Query-aware KV sparsity on recurrence-augmented attention: the paper's experiments as code."""
