"""Training text: generated documents, prompts with answers, and tokenised corpora, in batches."""
