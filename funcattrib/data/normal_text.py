"""Two texts are the same where they differ in nothing but unicode forms, case and white space."""

import unicodedata


def normal_text(text: str) -> str:
    """Return the form by which texts are compared: NFKC, case folded, each run of white space one space.

    Example:
        >>> normal_text("  Ｔhe   ﬁrst line ") == normal_text("the First Line")
        True
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())
