"""Which layout on which GPU, and which replica on which slice: exact, explained, and a function of its input alone."""
