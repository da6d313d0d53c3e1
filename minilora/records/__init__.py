"""Records to train on: a prompt and its answer, of which the answer alone is learned."""
