"""One scale per unit, such that the local GSC and the lengths of a network follow a wished profile."""
