"""What pruning costs: a model's answers with K of N visual tokens, by this project's selection and by its rivals."""
