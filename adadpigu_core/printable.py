"""Texts of others, made fit to be shown."""


def printable(text: str, most: int) -> str:
    """Make a text fit for a terminal, a log or a report, whoever wrote it: one line of at most so many letters."""
    shortened = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(letter if letter.isprintable() else " " for letter in shortened)
