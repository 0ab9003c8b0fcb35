"""From a question to token ids and embeddings: template, keywords, splice."""
