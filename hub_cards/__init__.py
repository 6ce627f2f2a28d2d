"""Templates of the cards that are rendered when a model or data set is shared."""
