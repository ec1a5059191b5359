"""Look up claims by key words instead of their whole sentences."""


def only(claims, *words):
    """The one claim whose sentence contains all words."""
    (found,) = (claim for claim in claims if all(word in claim.says for word in words))
    return found
